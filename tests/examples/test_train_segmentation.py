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
def test_tiny_run_trains(tmp_path, mode):
    done = run("--tiny", "--mode", mode, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "'mean_iou':" in done.stdout and "'iou_disc':" in done.stdout
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    assert (tmp_path / weights).is_file() and (tmp_path / "preprocessor_config.json").is_file()
    if mode == "lora":
        again = run("--tiny", "--mode", mode, "--out", str(tmp_path))
        assert again.returncode != 0 and "resume=True" in again.stderr
        resumed = run("--tiny", "--mode", mode, "--out", str(tmp_path), "--resume")
        assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_a_frozen_encoder_runs_once(tmp_path):
    options = ("--tiny", "--mode", "frozen", "--cache-features", str(tmp_path / "cache"))
    runs = [run(*options, "--out", str(tmp_path / name)) for name in ("one", "two")]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr + runs[1].stderr
    assert "Caching features" in runs[0].stderr and "Caching features" not in runs[1].stderr
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert first == second
