"""The example of segmentation on two sensors, as its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_rgbx_segmentation.py"


@pytest.mark.slow
def test_dry_run_prints_every_subset(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--modality_dropout", "0.3", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for subset in ("mean_iou_rgb'", "mean_iou_depth'", "mean_iou_rgb+depth'"):
        assert subset in done.stdout
