"""Heads trained from cached features: the same bits, no image decoded twice, nothing stale, nothing half-built."""

import copy
import errno
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_models import PROCESSOR, CountingSegmenter, data, tiny_model
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import Trainer

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training import feature_build, feature_shards, paired_data
from vitweave.training.depth_data import DepthDataset
from vitweave.training.feature_cache import CachedFeatures, FeatureCollator, cache_features
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import SegmentationDataset, collate_segmentation
from vitweave.training.synthetic_shapes import SyntheticShapes

RUN = {"per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True, "num_train_epochs": 2}
AUGMENTATION = SegmentationAugmentation(crop_size=32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two samples of `tiny_model` in a shard."""
    monkeypatch.setattr(feature_build, "SHARD_BYTES", 3 * 5200)
    CountingSegmenter.encoded = 0


def cached(folder, model=None, dataset=None, **options):
    model = tiny_model() if model is None else model
    return cache_features(model, data() if dataset is None else dataset, folder, batch_size=2, **options)


def encoded_by(call) -> int:
    """How many images run through the encoder meanwhile."""
    before = CountingSegmenter.encoded
    call()
    return CountingSegmenter.encoded - before


def shards(folder):
    return sorted(Path(folder).rglob("*.safetensors"))


@pytest.mark.parametrize("head", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_a_head_trained_from_the_cache_has_the_same_bits(tmp_path, head):
    ends = {}
    for name, folder in (("online", None), ("building", tmp_path / "cache"), ("cached", tmp_path / "cache")):
        model = ends[name] = tiny_model(head_type=head)
        before = CountingSegmenter.encoded
        metrics = train_segmentation(
            model, data(), data(3, seed=1), PROCESSOR, tmp_path / name, cache_features=folder, **RUN
        )
        ends[name + " metrics"] = metrics["mean_iou"], metrics["loss"], metrics["train_loss"]
        ends[name + " images"] = CountingSegmenter.encoded - before
    assert ends["building images"] == 7 + 3 + 2  # one of each dataset to find its size
    assert ends["cached images"] == 0 < ends["online images"]
    start = tiny_model(head_type=head).state_dict()
    for name, value in ends["online"].state_dict().items():
        assert torch.equal(value, ends["building"].state_dict()[name]), name
        assert torch.equal(value, ends["cached"].state_dict()[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in ends["cached"].state_dict().items())
    assert ends["online metrics"] == ends["building metrics"] == ends["cached metrics"]


@pytest.mark.slow
def test_a_resumed_run_may_read_from_the_cache(tmp_path):
    whole, again = tiny_model(), tiny_model()
    train_segmentation(whole, data(), data(3, seed=1), PROCESSOR, tmp_path / "whole", **RUN)
    train_segmentation(tiny_model(), data(), data(3, seed=1), PROCESSOR, tmp_path / "part", **RUN, max_steps=8)
    last = tmp_path / "part" / "checkpoint-8"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    options = {"resume": True, "cache_features": tmp_path / "cache"}
    train_segmentation(again, data(), data(3, seed=1), PROCESSOR, tmp_path / "part", **options, **RUN, max_steps=8)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_samples_and_batches_are_what_encode_gives_in_the_same_layout(tmp_path):
    model, dataset = tiny_model(), data()
    features = cached(tmp_path, model, dataset)
    assert len(features) == 7 and len(shards(tmp_path)) == 4
    order = [5, 0, 6, 1]
    images = collate_segmentation([dataset[index] for index in order])
    with torch.no_grad():
        expected = model.eval().encode(images["pixel_values"])
    collate = FeatureCollator(collate_segmentation)
    batch = collate(features.__getitems__(order))
    for one in (batch, collate([features[index] for index in order])):
        assert set(one) == {"encoder_outputs", "labels"} and one["encoder_outputs"].keys() == expected.keys()
        assert torch.equal(one["labels"], images["labels"]) and one["labels"].dtype == torch.int64
        for found, wanted in zip(one["encoder_outputs"]["feature_maps"], expected["feature_maps"], strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(batch["encoder_outputs"]["feature_maps"], expected["feature_maps"], strict=True):
        assert found.stride() == wanted.stride()
    assert collate([dataset[index] for index in order]).keys() == images.keys()
    assert torch.equal(features[-1]["labels"], features[6]["labels"])
    with pytest.raises(IndexError):
        features[7]


def test_maps_that_are_views_of_tokens_come_back_as_such(tmp_path):
    class Views(CountingSegmenter):
        def encode(self, pixel_values):
            maps = super().encode(pixel_values)["feature_maps"]
            return {
                "maps": [maps[0].contiguous(memory_format=torch.channels_last)],
                "deep": {"mean": maps[1].mean((2, 3))},
            }

    model = tiny_model()
    model.__class__ = Views
    batch = cached(tmp_path, model).__getitems__([4, 1]).batch["encoder_outputs"]
    assert isinstance(batch["maps"], tuple) and batch["maps"][0].is_contiguous(memory_format=torch.channels_last)
    assert batch["deep"]["mean"].shape == (2, 32)


def test_a_warm_start_decodes_nothing(tmp_path, monkeypatch):
    for part in ("image", "label"):
        (tmp_path / part).mkdir()
        for index, sample in enumerate(SyntheticShapes(3)):
            sample[part].save(tmp_path / part / f"{index}.png")
    dataset = SegmentationDataset.from_folder(tmp_path, PROCESSOR)
    built = cached(tmp_path / "cache", dataset=dataset)
    monkeypatch.setattr(paired_data, "open_picture", None)
    again = cached(tmp_path / "cache", dataset=dataset)
    assert torch.equal(built[2]["labels"], again[2]["labels"])


def test_data_loader_workers_and_pickles_read_too(tmp_path):
    features = cached(tmp_path)
    expected = features.__getitems__([0, 1, 2, 3, 4, 5, 6]).batch
    copied = pickle.loads(pickle.dumps(features))
    assert copied.opened == [None] * 4
    loader = DataLoader(copied, batch_size=3, num_workers=2, collate_fn=FeatureCollator())
    assert torch.equal(torch.cat([batch["labels"] for batch in loader]), expected["labels"])
    subset = DataLoader(Subset(features, [6, 2]), batch_size=2, collate_fn=FeatureCollator())
    assert torch.equal(next(iter(subset))["labels"], expected["labels"][[6, 2]])


def test_building_in_workers_gives_the_same(tmp_path):
    one, other = cached(tmp_path / "a"), cached(tmp_path / "b", num_workers=2)
    assert [path.name for path in shards(tmp_path / "a")] == [path.name for path in shards(tmp_path / "b")]
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first["labels"], second["labels"])
        for a, b in zip(*(sample["encoder_outputs"]["feature_maps"] for sample in (first, second)), strict=True):
            assert torch.equal(a, b)


def test_building_leaves_the_model_and_the_random_numbers_alone(tmp_path):
    model = tiny_model().train()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    cached(tmp_path, model)
    assert [module.training for module in model.modules()] == modes and any(modes)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_is_read_back_in_the_encoders_own(tmp_path):
    exact, half = cached(tmp_path), cached(tmp_path, dtype=torch.float16)
    first, second = (features[3]["encoder_outputs"]["feature_maps"][0] for features in (exact, half))
    assert second.dtype == torch.float32 and not torch.equal(first, second)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    assert len({path.parent for path in shards(tmp_path)}) == 2


def test_images_of_several_sizes_are_cached_but_not_stacked(tmp_path):
    samples = [*SyntheticShapes(3, size=32), *SyntheticShapes(3, size=40)]
    dataset = SegmentationDataset(samples[::2] + samples[1::2], SegmentationImageProcessorPil(do_resize=False))
    features = cached(tmp_path, dataset=dataset)
    sizes = [tuple(features[index]["labels"].shape) for index in range(6)]
    assert sizes == [tuple(dataset[index]["labels"].shape) for index in range(6)] and len(set(sizes)) == 2
    with pytest.raises(ValueError, match="features of one size in a batch"):
        features.__getitems__([0, 1, 2])
    assert encoded_by(lambda: cached(tmp_path, dataset=dataset)) == 0


def test_equal_images_share_a_row(tmp_path):
    dataset = SegmentationDataset([*SyntheticShapes(2), *SyntheticShapes(2)], PROCESSOR)
    assert encoded_by(lambda: cached(tmp_path, dataset=dataset)) == 2 + 1
    features = cached(tmp_path, dataset=dataset)
    assert len(features) == 4 and torch.equal(features[0]["labels"], features[2]["labels"])


def classifier(encoder):
    class Probe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = encoder, torch.nn.Linear(16, 3)

        def encode(self, pixel_values):
            features = self.encoder(pixel_values)
            return {"class_tokens": tuple(features.cls), "pooled": features.pooled}

    return Probe()


def test_any_model_with_encode_and_whole_number_labels(tmp_path):
    encoder = VisionEncoder(tiny_model().backbone.config, layers=[1, 2]).requires_grad_(False).eval()
    model = classifier(encoder)
    model.train = lambda mode=True: model
    items = [{"pixel_values": torch.rand(3, 32, 32), "labels": index % 3} for index in range(5)]
    features = cached(tmp_path, model, items)
    batch = features.__getitems__([4, 0]).batch
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    expected = encoder(torch.stack([items[4]["pixel_values"], items[0]["pixel_values"]]))
    assert torch.equal(batch["encoder_outputs"]["class_tokens"][0], expected.cls[0])
    assert features[0]["encoder_outputs"]["pooled"].shape == (32,)


def mutations():
    """Name -> a change of (model, dataset) after which no old feature may be used."""

    def weight(model, dataset):
        with torch.no_grad():
            next(model.backbone.parameters()).view(-1)[0] += 1e-6
        return model, dataset

    def buffer(model, dataset):
        model.backbone.register_buffer("offset", torch.zeros(1), persistent=False)
        return model, dataset

    def picture(model, dataset, part):
        samples = list(dataset.samples)
        for index, sample in enumerate(samples):
            changed = sample[part].copy()
            changed.putpixel((index, 0), 1 if part == "label" else (1, 2, 3))
            samples[index] = {**sample, part: changed}
        return model, SegmentationDataset(samples, PROCESSOR)

    changes = {
        "weight": weight,
        "buffer": buffer,
        "image": lambda model, dataset: picture(model, dataset, "image"),
        "label": lambda model, dataset: picture(model, dataset, "label"),
        "other data": lambda model, dataset: (model, data(7, seed=3)),
        "num_labels": lambda model, dataset: (model, data(num_labels=3)),
    }
    for name, value in {
        "layer_norm_eps": 1e-5, "pos_embed_shift": 0.1, "position_interpolation": "bicubic_antialias",
        "hidden_act": "relu", "qkv_parts": "qk", "apply_layernorm": False,
    }.items():  # fmt: skip
        changes[f"config {name}"] = lambda model, dataset, option={name: value}: (tiny_model(backbone=option), dataset)
    for name, value in {
        "image_mean": [0.5, 0.5, 0.4], "image_std": [0.5, 0.5, 0.4], "do_normalize": False, "do_rescale": False,
        "rescale_factor": 0.5, "resample": 0, "size": {"height": 24, "width": 32}, "do_reduce_labels": True,
        "ignore_index": 254, "size_divisor": 48,
    }.items():  # fmt: skip
        options = {"size": 32, name: value}
        changes[f"processor {name}"] = lambda model, dataset, options=options: (
            model,
            data(processor=SegmentationImageProcessorPil(**options)),
        )
    return changes


def test_nothing_stale_is_ever_used(tmp_path):
    cached(tmp_path)
    assert encoded_by(lambda: cached(tmp_path)) == 0
    for name, change in mutations().items():
        model, dataset = change(tiny_model(), data())
        assert encoded_by(lambda: cached(tmp_path, model, dataset)) == 7 + 1, name  # noqa: B023
        assert encoded_by(lambda: cached(tmp_path, model, dataset)) == 0, name  # noqa: B023
    assert encoded_by(lambda: cached(tmp_path)) == 0


def test_the_log_says_what_differs(tmp_path, caplog):
    cached(tmp_path)
    caplog.set_level(logging.INFO)
    cached(tmp_path, tiny_model(backbone={"layer_norm_eps": 1e-5}))
    assert "features of another encoder; different: config" in caplog.text


def test_broken_shards_are_named_and_only_they_are_rebuilt(tmp_path, monkeypatch, caplog):
    expected = cached(tmp_path).__getitems__([*range(7)]).batch
    truncated, flipped, whole, _ = shards(tmp_path)
    truncated.write_bytes(truncated.read_bytes()[:-9])
    raw = flipped.read_bytes()
    flipped.write_bytes(raw[:-50] + bytes([raw[-50] ^ 4]) + raw[-49:])
    foreign = whole.with_name("foreign.safetensors")
    foreign.write_bytes(b"no shard")
    monkeypatch.setattr(feature_shards, "_checked", {})
    stamp = whole.stat().st_mtime_ns
    found = cached(tmp_path).__getitems__([*range(7)]).batch
    assert all(path.name in caplog.text for path in (truncated, flipped, foreign)) and whole.name not in caplog.text
    assert torch.equal(found["labels"], expected["labels"]) and not foreign.exists()
    for one, other in zip(*(batch["encoder_outputs"]["feature_maps"] for batch in (found, expected)), strict=True):
        assert torch.equal(one, other)
    assert whole.stat().st_mtime_ns == stamp and len(shards(tmp_path)) == 4


def test_a_build_that_breaks_off_goes_on_where_it_was(tmp_path, monkeypatch):
    class Unreadable(SegmentationDataset):
        def __getitem__(self, index):
            if index == 5 and Unreadable.broken:
                raise ValueError("sample 5 cannot be read")
            return super().__getitem__(index)

    Unreadable.broken = True
    monkeypatch.setattr(feature_build.secrets, "randbelow", lambda number: 0)
    dataset = Unreadable(SyntheticShapes(7), PROCESSOR)
    with pytest.raises(ValueError, match="sample 5 cannot"):
        cached(tmp_path, dataset=dataset)
    assert len(shards(tmp_path)) == 2 and not list(tmp_path.rglob("*.tmp"))
    Unreadable.broken = False
    assert encoded_by(lambda: cached(tmp_path, dataset=dataset)) == 3 + 1


def test_augmented_data_is_left_as_it_is(tmp_path, caplog):
    augmented = data(augmentation=AUGMENTATION)
    for dataset in (augmented, Subset(augmented, [0, 1]), ConcatDataset([data(), augmented])):
        assert cached(tmp_path / "cache", dataset=dataset) is dataset
    assert caplog.text.count("not cached: its SegmentationAugmentation") == 3 and not (tmp_path / "cache").exists()
    options = {"cache_features": tmp_path / "cache"} | RUN
    assert encoded_by(
        lambda: train_segmentation(tiny_model(), augmented, data(3, seed=1), PROCESSOR, tmp_path / "run", **options)
    ) == 2 * 7 + (3 + 1)


class Changing(torch.utils.data.Dataset):
    """Noise, which no attribute betrays."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"pixel_values": torch.rand(3, 32, 32), "labels": 0}


def test_what_cannot_be_cached_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"frozen encoder.*parameters are trained.*freeze_backbone=True"):
        cached(tmp_path, tiny_model(freeze=False))
    thawed = tiny_model(freeze=False)
    thawed.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=r"stays in eval mode.*model.train\(\)"):
        cached(tmp_path, thawed)  # its dropout would act online
    with pytest.raises(ValueError, match="first item changes"):
        cached(tmp_path, dataset=Changing())
    with pytest.raises(ValueError, match="model with `encode"):
        cached(tmp_path, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="empty list"):
        cached(tmp_path, dataset=[])
    with pytest.raises(ValueError, match="bf16_full_eval"):
        train_segmentation(
            tiny_model(), data(), None, PROCESSOR, tmp_path / "r", cache_features=tmp_path, bf16_full_eval=True, **RUN
        )
    assert not shards(tmp_path)


