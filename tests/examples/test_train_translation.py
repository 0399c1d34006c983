"""The example of image-to-image translation, as its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_translation.py"


@pytest.mark.slow
def test_dry_run_prints_its_figures(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--adversarial", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for figure in ("mae", "mse", "psnr", "ssim"):
        assert f"'{figure}'" in done.stdout
