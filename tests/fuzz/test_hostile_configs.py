"""Malformed configs end in a valid config or in a readable error, within 1 s and 200 MiB each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[1] / "run_hostile_configs.py"
ROOT = RUNNER.parents[1]
SECONDS, MEBIBYTES = 1.0, 200  # of the processor, so that a busy machine does not count


def run(seed: int, first: int, count: int) -> list[dict]:
    """The outcomes of these cases, from a process of their own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUNNER), str(seed), str(first), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == count, f"the process ended in case {first + len(rows)}: {done.stderr[-500:]}"
    return rows


def check(rows: list[dict]) -> None:
    wrong = [row for row in rows if row["ended"] not in ("clean", "valid")]
    assert not wrong, wrong[:5]
    costly = [row for row in rows if row["seconds"] > SECONDS or row["mebibytes"] > MEBIBYTES]
    assert not costly, costly[:5]
    ended = {kind: sum(row["ended"] == kind for row in rows) for kind in ("clean", "valid")}
    assert min(ended.values()) > len(rows) // 10, ended  # neither refuses everything nor accepts everything


def test_some_malformed_configs_end_cleanly():
    check(run(seed=0, first=0, count=120))


@pytest.mark.slow
def test_five_thousand_malformed_configs_end_cleanly():
    check(run(seed=0, first=0, count=5000))
