"""A frozen encoder's features on disk: computed once, they train heads without running the encoder again."""

import json
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from vitweave.training.feature_build import FeatureBuilder, anywhere, assemble, processes, share_of, together
from vitweave.training.feature_keys import SampleKeys, digest_of, digests_of, encoder_ingredients
from vitweave.training.feature_shards import (
    Shard,
    make_room,
    mark_used,
    number_of_bytes,
    open_or_remove,
    open_shard,
    read_keys,
    remove_orphans,
)
from vitweave.training.modes import modes_kept
from vitweave.training.parameter_groups import find_encoder

logger = logging.getLogger(__name__)


class StackedSamples(Sequence):
    """The samples of a batch that was read in one go; `collate` takes it as it is instead of stacking it again."""

    def __init__(self, batch: dict, length: int):
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return select(self.batch, index)


def select(value, index: int):
    """One sample of a stacked nest."""
    if isinstance(value, dict):
        return {name: select(entry, index) for name, entry in value.items()}
    return tuple(select(entry, index) for entry in value) if isinstance(value, tuple) else value[index]


def stack(values: list):
    """Nested dicts and tuples of tensors, one per sample, as one nest of batches."""
    if isinstance(values[0], dict):
        return {name: stack([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack(list(entries)) for entries in zip(*values, strict=True))
    return torch.stack(values)


class FeatureCollator:
    """Collates cached samples, and leaves those that come from images to `images`.

    One run can mix both: features for evaluation, augmented images for training.
    """

    def __init__(self, images: Callable | None = None):
        self.images = images

    def __call__(self, samples) -> dict:
        if isinstance(samples, StackedSamples):
            return samples.batch
        if self.images is None or "encoder_outputs" in samples[0]:
            return stack(list(samples))
        return self.images(samples)


class CachedFeatures(Dataset):
    """`{"encoder_outputs": nested dict and tuples of tensors, "labels": ...}` per sample, read from mapped files.

    A data loader gets whole batches at once. What it gives a model is, bit by bit and in its layout in memory, what
    `model.encode` gave when the cache was built. Reading is so cheap that data loader workers, which must send every
    batch to the main process, only slow it down.

    Args:
        shards: opened or only as paths.
        places: (samples, 2), the shard and the row of every sample.
    """

    instances: "weakref.WeakSet[CachedFeatures]" = weakref.WeakSet()

    def __init__(self, shards: list[Shard], places: Tensor):
        self.paths, self.places = [shard.path for shard in shards], places
        self.opened: list[Shard | None] = list(shards)
        self.names: frozenset[str] | None = None
        CachedFeatures.instances.add(self)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": [None] * len(self.paths)}  # mappings stay in their process

    def __len__(self) -> int:
        return len(self.places)

    def only(self, names: Collection[str]) -> "CachedFeatures":
        """The same samples with these entries of their `encoder_outputs` alone; the others are not read."""
        other = copy(self)
        other.opened, other.names = list(self.opened), frozenset(names)
        CachedFeatures.instances.add(other)
        return other

    def structure(self, layout: dict) -> dict:
        """The nest of the leaves' names, without the entries that are not asked for."""
        whole = layout["structure"]
        if self.names is None:
            return whole
        kept = {name: part for name, part in whole["encoder_outputs"].items() if name in self.names}
        return {**whole, "encoder_outputs": kept}

    def shard(self, number: int) -> Shard:
        if self.opened[number] is None:
            self.opened[number] = open_shard(self.paths[number])
        return self.opened[number]

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> StackedSamples:
        places = self.places[indices].tolist()
        shards = [self.shard(number) for number, _ in places]
        rows = [row for _, row in places]
        first = shards[0]
        others = {id(shard): shard for shard in shards if shard is not first}.values()
        for shard in others:
            if shard.layout != first.layout or shard.row_shapes != first.row_shapes:
                raise ValueError(
                    f"expected features of one size in a batch, got {first.row_shapes} and {shard.row_shapes}; set the "
                    "processor's size and do_resize=True, or use batch size 1"
                )
        leaves, structure = {}, self.structure(first.layout)
        for name in ends_of(structure):
            about = first.layout["leaves"][name]
            if others:
                leaf = torch.stack([shard.leaves[name][row] for shard, row in zip(shards, rows, strict=True)])
            else:
                leaf = first.leaves[name].index_select(0, torch.tensor(rows))
            order = about["order"]
            leaf = leaf.to(getattr(torch, about["dtype"].removeprefix("torch.")))
            leaves[name] = leaf.permute([order.index(axis) for axis in range(len(order))])
        return StackedSamples(assemble(structure, leaves), len(rows))


def ends_of(structure) -> Iterator[str]:
    """The names at the ends of nested dicts and lists."""
    if isinstance(structure, str):
        yield structure
    else:
        for part in structure.values() if isinstance(structure, dict) else structure:
            yield from ends_of(part)


def why_random(dataset) -> str | None:
    """Why the items of a dataset are not the same in every epoch, or None if nothing says so."""
    parts = [dataset]
    for part in parts:  # torch's Subset and ConcatDataset hold others
        inner = [getattr(part, "dataset", None), *(getattr(part, "datasets", None) or [])]
        parts += [entry for entry in inner if entry is not None]
        augmentation = getattr(part, "augmentation", None)
        if augmentation is not None:
            return f"its {type(augmentation).__name__} gives other images in every epoch"
    return None


def check_frozen(model: nn.Module) -> None:
    """Refuse a model whose encoder would give other features after a step of training."""
    if not hasattr(model, "encode"):
        raise ValueError(f"expected a model with `encode(pixel_values)`, got {type(model).__name__}")
    encoder = find_encoder(model)
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    adapters = [name for name, module in encoder.named_modules() if is_adapter(module)]
    if trained or adapters:
        what = f"{len(trained)} of its parameters are trained" if trained else "it holds adapters"
        raise ValueError(
            f"expected a frozen encoder, whose features stay the same, but {what} (e.g. {(trained + adapters)[0]}); "
            "freeze it (freeze_backbone=True, or merge the adapter), or train without cache_features"
        )
    moving = [name for name in in_train_mode(model, encoder) if acts_in_training(encoder.get_submodule(name))]
    if moving:
        raise ValueError(
            f"expected an encoder that stays in eval mode during training, but {moving[0]} (dropout or batch "
            "statistics) is switched to train mode by model.train(); use freeze_backbone=True, or set its rate to 0"
        )


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT has put a low-rank update or the like around a layer."""
    return any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__)


def in_train_mode(model: nn.Module, encoder: nn.Module) -> list[str]:
    """The modules of the encoder that `model.train()` switches to train mode; the model is left as it was."""
    with modes_kept(model):
        model.train()
        return [name for name, module in encoder.named_modules() if module.training]


def acts_in_training(module: nn.Module) -> bool:
    """Whether a module does something else in train mode: dropout, dropped paths, batch statistics."""
    rates = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    rates += [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else []
    return any(rate > 0 for rate in rates) or isinstance(module, nn.modules.batchnorm._BatchNorm)


def sample_keys(dataset, encoder_key: str, num_workers: int) -> list[str]:
    """The key of every sample; of a dataset whose items are hashed, the first must come out alike twice."""
    keys = SampleKeys(dataset, encoder_key)
    if keys.from_items and len(keys) and keys[0] != keys[0]:
        raise ValueError(f"expected a {type(dataset).__name__} with the same items every time; its first item changes")
    generator = torch.Generator()  # a loader draws from the global one otherwise
    loader = DataLoader(keys, batch_size=64, num_workers=num_workers, collate_fn=list, generator=generator)
    return [key for batch in loader for key in batch]


class FeatureFolder:
    """`<root>/<encoder key>/`: the shards of one encoder."""

    def __init__(self, root: Path, ingredients: dict[str, str]):
        self.root, self.ingredients = root, ingredients
        self.path = root / digest_of(ingredients)

    def prepare(self) -> None:
        """Make the folder, with what its key was made from beside the shards."""
        try:
            if not self.path.is_dir():
                self.tell_difference()
                self.path.mkdir(parents=True)
                (self.path / "encoder.json").write_text(json.dumps(self.ingredients, indent=1))
        except FileExistsError:
            return  # another process made it
        except OSError as error:
            raise OSError(f"the feature cache {self.root} lacks this encoder and cannot be written: {error}") from error

    def tell_difference(self) -> None:
        """Say in the log why the caches that are there are of no use."""
        for path in self.root.glob("*/encoder.json"):
            try:
                other = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            changed = sorted(name for name in self.ingredients if other.get(name) != self.ingredients[name])
            logger.info(f"{path.parent} holds features of another encoder; different: {', '.join(changed)}")

    def open(self, keys: list[str]) -> CachedFeatures | set[str]:
        """The samples with these keys, or those of the keys that are not there."""
        for folder in self.root.glob("*"):
            remove_orphans(folder)
        wanted = set(keys)
        paths = sorted(self.path.glob("*.safetensors"))
        chosen = [path for path in paths if not wanted.isdisjoint(found := read_keys(path)) or not found]
        with ThreadPoolExecutor(max_workers=2) as threads:  # hashing releases the interpreter
            shards = [shard for shard in threads.map(open_or_remove, chosen) if shard is not None]
        where = {key: (n, row) for n, shard in enumerate(shards) for row, key in enumerate(shard.keys)}
        lacking = wanted - where.keys()
        if lacking:
            return lacking
        mark_used([shard.path for shard in shards])
        return CachedFeatures(shards, torch.tensor([where[key] for key in keys]).reshape(-1, 2))

    def in_use(self, keys: list[str]) -> set[Path]:
        """Shards with samples of this run, and those that datasets of this process read."""
        wanted = set(keys)
        ours = {path for path in self.path.glob("*.safetensors") if not wanted.isdisjoint(read_keys(path))}
        return ours.union(*(dataset.paths for dataset in CachedFeatures.instances))


def cache_features(
    model: nn.Module,
    dataset,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    size_limit: int | str | None = None,
    num_workers: int = 0,
    batch_size: int = 16,
):
    """The features of a dataset's images by a frozen encoder, from `folder`, where those that lack are added first.

    Found are only features made from the same image and label bytes by the same weights, options, code and versions
    (`feature_keys`); whatever differs is computed anew. A killed build goes on where it was; broken files are named in
    the log and rebuilt. Several processes may build at once; those of a distributed run divide the work.

    Args:
        model: has `encode(pixel_values)`, whose nested dicts and tuples of tensors are cached, and takes them as
            `forward(encoder_outputs=..., labels=...)`.
        dataset: items with `pixel_values`; everything else in them, e.g. the labels, is cached too. One that augments
            at random comes back as it is.
        dtype: to store floating point features in; they are read back in the encoder's own. None is exact.
        size_limit: bytes, or "20GB": of all caches in `folder`. Least recently used shards go first, those of this run
            never.
        num_workers: data loader workers that decode images during the build.
    """
    reason = why_random(dataset)
    if reason is not None:
        logger.warning(f"the features of this {type(dataset).__name__} are not cached: {reason}")
        return dataset
    check_frozen(model)
    if not len(dataset):
        raise ValueError(f"expected images to cache, got an empty {type(dataset).__name__}")
    limit = number_of_bytes(size_limit)
    ingredients = digests_of(encoder_ingredients(model, getattr(dataset, "processor", None), dtype))
    cache = FeatureFolder(Path(folder).absolute(), ingredients)
    keys = sample_keys(dataset, cache.path.name, num_workers)
    builder = FeatureBuilder(model, dataset, keys, cache.path, dtype, batch_size)
    for _ in range(3):  # another process may evict or break what was just written
        with together():
            found = cache.open(keys)
        missing = lacking_anywhere(keys, found)
        if not missing:
            return found
        with together():
            cache.prepare()
            new = builder.measure(missing)
            if processes()[0] == 0:
                make_room(cache.root, cache.path, new, limit, cache.in_use(keys))
        with together():
            builder.build(share_of(builder.chunks(missing)), num_workers)
    found = cache.open(keys)
    if isinstance(found, CachedFeatures):
        return found
    raise OSError(
        f"{len(found)} samples vanish from {cache.path} as soon as they are written; does another run with a smaller "
        "size_limit evict them?"
    )


def lacking_anywhere(keys: list[str], found: CachedFeatures | set[str]) -> list[int]:
    """The first sample of every key that a process of this run misses; the same list in all of them."""
    lacking = set() if isinstance(found, CachedFeatures) else found
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    order = list(first)
    missing = anywhere(torch.tensor([key in lacking for key in order]))
    return [first[key] for key, misses in zip(order, missing.tolist(), strict=True) if misses]


def with_cached_features(
    model: nn.Module, train_dataset, eval_dataset, folder: str | Path | None, args: TrainingArguments, size_limit=None
) -> tuple:
    """The datasets of a run with features in place of images, as far as they can be; `folder` None changes nothing.

    The features are computed where and in which precision the Trainer would compute them.
    """
    if folder is None:
        return train_dataset, eval_dataset
    if args.bf16_full_eval or args.fp16_full_eval:
        raise ValueError("features of one precision cannot serve a full_eval in another; set bf16_full_eval=False")
    model.to(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    options = {"num_workers": args.dataloader_num_workers, "batch_size": args.per_device_eval_batch_size}
    with nullcontext() if dtype is None else torch.autocast(args.device.type, dtype):
        # the smaller one first: what would not fit is then refused before the long build
        eval_dataset, train_dataset = (
            None if dataset is None else cache_features(model, dataset, folder, size_limit=size_limit, **options)
            for dataset in (eval_dataset, train_dataset)
        )
    return train_dataset, eval_dataset