def test_adapters_are_refused_unless_they_are_in_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj_cls"]))
    adapted.requires_grad_(False)
    with pytest.raises(ValueError, match="holds adapters"):
        cached(tmp_path, adapted)
    head = peft.LoraConfig(r=2, target_modules="dummy-target-modules", modules_to_save=["head"])
    assert len(cached(tmp_path, peft.get_peft_model(tiny_model(), head))) == 7


def test_size_limit(tmp_path):
    folder = tmp_path / "cache"
    first = cached(folder)
    size = sum(path.stat().st_size for path in shards(folder))
    with pytest.raises(ValueError, match=r"need \d+ bytes, size_limit allows 1000"):
        cached(folder, dataset=data(seed=5), size_limit=1000)
    other = tiny_model(backbone={"layer_norm_eps": 1e-5})
    with pytest.raises(ValueError, match="size_limit"):  # what a dataset of this process reads stays
        cached(folder, other, size_limit=int(1.5 * size))
    assert encoded_by(lambda: cached(folder)) == 0
    key = shards(folder)[0].parent
    first.paths = []
    del first
    CachedFeatures.instances.clear()
    assert len(cached(folder, other, size_limit=int(1.5 * size))) == 7
    assert sum(path.stat().st_size for path in shards(folder)) <= 1.5 * size and 0 < len(shards(key)) < 4


