"""The detection example, as its own process with --tiny."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_detection.py"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pycocotools") is None, reason="needs pycocotools")
def test_tiny_run_trains(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'map':" in done.stdout and "'map_square':" in done.stdout
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "preprocessor_config.json").is_file()
