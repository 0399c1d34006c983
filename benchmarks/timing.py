"""Side-by-side measurements: variants run in turn, ratios pair by pair, medians reported."""

import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HELD = {True: "yes", False: "NO", None: ""}
RESULTS = Path(__file__).parent / "results"
START = time.perf_counter()


def keep_memory() -> None:
    """Start this script again with an allocator that keeps what was freed, as those of GPUs do.

    glibc gives large tensors back to the kernel and gets them page by page anew; that can be half of the time of what
    is measured, and most for forms that work on whole batches.
    """
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def interleaved(variants: dict[str, Callable], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the order turns around from round to round.

    Each runs once before, unless it has just run (`warm`).
    """
    for run in () if warm else variants.values():
        run()
    seconds = {name: [] for name in variants}
    for index in range(rounds):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Median of the round-by-round ratios ours / peer."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[peer], strict=True))


def on_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait for what was started on the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward_only(function: Callable, *inputs) -> Callable[[], None]:
    """A run of `function` without gradients, to its end."""
    import torch

    def run():
        with torch.no_grad():
            function(*inputs)
        synchronize()

    return run


def resident_mib() -> float:
    """Resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def mib_per_image(readings: list[float], batch: int) -> float:
    """The slope of resident memory that was read after every batch; the first fifth warms the allocator up."""
    import numpy as np

    kept = np.array(readings[len(readings) // 5 :])
    return np.polyfit(batch * np.arange(len(kept)), kept, 1)[0]


def peak_memory(code: str, threads: int = 2) -> float:
    """Peak resident memory in MiB of a fresh Python process that runs `code`."""
    script = f"import torch\ntorch.set_num_threads({threads})\n{code}\nimport resource\n"
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def peak_allocated(run: Callable) -> int:
    """Bytes that tensors made by `run` hold at most, beside those that were there before; on the GPU if there is one.

    On the CPU they are counted from the allocator's own record, so memory inside an operation counts, too: what forms
    that fuse operations differ in. `vitweave.analysis.peak_memory` counts what operations return, alike on every
    device and without a profiler, as a search over many models wants it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def processor_name() -> str:
    """As the kernel names it, without its marks."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def machine(device: str) -> dict:
    """Where and with what the figures are measured."""
    import torch
    import transformers

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}, {processor_name()}"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"device": where, "cores": cores, "threads": torch.get_num_threads(), "versions": versions}


def write_results(name: str, rows: list[dict], device: str = "cpu") -> None:
    """Print the rows as a table and keep them in results/<name>.json with the machine and versions they come from."""
    width = max(len(row["what"]) for row in rows)
    print(f"{'what':{width}}  {'ratio':>7}  {'demand':>8}  held")
    for row in rows:
        print(f"{row['what']:{width}}  {row['ratio']:7.3f}  {row['demand']:>8}  {HELD[row['held']]}")
    RESULTS.mkdir(exist_ok=True)
    facts = machine(device) | {"date": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - START)}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def row(what: str, value: float, demand: str = "") -> dict:
    """One line of a table; demand is like "<= 1.02" or ">= 10", or "" for a figure that stands there for comparison."""
    value = float(value)  # also of a NumPy number
    if not demand:
        return {"what": what, "ratio": round(value, 4), "demand": "", "held": None}
    sign, limit = demand.split()
    held = value <= float(limit) if sign == "<=" else value >= float(limit)
    return {"what": what, "ratio": round(value, 4), "demand": demand, "held": held}
