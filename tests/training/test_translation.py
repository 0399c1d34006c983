"""Translation through the stock Trainer: targets, figures, resume, and the adversarial pair."""

import json

import numpy as np
import pytest
import torch
from modality_translators import target_images, tiny_generator
from transformers import AutoModelForImageToImage

from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.modality_data import ModalityAugmentation
from vitweave.training.translation import train_translation
from vitweave.training.translation_data import TranslationDataset, translate_modalities
from vitweave.training.translation_metrics import TranslationMetrics, translation_metrics

SENSORS = {"rgb": {"encoding": "rgb"}, "thermal": {"encoding": "thermal", "value_range": [0, 40]}}
DEPTH = {"encoding": "metres", "value_range": [0, 10], "invalid": 0}


def scenes(count: int = 6) -> list[dict]:
    """Warm is near; the first row was not measured."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        near = (rng.random((4, 6)) < 0.5).repeat(8, 0).repeat(8, 1)
        depth = np.where(near, 2.5, 7.5).astype(np.float32)
        depth[0] = 0
        rgb = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        images = {"rgb": rgb, "thermal": np.where(near, 30.0, 10.0).astype(np.float32), "depth": depth}
        found.append({"name": f"scene {index}", "images": images})
    return found


def data(augmentation=None, target="depth", sensor=None) -> TranslationDataset:
    return TranslationDataset(scenes(), ModalityImageProcessorPil(SENSORS), target, sensor or DEPTH, augmentation)


def train(folder, steps: int, resume: bool = False, **options):
    model = tiny_generator(list(SENSORS), modality_dropout=0.3)
    arguments = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True}
    arguments |= {"per_device_train_batch_size": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    processor = ModalityImageProcessorPil(SENSORS)
    augmented = data(ModalityAugmentation(crop_size=(32, 32)))
    return model, train_translation(model, augmented, data(), processor, folder, resume, **options, **arguments)


def test_targets_are_in_range_and_nan_where_nothing_was_measured():
    item = data()[0]
    assert item["pixel_values"].shape == (2, 3, 32, 48) and item["labels"].shape == (3, 32, 48)
    assert item["labels"][:, 0].isnan().all()
    assert set(item["labels"][:, 1:].flatten().tolist()) == {-0.5, 0.5}
    picture = data(target="rgb", sensor={"encoding": "rgb"})[0]["labels"]
    wanted = torch.from_numpy(scenes()[0]["images"]["rgb"]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(picture, wanted, atol=1e-5, rtol=0)
    flipped = data(ModalityAugmentation(flip=1.0))[0]
    assert torch.equal(flipped["labels"][:, 1:], item["labels"][:, 1:].flip(-1))
    with pytest.raises(ValueError, match=r"scene 0.*to be drawn"):
        data(target="event")[0]


def test_figures_by_hand_and_from_batches():
    real = target_images(batch=3)
    drawn = (real + 0.2).clone()
    real[0, :, 5:], real[2] = float("nan"), float("nan")
    drawn[0, :, 5:] = 7.0  # where nothing was measured it does not matter
    found = translation_metrics(drawn, real)
    torch.testing.assert_close(found["mae"][:2].float(), torch.full((2,), 0.1))
    torch.testing.assert_close(found["psnr"][:2].float(), torch.full((2,), 20.0))
    assert found["ssim"][0].isnan() and 0 < found["ssim"][1] < 1 and all(part[2].isnan() for part in found.values())
    same = translation_metrics(real[1:2], real[1:2])
    assert same["psnr"] == 100 and abs(same["ssim"] - 1) < 1e-9
    whole, parts = TranslationMetrics(), TranslationMetrics()
    whole.update(drawn, real)
    for index in range(3):
        parts.update(drawn[index : index + 1], real[index : index + 1])
    assert whole.compute() == pytest.approx(parts.compute()) and whole.compute()["mae"] == pytest.approx(0.1)


def test_ssim_of_flat_images_is_its_formula():
    flat = torch.full((1, 3, 16, 16), 0.2)
    found = translation_metrics(flat, -flat)["ssim"]
    one, two, first = 0.6, 0.4, 0.01**2
    assert found.item() == pytest.approx((2 * one * two + first) / (one**2 + two**2 + first), abs=1e-6)


@pytest.mark.parametrize("adversarial", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_is_resumed_and_leaves_the_generator(adversarial, tmp_path):
    whole, metrics = train(tmp_path / "whole", 4, adversarial=adversarial)
    assert {"train_loss", "loss", "mae", "mse", "psnr", "ssim"} <= metrics.keys()
    train(tmp_path / "part", 2, adversarial=adversarial)
    resumed, _ = train(tmp_path / "part", 4, resume=True, adversarial=adversarial)
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    index = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert index["architectures"] == ["ModalityFusionForImageToImage"]
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path / "whole")
    processor = ModalityImageProcessorPil.from_pretrained(tmp_path / "whole")
    drawn = translate_modalities(loaded, processor, thermal=scenes(1)[0]["images"]["thermal"])
    assert drawn.shape == (3, 32, 48) and drawn.min() >= 0 and drawn.max() <= 1


@pytest.mark.slow
def test_depth_is_drawn_from_heat(tmp_path):
    _, metrics = train(tmp_path, 80)
    assert metrics["mae"] < 0.1  # 0.25 is the best constant


def test_a_model_trained_in_bfloat16_computes_in_its_own_precision_afterwards(tmp_path):
    model, _ = train(tmp_path, 2, bf16=True)
    assert "forward" not in model.__dict__ and "_original_forward" not in model.__dict__
    inputs = {name: data()[0][name][None] for name in ("pixel_values", "modality_mask")}
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).reconstruction, loaded(**inputs).reconstruction)
        assert isinstance(model(**inputs, return_dict=False), tuple)
