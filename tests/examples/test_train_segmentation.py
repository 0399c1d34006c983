"""The training example, as its own process with --tiny."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_segmentation.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_tiny_run_trains_and_resumes(tmp_path, mode):
    first = run("--tiny", "--mode", mode, "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "'mean_iou':" in first.stdout and "'iou_disc':" in first.stdout
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    assert (tmp_path / weights).is_file() and (tmp_path / "preprocessor_config.json").is_file()
    again = run("--tiny", "--mode", mode, "--out", str(tmp_path))
    assert again.returncode != 0 and "resume=True" in again.stderr
    assert run("--tiny", "--mode", mode, "--out", str(tmp_path), "--resume").returncode == 0
