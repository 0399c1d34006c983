"""What every test gets: fixed seeds, two threads at most, no network."""

import gc
import os
import random
import socket
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or datasets is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import toy_composite.py and model_checks.py from here
torch.set_num_threads(min(2, torch.get_num_threads()))

LOOPBACK = ("127.", "::1", "localhost")
connect = socket.socket.connect


def connect_locally(self: socket.socket, address):
    """Stand in for socket.connect: loopback and Unix sockets pass, the rest of the world does not."""
    if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
        raise RuntimeError(f"a test tried to reach {address[0]!r}; tests run without a network")
    return connect(self, address)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Refuse every connection that leaves this machine."""
    monkeypatch.setattr(socket.socket, "connect", connect_locally)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same seeds."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: each `Trainer.train` and compilation asks for a full one."""
    gc.collect()
    gc.freeze()
