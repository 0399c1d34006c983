"""Keys of cached features: whatever could change a feature changes the key, and nothing else does."""

import copy
import random
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from cached_models import PROCESSOR, CountingSegmenter, data, tiny_model
from transformers import ViTImageProcessorPil

from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training import feature_keys
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.feature_keys import SampleKeys, class_files, digest_of, digests_of, encoder_ingredients
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_shapes import SyntheticShapes

MUTATIONS = 10_000


def mutated(value, rng: random.Random):
    """The value with one bit, character or entry changed."""
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, torch.Tensor):
        changed = value.clone()
        flat = changed.view(-1).view(torch.uint8)
        flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
        return changed
    if isinstance(value, PIL.Image.Image):
        pixels = np.array(value)
        pixels.reshape(-1)[rng.randrange(pixels.size)] ^= 1 << rng.randrange(8)
        return PIL.Image.fromarray(pixels)
    if isinstance(value, bytes):
        place = rng.randrange(len(value) + 1)
        return (
            value[:place]
            + bytes([value[place] ^ 1 << rng.randrange(8) if place < len(value) else 0])
            + value[place + 1 :]
        )
    if isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        return value[:place] + chr(rng.randrange(256, 2000)) + value[place + 1 :]
    if rng.random() < 0.05 and value:
        return dict(list(value.items())[:-1])
    name = rng.choice(sorted(value))
    return {**value, name: mutated(value[name], rng)}


def test_ten_thousand_mutations_give_ten_thousand_keys():
    rng = random.Random(0)
    values = encoder_ingredients(tiny_model(), PROCESSOR, torch.float16)
    values["code"] = {name: path.read_bytes()[:2000] for name, path in sorted(values["code"].items())[::12]}
    values["code"] |= {"last.py": b"pass"}
    digests, sample = digests_of(values), SyntheticShapes(1)[0]
    original = digest_of([digest_of(digests), sample])
    seen = set()
    for _ in range(MUTATIONS):
        name = rng.choice([*values, "sample"])
        if name == "sample":
            changed = [digest_of(digests), mutated(sample, rng)]
        else:
            changed = [digest_of({**digests, name: digest_of(mutated(values[name], rng))}), sample]
        seen.add((name, digest_of(changed)))
    keys = {key for _, key in seen}
    assert original not in keys
    assert {name for name, _ in seen} == {*values, "sample"}


def test_the_same_ingredients_give_the_same_key():
    model, again = tiny_model(), tiny_model()
    again.config.backbone_config.name_or_path = "elsewhere"
    with torch.no_grad():
        again.head.classifier.weight.add_(1)  # the head reads features, it makes none
    again.encode(torch.zeros(1, 3, 32, 32))
    again.train()
    first, second = (digests_of(encoder_ingredients(made, PROCESSOR)) for made in (model, again))
    assert first == second
    fewer_labels = tiny_model(id2label={0: "no", 1: "yes"}, head_options={})
    assert digests_of(encoder_ingredients(fewer_labels, PROCESSOR)) == first


def changed_weight():
    model = tiny_model()
    with torch.no_grad():
        weight = model.backbone.embeddings.patch_embeddings.projection.weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    return model


def without_sdpa():
    model = tiny_model()
    model.set_attn_implementation("eager")
    return model


class Doubled(CountingSegmenter):
    """Another `encode` in the same file."""

    def encode(self, pixel_values):
        return {"maps": super().encode(pixel_values)["feature_maps"][0] * 2}


def of_another_class():
    model = tiny_model()
    model.__class__ = Doubled
    return model


