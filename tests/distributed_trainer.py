"""What each process of a Trainer run does; a file of its own, so that spawned processes can import it."""

import os
from pathlib import Path

import torch
from distributed_heads import build, classes
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


class Pictures(Dataset):
    """Sixteen pictures with classes."""

    def __init__(self):
        batches = [classes(step) for step in range(4)]
        self.images, self.labels = (torch.cat([b[name] for b in batches]) for name in ("pixel_values", "labels"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def trained(folder: Path, batch_size: int, resume: Path | None = None, **options) -> torch.nn.Module:
    """A classifier after 6 steps of the stock Trainer, with a checkpoint after 3."""
    arguments = TrainingArguments(
        folder,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(build("classification"), arguments, train_dataset=Pictures())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.accelerator.unwrap_model(trainer.model)


def run_and_resume(rank: int, folder: str):
    """Six steps at once, and the last three of them again from the checkpoint."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    whole = trained(Path(folder, "whole"), 2, ddp_backend="gloo")
    save_file(whole.state_dict(), Path(folder, f"whole-{rank}.safetensors"))
    resumed = trained(Path(folder, "resumed"), 2, Path(folder, "whole", "checkpoint-3"), ddp_backend="gloo")
    save_file(resumed.state_dict(), Path(folder, f"resumed-{rank}.safetensors"))
