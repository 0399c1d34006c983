"""Several processes on one machine that talk over gloo."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn


def in_processes(function: Callable, folder: Path, *arguments, count: int = 2):
    """Run `function(rank, folder, *arguments)` in so many processes at once.

    It must be importable from a file of its own: each process starts a new interpreter. A folder serves once.
    """
    spawn(join_others, (count, function, str(folder), *arguments), nprocs=count)


def join_others(rank: int, count: int, function: Callable, folder: str, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=count, timeout=timedelta(seconds=120)
    )
    try:
        function(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()
