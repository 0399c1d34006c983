"""Kill the build of a feature cache with SIGKILL, build again, and compare every feature with an unbroken build's.

    python benchmarks/kill_cache_build.py --kills 20
    python benchmarks/kill_cache_build.py --together independent
    python benchmarks/kill_cache_build.py --together gloo

Two kills in four come at a random moment, one while a shard is half written, one between a shard's last byte and its
name. The second build must use every whole shard that was left, and leave no temporary file. `--together` lets two
processes fill one cache at once, each for itself or as a distributed run. Exit status 1 if anything differs.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training import feature_build, feature_shards
from vitweave.training.feature_cache import cache_features
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_shapes import SyntheticShapes

BATCH, SAMPLES_PER_SHARD = 2, 4
SPAWN = multiprocessing.get_context("fork")  # a fresh interpreter would spend its time on imports


def kill_in_shard(number: int, whole: bool) -> None:
    """Be killed in the writing of shard `number`, when it is half or when it only lacks its name."""
    calls = iter(range(10**6))

    def save_and_die(leaves, path, metadata):
        save_file(leaves, path, metadata)
        if next(calls) == number:
            if not whole:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    feature_shards.save_file = save_and_die


def build(folder: Path, images: int, workers: int, answer, delay=None, shard=None, whole=False, rank=None, port=0):
    """One process: fill the cache, or be killed; tells what came out."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if rank is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    if shard is not None:
        kill_in_shard(shard, whole)
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    backbone = SpecializedViTConfig(**small, out_indices=[2, 4])
    model = DensePredictorForSemanticSegmentation(
        DensePredictorConfig(backbone_config=backbone, num_labels=3, freeze_backbone=True)
    )
    encode, encoded = model.encode, []

    def counted(pixel_values):
        if delay is not None and not encoded:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        encoded.append(len(pixel_values))
        return encode(pixel_values)

    model.encode = counted
    feature_build.SHARD_BYTES = SAMPLES_PER_SHARD * (2 * 48 * 64 * 4 + 64 * 64 + 64)
    dataset = SegmentationDataset(SyntheticShapes(images, size=64), SegmentationImageProcessorPil(size=64))
    start = time.perf_counter()
    features = cache_features(model, dataset, folder, num_workers=workers, batch_size=BATCH)
    answer.put((fingerprint(features), sum(encoded), time.perf_counter() - start))
    if rank is not None:
        torch.distributed.destroy_process_group()


def fingerprint(features) -> str:
    """A hash of every feature and label."""
    digest = hashlib.sha256()
    for index in range(len(features)):
        sample = features[index]
        for tensor in (*sample["encoder_outputs"]["feature_maps"], sample["labels"]):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def launch(*options: dict) -> list[tuple[str, int, float] | None]:
    """Run `build` in processes of their own, at once; None for those that were killed."""
    started = []
    for each in options:
        answer = SPAWN.SimpleQueue()
        process = SPAWN.Process(target=build, kwargs={**each, "answer": answer})
        process.start()
        started.append((process, answer))
    answers = []
    for process, answer in started:
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a build ended with status {process.exitcode}")
        answers.append(answer.get() if process.exitcode == 0 else None)
    return answers


def left_in(folder: Path) -> tuple[int, int]:
    """How many shards and temporary files lie in a cache."""
    return len(list(folder.rglob("*.safetensors"))), len(list(folder.rglob(".*.tmp")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kills(folder: Path, number: int, job: dict, seed: int) -> int:
    """Kill `number` builds, finish each, and count those that end unlike the unbroken one."""
    ((expected, encoded, seconds),) = launch({"folder": folder / "whole", **job})
    shards, _ = left_in(folder / "whole")
    print(f"unbroken: {shards} shards, {encoded} images encoded in {seconds:.2f} s")
    rng, different = random.Random(seed), 0
    for attempt in range(number):
        place, moment = folder / f"broken-{attempt}", {"delay": rng.uniform(0, 0.9 * seconds)}
        if attempt % 4 in (1, 3):
            moment = {"shard": rng.randrange(shards), "whole": attempt % 4 == 3}
        (killed,) = launch({"folder": place, **job, **moment})
        whole, temporary = left_in(place)
        ((found, again, _),) = launch({"folder": place, **job})
        reused = job["images"] - again + (1 if again else 0)  # one image more, to find the size of its features
        lacking = (shards - whole) * SAMPLES_PER_SHARD
        good = found == expected and left_in(place) == (shards, 0) and reused >= job["images"] - lacking
        different += not good
        told = ", ".join(
            f"{name} {value:.3f}" if name == "delay" else f"{name} {value}" for name, value in moment.items()
        )
        left = f"left {whole} shards and {temporary} temporary files, {reused} of {job['images']} images reused"
        ended, verdict = "finished first" if killed else "killed", "identical" if good else "DIFFERENT"
        print(f"kill {attempt + 1:2d}: {told}, {ended}, {left}: {verdict}", flush=True)
    print(f"{number - different} of {number} caches are complete and identical to the unbroken one")
    return different


def two_at_once(folder: Path, how: str, job: dict) -> int:
    """Two processes fill one cache; whether any sees something else than one process by itself."""
    ((expected, encoded, _),) = launch({"folder": folder / "alone", **job})
    ranks = [{"rank": rank} for rank in range(2)] if how == "gloo" else [{}, {}]
    port = free_port()
    answers = launch(*({"folder": folder / "both", **job, **rank, "port": port} for rank in ranks))
    shares = [images for _, images, _ in answers]
    good = all(found == expected for found, _, _ in answers) and left_in(folder / "both") == left_in(folder / "alone")
    if how == "gloo":
        good = good and sum(shares) == encoded + 1 and min(shares) > encoded // 3
    print(f"{how}: {shares} of {job['images']} images encoded by the two: {'identical' if good else 'DIFFERENT'}")
    return int(not good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--together", choices=["independent", "gloo"])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="few images, for a test")
    args = parser.parse_args()
    job = {"images": 30 if args.tiny else args.images, "workers": args.workers}
    with tempfile.TemporaryDirectory() as folder:
        different = kills(Path(folder), args.kills, job, args.seed) if args.kills else 0
        different += two_at_once(Path(folder), args.together, job) if args.together else 0
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
