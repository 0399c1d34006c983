"""The example of image-to-image translation, as its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fusion_searches import encoder_folder

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_translation.py"


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_dry_run_prints_its_figures(tmp_path, pretrained):
    command = [sys.executable, str(EXAMPLE), "--tiny", "--adversarial", "--out", str(tmp_path / "run")]
    if pretrained:
        command += ["--encoder", encoder_folder(tmp_path), "--encoder_lr_scale", "0.1", "--fusion", "gemini"]
        command += ["--decoder_size", "16"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for figure in ("mae", "mse", "psnr", "ssim"):
        assert f"'{figure}'" in done.stdout
