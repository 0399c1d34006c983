"""What each process of a two-process training runs; a file of its own, so that spawned processes can import it."""

from pathlib import Path

import torch
from retrieval_models import pairs, retriever
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from vitweave.training.cached_gradients import cache_gradients

STEPS = 3
COUNTS = (3, 2)  # pairs per process: a last batch need not divide evenly
LENGTHS = (9, 12)  # tokens of the longest text of each process
VARIANTS = {  # name -> chunk size, options of the model
    "infonce": (None, {}),
    "siglip-cached": (2, {"contrastive_loss": "siglip", "duplicate_captions": "positives"}),
}


def joint_batch(step: int) -> dict[str, torch.Tensor]:
    """What one process sees; one caption occurs in both shards, and one sample has no sentences."""
    inputs = pairs(sum(COUNTS), seed=step, length=max(LENGTHS))
    short = slice(0, COUNTS[0])
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("sentence_ids", -1)):
        inputs[name][short, min(LENGTHS) :] = fill
        inputs[name][3] = inputs[name][0]
    inputs["sentence_ids"][1] = -1
    return inputs


def shard(inputs: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The rows of one process, its texts cut to its own longest."""
    rows = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    return {
        name: value[rows] if name == "pixel_values" else value[rows, : LENGTHS[rank]] for name, value in inputs.items()
    }


def train(model: torch.nn.Module, batches: list[dict]) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_process(rank: int, folder: str):
    for name, (chunk_size, options) in VARIANTS.items():
        model = cache_gradients(retriever(**options).train(), chunk_size)
        losses = train(DistributedDataParallel(model), [shard(joint_batch(step), rank) for step in range(STEPS)])
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(state | {"losses": torch.tensor(losses)}, Path(folder, f"{name}-{rank}.safetensors"))