ENCODERS = {
    "weight": (changed_weight, "weights"),
    "half": (lambda: tiny_model().to(torch.bfloat16), "weights"),
    "layers": (lambda: tiny_model(backbone={"layer_norm_eps": 1e-5}), "config"),
    "attention": (without_sdpa, "attention"),
    "class": (of_another_class, "options"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_another_encoder_has_another_key(name):
    build, ingredient = ENCODERS[name]
    first, second = (digests_of(encoder_ingredients(model)) for model in (tiny_model(), build()))
    assert first[ingredient] != second[ingredient]


def test_layers_and_options_of_encode_count():
    one, other = tiny_model(), tiny_model()
    other.backbone.out_indices = [2]
    assert encoder_ingredients(one)["layers"] != encoder_ingredients(other)["layers"]
    type(other).encode_options, kept = {"class_tokens": True}, type(other).encode_options
    try:
        assert digests_of(encoder_ingredients(other))["options"] != digests_of(
            encoder_ingredients(one) | {"options": ""}
        )
        assert "True" in encoder_ingredients(other)["options"]["encode"]
    finally:
        del type(other).encode_options
    assert kept is not None and "False" in encoder_ingredients(other)["options"]["encode"]


def test_code_versions_precision_and_processor_count(monkeypatch, tmp_path):
    model = tiny_model()
    before = digests_of(encoder_ingredients(model, PROCESSOR))

    def changed(**options):
        now = digests_of(encoder_ingredients(model, options.pop("processor", PROCESSOR), **options))
        return {name for name in before if before[name] != now[name]}

    assert changed() == set()
    assert changed(dtype=torch.float16) == {"dtype"}
    assert changed(processor=SegmentationImageProcessorPil(size=32, image_std=[0.5, 0.5, 0.51])) == {"processor"}
    torch.set_float32_matmul_precision("medium")
    try:
        assert changed() == {"arithmetic"}
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        assert changed() == {"arithmetic"}
    (tmp_path / "modeling").mkdir()
    (tmp_path / "modeling" / "a.py").write_text("x = 1")
    monkeypatch.setattr(feature_keys, "versions", lambda: {"torch": "0.0"})
    assert changed() == {"versions"}
    files = feature_keys.code_files()
    monkeypatch.undo()
    own = {f"{path.parent.name}/{path.name}" for path in files.values()}
    assert {"modeling/tokens.py", "processing/augmentation.py", "configuration/configuration_base.py"} <= own
    monkeypatch.setattr(feature_keys, "code_files", lambda: {**files, "modeling/a.py": tmp_path / "modeling" / "a.py"})
    assert changed() == {"code"}
    once = digests_of(encoder_ingredients(model, PROCESSOR))["code"]
    (tmp_path / "modeling" / "a.py").write_text("x = 2")
    assert digests_of(encoder_ingredients(model, PROCESSOR))["code"] != once


def test_files_of_foreign_classes_count():
    files = class_files([type(tiny_model())])
    assert any(path.name == "cached_models.py" for path in files.values())
    assert any(name.startswith("transformers.") for name in files)
    made_up = type("MadeUp", (), {"__module__": "nowhere"})
    with pytest.raises(ValueError, match=r"source file of MadeUp.*\.py file"):
        class_files([made_up])


@pytest.fixture
def folder(tmp_path):
    for part in ("image", "label"):
        (tmp_path / part).mkdir()
    for index, sample in enumerate(SyntheticShapes(3)):
        sample["image"].save(tmp_path / "image" / f"{index}.png")
        sample["label"].save(tmp_path / "label" / f"{index}.png")
    return tmp_path


def test_files_are_keyed_by_their_bytes_without_decoding(folder, monkeypatch):
    dataset = SegmentationDataset.from_folder(folder, PROCESSOR)
    monkeypatch.setattr(PIL.Image, "open", None)
    keys = [SampleKeys(dataset, "key")[index] for index in range(3)]
    assert len(set(keys)) == 3
    for part in ("image", "label"):
        path = folder / part / "1.png"
        raw = path.read_bytes()
        path.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
        now = [SampleKeys(dataset, "key")[index] for index in range(3)]
        assert [a == b for a, b in zip(keys, now, strict=True)] == [True, False, True]
        path.write_bytes(raw)
    moved = folder.rename(folder.with_name("moved"))
    again = SegmentationDataset.from_folder(moved, PROCESSOR)
    assert [SampleKeys(again, "key")[index] for index in range(3)] == keys
    assert SampleKeys(again, "other")[0] != keys[0]
    again.num_labels = 2  # class ids are checked against it
    assert SampleKeys(again, "key")[0] != keys[0]


def test_rows_of_datasets_are_keyed_without_decoding(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    samples = datasets.Dataset.from_list(list(SyntheticShapes(3)), features=features)
    dataset = SegmentationDataset(samples, PROCESSOR)
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", None)
        keys = [SampleKeys(dataset, "key")[index] for index in range(3)]
    assert len(set(keys)) == 3
    swapped = SegmentationDataset(samples.select([1, 0, 2]), PROCESSOR)
    assert [SampleKeys(swapped, "key")[index] for index in (1, 0, 2)] == keys
    transformed = SegmentationDataset(samples.with_transform(lambda rows: rows), PROCESSOR)
    assert SampleKeys(transformed, "key").from_items  # what the function does cannot be read, so its results are hashed


def test_pictures_in_memory_and_finished_items():
    keys = [SampleKeys(data(3), "key")[index] for index in range(3)]
    assert keys == [SampleKeys(data(3), "key")[index] for index in range(3)] and len(set(keys)) == 3
    items = [dict(data(3)[index]) for index in range(3)]
    before = SampleKeys(items, "key")[1]
    items[1] = copy.deepcopy(items[1])
    items[1]["labels"][0, 0] += 1
    assert SampleKeys(items, "key")[1] != before
    gray = PIL.Image.new("P", (4, 4))
    gray.putpalette([0] * 768)
    before = digest_of(gray)
    gray.putpalette([1] + [0] * 767)
    assert digest_of(gray) != before
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"]) and digest_of([1]) != digest_of(["1"])
    with pytest.raises(ValueError, match="got object"):
        digest_of(object())


def test_pictures_in_class_folders_are_keyed_by_their_bytes_and_class(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        SyntheticShapes(1)[0]["image"].save(tmp_path / name / "0.png")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    monkeypatch.setattr(PIL.Image, "open", None)
    keys = SampleKeys(ImageClassificationDataset.from_folder(tmp_path, processor), "key")
    one, other = keys[0], keys[1]
    assert one != other  # the same picture in another class
    with (tmp_path / "b" / "0.png").open("ab") as file:
        file.write(b"1")
    assert keys[0] == one and keys[1] != other
