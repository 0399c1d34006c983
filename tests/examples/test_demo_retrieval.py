"""`make demo-retrieval`, shortened: it trains, loads the model back, searches, and tells what chance would give."""

import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_retrieval.py"


@pytest.mark.slow
def test_the_demo_runs_to_its_last_line(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, str(DEMO), "--tiny", "--out", str(out), "--query", "a curve", "a cell"]
    run = subprocess.run(command, cwd=DEMO.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    last = run.stdout.splitlines()[-1]
    assert re.fullmatch(r"a random order +8\.3 +41\.7 +83\.3 +25\.9", last), last  # 1, 5 and 10 of 12; mean of 1 / rank
    assert (out / "model" / "model.safetensors").is_file() and (out / "index").is_dir()
    assert all(PIL.Image.open(out / f"found-{number}.png").width > 1000 for number in (1, 2))
