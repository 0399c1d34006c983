"""The retrieval example, as its own process with --tiny."""

import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_retrieval.py"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--fusion", "film", "--test"], ["--local_loss_weight", "0", "--loss", "siglip"]])
def test_tiny_run_trains_and_searches(tmp_path, options):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--tiny", "--out", str(out), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^RSUM \d+\.\d \(\d+\.\d to \d+\.\d\)$", done.stdout, re.MULTILINE)
    aligned = "siglip" not in options
    assert ("pointing accuracy" in done.stdout) == ("combined_RSUM" in done.stdout) == aligned
    assert (out / "heat_maps.png").is_file() == aligned
    assert PIL.Image.open(out / "found.png").width > 5 * 220
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
