"""The `vitweave` command: what it prints and how it ends."""

import pytest
import torch

from vitweave.cli import main
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub import export as export_module
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = SpecializedViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28)
    SpecializedViTForImageClassification(config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "export" in capsys.readouterr().out


def test_export_writes_the_folder(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "out"), "--no-verify"]) == 0
    assert (tmp_path / "out" / "modeling_specialized_vit.py").exists()
    assert "not checked" in capsys.readouterr().out


def test_export_checks_the_folder_by_itself(saved, tmp_path, capsys, monkeypatch):
    checked = []
    monkeypatch.setattr(export_module, "check_bundle", lambda folder, *args: checked.append(folder.name))
    assert main(["export", str(saved), str(tmp_path / "out")]) == 0
    assert checked == ["out"]
    assert "checked in a process without vitweave" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda saved: (saved / "config.json").write_text('{"model_type": "vit"}'), "expected a vitweave model"),
        (lambda saved: (saved / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda saved: (saved / "model.safetensors").write_bytes(b"cut"), "truncated or damaged"),
        (lambda saved: (saved / "vitweave_card.json").write_text('{"licence": 1}'), "unknown keys ['licence']"),
        (lambda saved: (saved.parent / "out").mkdir() or (saved.parent / "out" / "x").touch(), "is not empty"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(saved, capsys, damage, said):
    damage(saved)
    out = saved.parent / "out"
    before = sorted(saved.parent.rglob("*"))
    assert main(["export", str(saved), str(out)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert sorted(saved.parent.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("words", [[], ["weave"], ["export"], ["export", "a", "b", "--forse"]])
def test_wrong_words_end_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: vitweave" in capsys.readouterr().err
