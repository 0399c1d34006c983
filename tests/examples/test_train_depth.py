"""The depth example, as its own process with --tiny."""

import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_depth.py"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "head"), [("frozen", "linear"), ("lora", "linear"), ("full", "dpt")])
def test_tiny_run_trains(tmp_path, mode, head):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--mode", mode, "--head", head, "--out", str(tmp_path / "run")]
    command += ["--cache_features", str(tmp_path / "features")] if mode == "frozen" else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'nyu_abs_rel':" in done.stdout
    assert PIL.Image.open(tmp_path / "run" / "predictions.png").height > 6 * 192
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    assert (tmp_path / "run" / weights).is_file() and (tmp_path / "run" / "preprocessor_config.json").is_file()
    assert any((tmp_path / "features").rglob("*.safetensors")) == (mode == "frozen")
