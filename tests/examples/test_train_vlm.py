"""The vision-language example, as its own process with --tiny."""

import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_vlm.py"


@pytest.mark.slow
def test_tiny_run_trains_both_stages_and_resumes(tmp_path):
    out, features = tmp_path / "run", tmp_path / "features"
    command = [sys.executable, str(EXAMPLE), "--tiny", "--out", str(out), "--cache_features", str(features)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = r"^stage (\d): validation loss per token ([\d.]+) before, ([\d.]+) after$"
    found = re.findall(pattern, done.stdout, re.MULTILINE)
    assert [stage for stage, *_ in found] == ["1", "2"]
    assert all(float(after) < float(before) for _, before, after in found)
    assert done.stdout.count("true: (a)") == 4 and PIL.Image.open(out / "captions.png").width > 4 * 200
    assert (out / "stage-2" / "model.safetensors").is_file() and (out / "stage-2" / "captions-12.png").is_file()
    assert any(features.rglob("*.safetensors"))
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert re.findall(pattern, again.stdout, re.MULTILINE) == found
