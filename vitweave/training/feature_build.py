"""Compute the features that a cache lacks: images through the frozen encoder, in one or more processes."""

import inspect
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from vitweave.training.feature_shards import shard_name, write_shard
from vitweave.training.modes import evaluating
from vitweave.training.parameter_groups import find_encoder

SHARD_BYTES = 64 * 2**20  # what a kill can cost
SHARD_SAMPLES = 4096


def flatten(value, name: str, leaves: dict[str, Tensor]):
    """Move the tensors of nested dicts and sequences to `leaves`; the same nest with the tensors' names comes back."""
    if isinstance(value, Tensor):
        leaves[name] = value
        return name
    if isinstance(value, dict):
        return {key: flatten(entry, f"{name}.{key}" if name else str(key), leaves) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [flatten(entry, f"{name}.{index}", leaves) for index, entry in enumerate(value)]
    raise ValueError(f"expected tensors in dicts and tuples to cache, got {type(value).__name__} at {name!r}")


def assemble(structure, leaves: dict[str, Tensor]):
    """The opposite of `flatten`; sequences become tuples."""
    if isinstance(structure, dict):
        return {key: assemble(entry, leaves) for key, entry in structure.items()}
    if isinstance(structure, list):
        return tuple(assemble(entry, leaves) for entry in structure)
    return leaves[structure]


def memory_order(leaf: Tensor) -> list[int]:
    """The axes from the widest step in memory to the smallest, the first axis being the batch.

    Kernels choose their way by it, and with it the last bits of their sums: a map that is a view of tokens must come
    out of the cache as one.
    """
    return [0, *sorted(range(1, leaf.ndim), key=lambda axis: -leaf.stride(axis))]


class IndexedItems(Dataset):
    """(index, item) of a dataset, so that a batch knows its samples."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, dict]:
        item = self.dataset[index]
        return index, {
            name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in item.items()
        }


def stack_alike(samples: list[tuple[int, dict]]) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Stack the samples of a batch, those of different shapes in batches of their own."""
    alike: dict[tuple, list] = {}
    for index, item in samples:
        shapes = tuple((name, value.dtype, value.shape) for name, value in sorted(item.items()))
        alike.setdefault(shapes, []).append((index, item))
    return [
        ([index for index, _ in group], {name: torch.stack([item[name] for _, item in group]) for name in group[0][1]})
        for group in alike.values()
    ]


class ShardBuffer:
    """Samples of one shape on their way into a shard."""

    def __init__(self, capacity: int, leaves: dict[str, Tensor], layout: dict):
        self.layout, self.keys = layout, []
        self.leaves = {name: leaf.new_empty((capacity, *leaf.shape[1:]), device="cpu") for name, leaf in leaves.items()}

    def add(self, keys: list[str], leaves: dict[str, Tensor]) -> None:
        start, end = len(self.keys), len(self.keys) + len(keys)
        for name, leaf in leaves.items():
            self.leaves[name][start:end].copy_(leaf)
        self.keys += keys

    def write(self, folder: Path) -> Path:
        filled = {name: leaf[: len(self.keys)] for name, leaf in self.leaves.items()}
        return write_shard(folder, self.keys, filled, self.layout)


class FeatureBuilder:
    """Writes the features of some samples of a dataset into a folder of shards.

    Args:
        model: anything with `encode(pixel_values)`; what else of an item `encode` takes by name (`patch_mask`) it gets,
            and the item is not stored beside its output.
        keys: of every sample of the dataset.
        dtype: for floating point features; None keeps what the encoder gives.
    """

    def __init__(self, model, dataset, keys: list[str], folder: Path, dtype: torch.dtype | None, batch_size: int):
        self.model, self.dataset, self.keys, self.folder = model, dataset, keys, folder
        self.dtype, self.batch_size, self.samples_per_shard = dtype, batch_size, batch_size
        self.device = next((tensor.device for tensor in find_encoder(model).parameters()), torch.device("cpu"))

    def encode(self, item: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
        """Features and labels of a batch as they are stored, axes in memory order, and their layout."""
        if "pixel_values" not in item:
            raise ValueError(f"expected items with pixel_values to cache, got {sorted(item)}")
        leaves: dict[str, Tensor] = {}
        read = [name for name in inspect.signature(self.model.encode).parameters if name in item]
        outputs = self.model.encode(**{name: item[name].to(self.device, non_blocking=True) for name in read})
        structure = {"encoder_outputs": flatten(outputs, "encoder_outputs", leaves)}
        described = {name: {"dtype": str(leaf.dtype), "order": memory_order(leaf)} for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            dtype = self.dtype if self.dtype is not None and leaf.is_floating_point() else leaf.dtype
            leaves[name] = leaf.permute(described[name]["order"]).to(dtype)
        for name in sorted(item.keys() - set(read)):
            leaves[name] = item[name]
            structure[name] = name
            described[name] = {"dtype": str(item[name].dtype), "order": list(range(item[name].ndim))}
        return leaves, {"structure": structure, "leaves": described}

    def measure(self, missing: list[int]) -> int:
        """Bytes of these samples on disk, told from the first one's features; sets how many make a shard."""
        with evaluating(self.model):
            leaves, layout = self.encode(stack_alike([IndexedItems(self.dataset)[missing[0]]])[0][1])
        # whole numbers are narrowed in the shard: class ids to one byte
        sizes = {name: leaf.nbytes if leaf.is_floating_point() else leaf.numel() for name, leaf in leaves.items()}
        size = sum(sizes.values()) + 32
        samples = min(SHARD_SAMPLES, max(1, SHARD_BYTES // size))
        self.samples_per_shard = max(samples - samples % self.batch_size, min(samples, self.batch_size))
        header = 400 + 120 * len(leaves) + len(json.dumps(json.dumps(layout)))
        return size * len(missing) + header * len(self.chunks(missing))

    def chunks(self, missing: list[int]) -> list[list[int]]:
        """The samples of every shard to write."""
        step = self.samples_per_shard
        return [missing[start : start + step] for start in range(0, len(missing), step)]

    def batches(self, chunks: list[list[int]]) -> Iterator[list[int]]:
        """Indices batch by batch; a shard that another process has written meanwhile is passed over."""
        for chunk in chunks:
            if not (self.folder / shard_name([self.keys[index] for index in chunk])).exists():
                yield from (chunk[start : start + self.batch_size] for start in range(0, len(chunk), self.batch_size))

    def build(self, chunks: list[list[int]], num_workers: int = 0) -> None:
        """Encode and write these chunks; the shards are written beside the encoding of the next ones."""
        chunk_of = {index: number for number, chunk in enumerate(chunks) for index in chunk}
        loader = DataLoader(
            IndexedItems(self.dataset),
            batch_sampler=self.batches(chunks),
            num_workers=num_workers,
            collate_fn=stack_alike,
            generator=torch.Generator(),  # the global one must give the training the same numbers as without a cache
        )
        bar = logging.tqdm(total=len(chunk_of), desc="Caching features", unit="image", disable=processes()[0] != 0)
        buffers: dict[str, ShardBuffer] = {}
        with bar, evaluating(self.model), ShardWriter(self.folder) as writer:
            for groups in loader:
                chunk = chunks[chunk_of[groups[0][0][0]]]
                for indices, item in groups:
                    self.add(indices, item, buffers, len(chunk))
                    bar.update(len(indices))
                if sum(len(buffer.keys) for buffer in buffers.values()) == len(chunk):
                    writer.write(buffers)
                    buffers = {}

    def add(self, indices: list[int], item: dict[str, Tensor], buffers: dict[str, ShardBuffer], capacity: int) -> None:
        """Encode a batch into the buffer for its shape."""
        leaves, layout = self.encode(item)
        kind = repr([layout, [(name, leaf.shape[1:]) for name, leaf in leaves.items()]])
        if kind not in buffers:
            buffers[kind] = ShardBuffer(capacity, leaves, layout)
        buffers[kind].add([self.keys[index] for index in indices], leaves)


class ShardWriter:
    """Writes shards in a thread of its own, one at a time, so that no more than two lie in memory."""

    def __init__(self, folder: Path):
        self.folder, self.threads = folder, ThreadPoolExecutor(max_workers=1)
        self.under_way: list[Future] = []

    def write(self, buffers: dict[str, ShardBuffer]) -> None:
        self.wait()
        self.under_way = [self.threads.submit(buffer.write, self.folder) for buffer in buffers.values()]

    def wait(self) -> None:
        """Until what is under way is on the disk; an error of it is raised here."""
        for future in self.under_way:
            future.result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        try:
            self.wait()
        finally:
            self.threads.shutdown()


def processes() -> tuple[int, int]:
    """(rank, number) of the processes of this run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def anywhere(flags: Tensor) -> Tensor:
    """Flags that are set in any process of this run, (n,) in all of them."""
    if processes()[1] == 1:
        return flags
    counts = flags.to(device="cuda" if dist.get_backend() == "nccl" else "cpu", dtype=torch.int32)
    dist.all_reduce(counts)
    return counts.cpu() > 0


@contextmanager
def together():
    """A step that all processes of a run take and finish together; the error of one ends it for all."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = bool(anywhere(torch.tensor([error is not None])))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("another process could not build its share of the feature cache; its error says why")


def share_of(chunks: list[list[int]]) -> list[list[int]]:
    """What this process builds: its part of a distributed run; by itself all, from a random one on, so that two
    independent processes that fill one cache seldom do the same work."""
    rank, number = processes()
    if number > 1:
        return chunks[rank::number]
    first = secrets.randbelow(len(chunks)) if chunks else 0
    return chunks[first:] + chunks[:first]
