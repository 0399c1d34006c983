"""Every published file has its SHA-256 beside it, and a change is told."""

import hashlib
import shutil
import subprocess

import pytest

from vitweave.cli import main
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.card import CardInfo
from vitweave.hub.checksums import check_sums, read_sums, sha256
from vitweave.hub.export import export
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
METRIC = {"type": "accuracy", "value": 0.5, "command": "python measure.py", "dataset": "digits"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "model"
    card = CardInfo(data_sha256={"digits": "ab" * 32}, metrics=[METRIC])
    return export(SpecializedViTForImageClassification(SpecializedViTConfig(**TINY)), folder, card=card, verify=False)


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "copy")


def test_every_file_is_listed_with_its_sum(folder):
    sums = check_sums(folder)
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"README.md", "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    tool = shutil.which("sha256sum")
    if tool:
        subprocess.run([tool, "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_the_card_tells_weights_code_and_data(folder):
    text = (folder / "README.md").read_text()
    assert f"| `model.safetensors` | `{read_sums(folder)['model.safetensors']}` |" in text
    assert "| data: digits | `" + "ab" * 32 in text
    code = "".join(
        sorted(line for line in (folder / "SHA256SUMS").read_text().splitlines(True) if line.endswith(".py\n"))
    )
    lines = sorted(code.splitlines(True), key=lambda line: line.split()[1])
    assert hashlib.sha256("".join(lines).encode()).hexdigest() in text


def test_the_command_agrees_and_tells_how_metrics_are_recomputed(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "files as published" in told and "accuracy on digits: 0.5, not recomputed" in told
    assert "by its author: python measure.py" in told


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pretrained.py"])
def test_a_changed_file_is_told(folder, name, capsys):
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert main(["verify", str(folder)]) == 2
    assert f"changed ['{name}']" in capsys.readouterr().err


def test_added_code_and_missing_files_are_told(folder):
    (folder / "evil.py").write_text("")
    (folder / "pretrained.py").unlink()
    with pytest.raises(ValueError, match=r"missing \['pretrained.py'\], added \['evil.py'\]"):
        check_sums(folder)


@pytest.mark.parametrize("line", ["0" * 64 + "  ../secret", "0" * 63 + "  a.py", "x", "0" * 64 + "  .."])
def test_sums_of_files_elsewhere_are_refused(folder, line):
    (folder / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(ValueError, match="expected lines of 64"):
        check_sums(folder)


def test_without_sums_there_is_nothing_to_check(tmp_path):
    with pytest.raises(FileNotFoundError, match="vitweave export"):
        check_sums(tmp_path)


def test_the_sum_of_a_folder_depends_on_names_and_contents(tmp_path):
    for name, parts in {
        "a": {"x": b"1", "y/z": b"2"},
        "b": {"x": b"1", "y/z": b"2"},
        "c": {"x": b"2", "y/z": b"1"},
    }.items():
        for part, content in parts.items():
            (tmp_path / name / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / part).write_bytes(content)
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b") != sha256(tmp_path / "c")
    for name in "ac":
        (tmp_path / f"linked {name}").mkdir()
        (tmp_path / f"linked {name}" / "part").symlink_to(tmp_path / name)
    assert sha256(tmp_path / "linked a") != sha256(tmp_path / "linked c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        sha256(tmp_path / "empty")