def test_a_full_read_only_folder_is_enough_and_a_lacking_one_says_so(tmp_path, monkeypatch):
    cached(tmp_path)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    for where, name in ((feature_shards, "save_file"), (feature_shards.os, "utime"), (Path, "mkdir")):
        monkeypatch.setattr(where, name, read_only)
    assert encoded_by(lambda: cached(tmp_path)) == 0
    with pytest.raises(OSError, match="lacks this encoder and cannot be written"):
        cached(tmp_path, tiny_model(backbone={"layer_norm_eps": 1e-5}))
    with pytest.raises(OSError, match=r"cannot be written to .*Read-only"):
        cached(tmp_path, dataset=data(seed=9))


def test_a_cached_dataset_serves_the_stock_trainer(tmp_path):
    features = cached(tmp_path)
    model = tiny_model()
    from vitweave.training.runs import run_arguments

    trainer = Trainer(model, run_arguments(tmp_path / "run", None, **RUN), FeatureCollator(), train_dataset=features)
    assert trainer.train().training_loss > 0
    assert encoded_by(lambda: trainer.predict(copy.copy(features))) == 0


def test_depth_models_with_class_tokens(tmp_path):
    torch.manual_seed(0)
    config = DensePredictorConfig(backbone_config=tiny_model().config.backbone_config, freeze_backbone=True)
    model = DensePredictorForDepthEstimation(config)
    samples = [{"image": entry["image"], "depth": np.asarray(entry["label"]) + 0.5} for entry in SyntheticShapes(4)]
    dataset = DepthDataset(samples, DepthImageProcessorPil(size=32))
    batch = cached(tmp_path, model, dataset).__getitems__([3, 1]).batch
    assert set(batch["encoder_outputs"]) == {"feature_maps", "class_tokens"}
    online = collate_segmentation([dataset[3], dataset[1]])
    assert torch.equal(batch["labels"], online["labels"]) and batch["labels"].dtype == torch.float32
    from_images, from_features = (model.eval()(**inputs) for inputs in (online, batch))
    assert torch.equal(from_images.loss, from_features.loss) and from_images.loss.isfinite()
    assert torch.equal(from_images.predicted_depth, from_features.predicted_depth)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--kills=3", "--together=independent", "--together=gloo"])
def test_kills_and_several_processes(option):
    script = Path(__file__).parents[2] / "benchmarks" / "kill_cache_build.py"
    done = subprocess.run([sys.executable, str(script), "--tiny", option], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_entries_that_are_not_asked_for_are_not_read(tmp_path):
    whole = cached(tmp_path, tiny_model(head_type="linear"))
    none = whole.only([])
    batch = none.__getitems__([3, 0]).batch
    assert batch["encoder_outputs"] == {} and len(batch["labels"]) == 2
    same = whole.only(["feature_maps"])
    assert torch.equal(same[3]["encoder_outputs"]["feature_maps"][0], whole[3]["encoder_outputs"]["feature_maps"][0])
    assert set(none.paths) == set(whole.paths) and none in CachedFeatures.instances
