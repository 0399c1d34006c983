"""Segmentation on several sensors through the stock Trainer: resume, subsets, and one-line predictions."""

import itertools

import numpy as np
import pytest
import torch
from transformers import SegformerConfig, set_seed

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.modality_data import ModalityAugmentation, ModalityDataset, predict_modalities
from vitweave.training.modality_evaluation import evaluate_modalities
from vitweave.training.segmentation import train_segmentation

FUSIONS = ("gemini", "cross_attention", "token_exchange", "channel_exchange", "rectify_fuse")
SENSORS = {"rgb": {"encoding": "rgb"}, "depth": {"encoding": "metres", "value_range": [0, 10], "invalid": 0}}


def scenes(count: int = 8) -> list[dict]:
    """What is near is class 1; colours are noise."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        label = (rng.random((4, 6)) < 0.5).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        rgb = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        images = {"rgb": rgb, "depth": np.where(label, 2.0, 8.0).astype(np.float32)}
        found.append({"name": f"scene {index}", "images": images, "label": label})
    return found


def build(sensors=SENSORS, **options) -> ModalityFusionForSemanticSegmentation:
    set_seed(0)
    small = SegformerConfig(
        hidden_sizes=[32, 32, 64, 64], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], sr_ratios=[4, 2, 1, 1]
    )
    config = ModalityFusionConfig(
        modalities=list(sensors), stream_config=small, decoder_hidden_size=32, num_labels=2, **options
    )
    return ModalityFusionForSemanticSegmentation(config)


def train(folder, steps: int, resume: bool = False, stop: int | None = None, **options):
    model, processor = build(**options), ModalityImageProcessorPil(SENSORS)
    data = ModalityDataset(scenes(), processor, ModalityAugmentation(seed=1))
    arguments = {"max_steps": steps, "save_strategy": "steps", "save_steps": stop or steps, "report_to": "none"}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "disable_tqdm": True}
    train_segmentation(model, data, ModalityDataset(scenes(), processor), processor, folder, resume, **arguments)
    return model, processor


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    whole, _ = train(tmp_path / "whole", 4, stop=2, modality_dropout=0.4)
    train(tmp_path / "part", 4, stop=2, modality_dropout=0.4)
    (last,) = (tmp_path / "part").glob("checkpoint-4")
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    resumed, _ = train(tmp_path / "part", 4, stop=2, resume=True, modality_dropout=0.4)
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_depth_tells_what_colour_does_not(tmp_path):
    model, processor = train(tmp_path, 120, modality_dropout=0.3)
    data = ModalityDataset(scenes(), processor)
    subsets = [kept for n in (1, 2) for kept in itertools.combinations(SENSORS, n)]
    found = {"+".join(kept): evaluate_modalities(model, data, kept)["mean_iou"] for kept in subsets}
    assert found["depth"] > 0.8 and found["rgb+depth"] > 0.8 > found["rgb"]
    assert data.keep is None


def test_one_line_predictions_take_any_subset():
    model, processor = build().train(), ModalityImageProcessorPil(SENSORS, size={"height": 16, "width": 24})
    scene = scenes(1)[0]["images"]
    both = predict_modalities(model, processor, **scene)
    assert both.shape == (32, 48) and both.dtype == torch.int64 and model.training
    assert predict_modalities(model, processor, depth=scene["depth"]).shape == (32, 48)
    with pytest.raises(ValueError, match="none of the modalities"):
        predict_modalities(model, processor, rgb=None)
    assert predict_modalities(model.bfloat16(), processor, **scene).shape == (32, 48)


FOUR = {
    **SENSORS,
    "thermal": {"encoding": "thermal", "value_range": [0, 40]},
    "event": {"encoding": "picture"},
}


def scenes_of_four(count: int = 4) -> list[dict]:
    """What is near is warm, and its edges move."""
    found = scenes(count)
    for scene in found:
        label = scene["label"]
        scene["images"]["thermal"] = np.where(label, 30.0, 10.0).astype(np.float32)
        edges = np.abs(np.diff(label.astype(np.int16), axis=1, prepend=0)) * 255
        scene["images"]["event"] = np.repeat(edges.astype(np.uint8)[..., None], 3, axis=2)
    return found


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize(
    "fusion_type",
    [name if name == "token_exchange" else pytest.param(name, marks=pytest.mark.slow) for name in FUSIONS],
)
def test_more_than_two_sensors_learn_and_every_subset_is_scored(fusion_type, count, tmp_path):
    """A run that leaves sensors out, then all 7 or 15 subsets: what an absent one would show does not matter."""
    names = list(FOUR)[:count]
    sensors = {name: FOUR[name] for name in names}
    model, processor = build(sensors, fusion_type=fusion_type, modality_dropout=0.4), ModalityImageProcessorPil(sensors)
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    data = ModalityDataset(shown(scenes_of_four(), names), processor, ModalityAugmentation(seed=1))
    test = ModalityDataset(shown(scenes_of_four(2), names), processor)
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 4, "report_to": "none", "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    metrics = train_segmentation(model, data, test, processor, tmp_path, **arguments)
    assert np.isfinite(metrics["train_loss"])
    still = [name for name, part in model.named_parameters() if torch.equal(part, before[name])]
    assert not still
    model.eval()
    for kept in (kept for number in range(1, count + 1) for kept in itertools.combinations(names, number)):
        found = evaluate_modalities(model, test, kept)
        assert 0 <= found["mean_iou"] <= 1, kept
        test.keep = kept
        item = test[0]
        hidden = ~item["modality_mask"]
        assert hidden.sum() == count - len(kept)
        other = item["pixel_values"].clone()
        other[hidden] = float("nan")
        inputs = {"modality_mask": item["modality_mask"][None]}
        with torch.no_grad():
            one, two = (model(pixel_values=images[None], **inputs) for images in (item["pixel_values"], other))
        assert torch.equal(one.logits, two.logits) and one.logits.isfinite().all(), kept
        assert torch.equal(one.modality_logits, two.modality_logits) and not one.modality_logits[0, hidden].any()


def shown(found: list[dict], names: list[str]) -> list[dict]:
    """The scenes with some of their sensors."""
    return [scene | {"images": {name: scene["images"][name] for name in names}} for scene in found]
