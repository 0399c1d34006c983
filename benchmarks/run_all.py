"""Measure all that README and the documentation tell about cost, script by script, and write the figures anew.

    make bench
    python benchmarks/run_all.py [NAME ...] [--tiny]

Each script runs in a process of its own and leaves `results/*.json`. One that fails does not stop the others; its
figures stay what they were, and the exit status is 1. `--tiny` runs every script as a trial that keeps no results.
`kill_resume.py` and `kill_cache_build.py` measure nothing: they have an exit status of their own, and tests run them.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from render_tables import render_pages

FOLDER = Path(__file__).parent
SCRIPTS = (
    "import_time",
    "segmentation_metrics",
    "depth_metrics",
    "specialized_vit",
    "layer_fusions",
    "encoder_fusions",
    "modality_fusions",
    "modality_models",
    "feature_cache",
    "fusion_cache",
    "encoder_cache",
)


def run_scripts(names: list[str], options: list[str]) -> list[str]:
    """The names of those that failed."""
    failed = []
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        start = time.monotonic()
        status = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *options]).returncode
        print(f"[{number}/{len(names)}] {name}: {time.monotonic() - start:.0f} s, exit status {status}", flush=True)
        failed += [name] if status else []
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(SCRIPTS)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="a dry run in minutes that writes nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(SCRIPTS))
    if unknown:
        parser.error(f"unknown scripts {unknown}; known: {', '.join(SCRIPTS)}")
    failed = run_scripts(args.names or list(SCRIPTS), ["--tiny"] if args.tiny else [])
    if not args.tiny:
        print(*(f"written anew: {page}" for page in render_pages()), sep="\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
