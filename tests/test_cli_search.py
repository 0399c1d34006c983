"""`vitweave index` and `vitweave search`: what they print, and what they say when something is wrong."""

import json

import PIL.Image
import pytest
from tiny_retriever import TinyRetriever, tiny_processor

from vitweave import cli_search
from vitweave.cli import main


class Model(TinyRetriever):
    get_image_features = get_text_features = None


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Three figures, and a retriever that is loaded from anywhere."""
    monkeypatch.setattr(cli_search, "load_retriever", lambda name: (Model().eval(), tiny_processor(["a figure"])))
    lines = []
    for index in range(3):
        PIL.Image.new("RGB", (20, 10), (90 * index, 0, 0)).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"id": f"fig{index}", "image": f"{index}.png", "caption": f"Figure {index}."}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_index_and_search(data, capsys):
    assert main(["index", "model", str(data / "captions.jsonl"), str(data / "out"), "--device", "cpu"]) == 0
    assert "out: 3 images" in capsys.readouterr().out
    sheet = data / "sheet.png"
    assert main(["search", str(data / "out"), "A figure.", "--top", "2", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[0].startswith("  1  ") and "Figure" in out[0] and sheet.is_file()


def test_a_missing_image_stops_or_is_left_out(data, capsys):
    (data / "1.png").unlink()
    command = ["index", "model", str(data), str(data / "out"), "--device", "cpu"]
    assert main(command) == 2
    assert "1 of 3 images are missing: fig1" in capsys.readouterr().err
    assert main([*command, "--skip-missing"]) == 0
    assert "2 images, 1 missing ones left out" in capsys.readouterr().out


def test_a_folder_without_an_index(data, capsys):
    assert main(["search", str(data), "A figure."]) == 2
    assert "run vitweave index" in capsys.readouterr().err
