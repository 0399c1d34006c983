"""Kill training with SIGKILL at random moments, resume it, and compare the weights bit by bit with an unbroken run.

    python benchmarks/kill_resume.py --kills 20

Each resumed run sees random augmentation, data loader workers, dropout and BatchNorm. Every fourth kill comes while a
file of a checkpoint is half written. Exit status 1 if any bit differs.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

STEPS = 20


def kill_in_file(number: int) -> None:
    """Be killed when file `number` that torch writes is half on the disk."""
    import torch

    save, calls = torch.save, iter(range(1000))

    def half_save(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if next(calls) == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half_save


def train(output_dir: str, kill_step: int, kill_delay: float, kill_file: int, workers: int) -> None:
    """One process: train a tiny model, or be killed `kill_delay` seconds after step `kill_step` began."""
    import torch
    from transformers import TrainerCallback

    from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
    from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
    from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
    from vitweave.processing.augmentation import SegmentationAugmentation
    from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
    from vitweave.training.segmentation import train_segmentation
    from vitweave.training.segmentation_data import SegmentationDataset
    from vitweave.training.synthetic_shapes import SyntheticShapes

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == kill_step:
                threading.Timer(kill_delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    if kill_file >= 0:
        kill_in_file(kill_file)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.1}
    backbone = SpecializedViTConfig(**small, **drops, out_indices=[2, 3])
    config = DensePredictorConfig(backbone_config=backbone, num_labels=3, head_options={"dropout": 0.1})
    model = DensePredictorForSemanticSegmentation(config)
    processor = SegmentationImageProcessorPil(size=32)
    augmentation = SegmentationAugmentation(crop_size=32, color_jitter=0.3, vertical_flip=0.5, rotate=True)
    metrics = train_segmentation(
        model,
        SegmentationDataset(SyntheticShapes(14), processor, augmentation),
        SegmentationDataset(SyntheticShapes(4, seed=1), processor),
        processor,
        output_dir=output_dir,
        resume=True,
        callbacks=[Kill()],
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
        disable_tqdm=True,
        use_cpu=True,
    )
    kept = {name: value for name, value in metrics.items() if "iou" in name or "accuracy" in name}
    Path(output_dir, "kept_metrics.json").write_text(json.dumps(kept))


def launch(output_dir: Path, workers: int, kill_step: int = -1, kill_delay: float = 0.0, kill_file: int = -1) -> int:
    """Run `train` in a process of its own; its exit status."""
    options = {"train": output_dir, "workers": workers}
    options |= {"kill-step": kill_step, "kill-delay": kill_delay, "kill-file": kill_file}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode


def fingerprint(output_dir: Path) -> dict[str, str]:
    """Hashes of the best weights, the last checkpoint's weights, its optimiser moments, and the metrics."""
    import torch

    last = output_dir / f"checkpoint-{STEPS}"
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    moments = b"".join(t.numpy().tobytes() for state in optimizer.values() for t in state.values())
    parts = {
        "best weights": (output_dir / "model.safetensors").read_bytes(),
        "last weights": (last / "model.safetensors").read_bytes(),
        "optimiser": moments,
        "metrics": (output_dir / "kept_metrics.json").read_bytes(),
    }
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in parts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--kill-step", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--kill-delay", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--kill-file", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.train, args.kill_step, args.kill_delay, args.kill_file, args.workers)
        return 0

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        launch(whole, args.workers)
        expected, different = fingerprint(whole), 0
        print(f"unbroken run of {STEPS} steps: {expected}")
        for number in range(args.kills):
            broken, step, delay = Path(folder, f"broken-{number}"), rng.randrange(STEPS), rng.uniform(0.0, 0.3)
            if number % 4 == 1:  # 4 files to each of the 7 checkpoints
                file = rng.randrange(28)
                moment, status = f"in file {file}", launch(broken, args.workers, kill_file=file)
            else:
                moment, status = f"step {step} + {delay:.3f} s", launch(broken, args.workers, step, delay)
            killed = status != 0
            left = sorted(path.name for path in broken.glob("checkpoint-*"))
            launch(broken, args.workers)
            aside = sorted(path.name for path in broken.glob("incomplete-*"))
            same = fingerprint(broken) == expected
            different += not same
            print(
                f"kill {number + 1:2d}: {moment}, {'killed' if killed else 'finished first'}, "
                f"left {left}, set aside {aside}: {'identical' if same else 'DIFFERENT'}",
                flush=True,
            )
    print(f"{args.kills - different} of {args.kills} resumed runs are bit-identical to the unbroken one")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
