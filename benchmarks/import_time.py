"""What `import vitweave` adds to importing the transformers classes it extends, in fresh processes.

python benchmarks/import_time.py [--rounds 7] [--tiny]
"""

import argparse
import statistics
import subprocess
import sys
import time

from timing import row, write_results

# The classes vitweave derives from or registers with, imported as any script with a segmentation model does.
EXTENDED = """
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForSemanticSegmentation, Dinov2Backbone, Dinov2Config
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
"""


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="one round that keeps no results")
    args = parser.parse_args()
    rounds, warm = (1, 0) if args.tiny else (args.rounds, 1)
    pairs = [(seconds(EXTENDED + "import vitweave"), seconds(EXTENDED)) for _ in range(rounds + warm)][warm:]
    added = statistics.median(ours - peer for ours, peer in pairs)
    rows = [row("import vitweave, added seconds", added, "<= 0.5")]
    if args.tiny:
        print(*rows, sep="\n")
    else:
        write_results("import_time", rows)


if __name__ == "__main__":
    main()
