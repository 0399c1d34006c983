"""Run some cases of `hostile_configs.py`, one after the other, and tell of each how it ended.

    python tests/run_hostile_configs.py SEED FIRST COUNT        prints one line of JSON per case

Each must end in a valid config, or in an error of a usual kind with a message; a valid one may be built without memory.
"""

import json
import random
import resource
import signal
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from hostile_configs import case, config_class_of
from huggingface_hub.errors import StrictDataclassError
from memory_use import reset_peak, resident
from transformers.utils import logging

from vitweave.auto import FAMILIES

CLEAN = (ValueError, TypeError, OSError, ImportError, NotImplementedError, StrictDataclassError)
MEBIBYTE = 2**20
WALL_SECONDS = 20  # then a case counts as hanging


class Hanging(BaseException):
    pass


def interrupt(*_):
    raise Hanging(f"no end after {WALL_SECONDS} s")


def model_class_of(config_class: type, number: int) -> type:
    models = next(models for known, models, _ in FAMILIES if known is config_class)
    return list(models.values())[number % len(models)]


def outcome(family: str, entries: dict, number: int) -> tuple[str, str]:
    """What became of a case, and the message."""
    try:
        kind = config_class_of(family)
        config = kind.from_dict(entries)
        config.to_json_string()
        with torch.device("meta"):
            model_class_of(kind, number // 8)(config)
    except CLEAN as error:
        message = str(error)
        readable = 8 < len(message) < 4000
        return ("clean" if readable else "unreadable", f"{type(error).__name__}: {message}")
    except BaseException as error:
        return "bad", f"{type(error).__name__}: {error!s:.500}"
    return "valid", ""


def main(seed: int, first: int, count: int) -> None:
    logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, interrupt)
    for family in sorted({case(seed, n)[0] for n in range(8)}):
        outcome(family, {}, 0)  # imports count for no case
    used = int(resident("VmSize")) + 2048
    resource.setrlimit(resource.RLIMIT_AS, (used * MEBIBYTE, used * MEBIBYTE))
    for number in range(first, first + count):
        family, entries = case(seed, number)
        random.seed(0)
        reset_peak()
        before, start = resident("VmRSS"), time.process_time()
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            ended, message = outcome(family, entries, number)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, grown = time.process_time() - start, resident("VmHWM") - before
        told = {"case": number, "family": family, "ended": ended, "message": message[:600]}
        print(json.dumps(told | {"seconds": round(seconds, 3), "mebibytes": round(grown)}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
