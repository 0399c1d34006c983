"""`make demo`, shortened: every file is written, and the Otsu baseline keeps its published value."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_otsu_finds_the_nuclei_whatever_side_they_are_on(demo):
    grey = np.full((16, 16), 30, dtype=np.uint8)
    grey[4:10, 5:12] = 200
    bright, dark = (demo.otsu(PIL.Image.fromarray(pixels)) for pixels in (grey, 255 - grey))
    assert np.array_equal(bright, dark)
    assert (bright[5:9, 6:11] == 1).all() and (bright == 1).sum() == 4 * 5
    assert bright[4, 5] == bright[3, 5] == 2  # one pixel inside the edge, one outside
    assert bright[0, 0] == 0


def test_otsu_baseline_on_the_test_images(demo):
    samples = demo.read("test")
    assert len(samples) == 60
    baseline = demo.score([demo.otsu(sample["picture"]) for sample in samples], samples)
    assert baseline["mean_iou"] == pytest.approx(0.6427, abs=1e-4)


@pytest.mark.slow
def test_the_demo_runs_to_its_last_line(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, str(DEMO), "--tiny", "--out", str(out)]
    run = subprocess.run(command, cwd=DEMO.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"test mIoU: 0\.\d{3}", run.stdout.splitlines()[-1])
    assert (out / "model" / "model.safetensors").is_file() and (out / "export" / "README.md").is_file()
    command = [sys.executable, "-m", "vitweave.cli", "verify", str(out / "export"), "--data", f"cells={out / 'cells'}"]
    again = subprocess.run([*command, "--tolerance", "1e-6"], cwd=DEMO.parents[1], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "mIoU on cells, test: 0." in again.stdout and "recomputed 0." in again.stdout
    width, height = PIL.Image.open(out / "report.png").size
    assert (width, height) == (4 * 256, 256)
