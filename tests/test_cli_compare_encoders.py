"""`vitweave compare-encoder-fusions`: one command from two encoders and a folder of pictures to the table."""

import json

import pytest
from tiny_encoders import build
from transformers import ViTImageProcessorPil

from vitweave.cli import main
from vitweave.cli_compare_encoders import sizes_of, tower_fields
from vitweave.training.synthetic_classes import SyntheticClasses


def encoder_folder(folder, name, size, mean):
    build(name).save_pretrained(folder / name)
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3)
    processor.save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture
def encoders(tmp_path):
    return [encoder_folder(tmp_path, "vit", 32, 0.5), encoder_folder(tmp_path, "convnext", 64, 0.4)]


@pytest.fixture
def data(tmp_path):
    for part, length in (("train", 6), ("validation", 3)):
        samples = SyntheticClasses(length)
        for index, sample in enumerate(samples):
            folder = tmp_path / "data" / part / samples.id2label[sample["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            sample["image"].save(folder / f"{index}.png")
    return str(tmp_path / "data")


def test_every_encoder_keeps_its_size_and_normalisation(encoders):
    fields, processor = tower_fields(encoders, [32, 64])
    assert fields["image_size"] == 64 and fields["image_mean"] == [0.5] * 3
    assert fields["encoder_options"] == [{"image_size": 32}, {"image_mean": [0.4] * 3, "image_std": [0.5] * 3}]
    assert (processor.size["height"], processor.size["width"]) == (64, 64)


def test_sizes_are_those_of_the_configs_unless_they_are_given():
    models = [build("vit"), build("convnext")]
    assert sizes_of(models, None) == [32, 224] and sizes_of(models, [32, 64]) == [32, 64]
    with pytest.raises(ValueError, match=r"each of 2 encoders, got .32.: --sizes"):
        sizes_of(models, [32])
    models[1].config.image_size = [32, 64]
    with pytest.raises(ValueError, match="a square image"):
        sizes_of(models, None)


@pytest.mark.slow
def test_command(encoders, data, tmp_path, capsys):
    command = ["compare-encoder-fusions", *encoders, "--data", data, "--out", str(tmp_path / "out")]
    options = "--sizes 32 64 --fusions add --seeds 0 1 --steps 1 --batch-size 2 --learning-rates 1e-3 --no-plot"
    assert main([*command, *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "add: accuracy" in printed and "| vit alone |" in printed and "| convnext alone |" in printed
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["name"] for row in kept["rows"]][:2] == ["vit alone", "convnext alone"]
    assert str(tmp_path) not in kept["facts"]["encoders"] + kept["facts"]["data"]
    assert not (tmp_path / "out" / "comparison.png").exists()
    assert main([*command, *options.split(), "--fusion-options", '{"add": {"dirct": true}}']) == 2
    assert "dirct" in capsys.readouterr().err
