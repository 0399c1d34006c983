"""`vitweave convert` from the command line."""

from pathlib import Path

import pytest
from official_checkpoints import TEXT, official_checkpoint
from official_mit import gemini_fusion_deliver, imagenet_mit
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSemanticSegmentation

from vitweave.cli import main
from vitweave.configuration.multi_encoder_presets import multi_encoder_preset
from vitweave.modeling.own_models import build_model


@pytest.fixture
def release(tmp_path: Path):
    """Writes a released checkpoint, and returns the command that converts it."""

    def write(preset: str) -> list[str]:
        folder = tmp_path / preset
        folder.mkdir()
        save_file(official_checkpoint(preset), folder / "model.safetensors")
        multi_encoder_preset(preset, tiny=True).save_pretrained(tmp_path / "tower")
        TEXT.save_pretrained(tmp_path / "text")
        command = ["convert", str(folder), "--preset", preset, "--out", str(tmp_path / "out")]
        return [*command, "--config", str(tmp_path / "tower"), "--text-config", str(tmp_path / "text")]

    return write


def test_a_vision_language_model(release, tmp_path: Path, capsys):
    assert main([*release("eagle-x4"), "--dtype", "bfloat16", "--image-token-id", "5"]) == 0
    printed = capsys.readouterr().out
    assert "-> MultiEncoderVlmForConditionalGeneration" in printed
    assert "model.vision_tower.encoder_3" in printed and "model.multi_modal_projector" in printed
    assert "rotary constants, computed from the config" in printed
    assert "encoder_1.model.layernorm.weight" in printed
    assert "bfloat16" in printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.image_token_id == 5


def test_a_connector_with_its_frozen_encoders(release, tmp_path: Path, capsys):
    command = release("cambrian")
    for index, member in enumerate(multi_encoder_preset("cambrian", tiny=True).encoder_configs):
        build_model(member).save_pretrained(tmp_path / f"encoder_{index}")
        command += ["--encoder", f"{index}={tmp_path / f'encoder_{index}'}"]
    assert main([*command, "--tower-only"]) == 0
    assert "part of the vision-language model, not of its tower" in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "out").config.fusion_type == "spatial_vision_aggregator"


def test_errors_are_one_line_and_leave_nothing(release, tmp_path: Path, capsys):
    command = release("mgm")
    wrong = [*command[:3], "llava-hr", *command[4:]]
    assert main(wrong) == 2
    assert "no tensor of encoder 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command[:5], str(tmp_path / "mgm"), *command[6:]]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--encoder", "clip"])
    assert "'clip' is not NUMBER=NAME" in capsys.readouterr().err


def test_a_segmenter_of_several_sensors(tmp_path: Path, capsys):
    save_file(gemini_fusion_deliver(3), tmp_path / "deliver.safetensors")
    command = ["convert", str(tmp_path / "deliver.safetensors"), "--preset", "gemini-fusion-deliver"]
    command += ["--out", str(tmp_path / "out"), "--modalities", "rgb", "depth", "lidar"]
    assert main([*command, "--tower-only"]) == 2
    assert "--tower-only mean nothing to 'gemini-fusion-deliver'" in capsys.readouterr().err
    assert main([*command[:2], "--preset", "gemini-fuzion", *command[4:]]) == 2
    assert "did you mean 'gemini-fusion'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "-> ModalityFusionForSemanticSegmentation" in printed and "one more than it reads" in printed
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert config.modalities == ["rgb", "depth", "lidar"] and config.auxiliary == "max"


def test_an_encoder_of_sensors(tmp_path: Path, capsys):
    save_file(imagenet_mit(), tmp_path / "mit_b0.safetensors")
    command = ["convert", str(tmp_path / "mit_b0.safetensors"), "--preset", "mit", "--out", str(tmp_path / "out")]
    assert main([*command, "--modalities", "rgb", "thermal"]) == 0
    assert "classifier of ImageNet" in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "out").config.num_streams == 2
