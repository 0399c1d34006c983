"""Vision-language training on frozen encoders: the features of every tile computed once, texts encoded anew."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from vitweave.training.feature_cache import CachedFeatures, StackedSamples, check_frozen, with_cached_features
from vitweave.training.vlm_data import VlmCollator, VlmDataset


class TowerFeatures(nn.Module):
    """What is kept of images: the encoders of a tower without projector and language model, which change nothing."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    @property
    def vision_encoder(self) -> nn.Module:
        return self.tower.vision_encoder

    @property
    def encode_options(self) -> dict:
        return self.tower.encode_options

    def train(self, mode: bool = True) -> "TowerFeatures":
        return super().train(False)

    def encode(self, pixel_values: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """Of tiles (tiles, channels, height, width)."""
        return self.tower.encode(pixel_values)


class TilesOf(Dataset):
    """The tiles of all images of a dataset one after the other, as `{"pixel_values": (channels, height, width)}`."""

    def __init__(self, dataset: VlmDataset):
        self.dataset, self.processor, self.samples = dataset, dataset.processor.image_processor, self
        self._starts = [0, *accumulate(sum(dataset.tiles(index)[0]) for index in range(len(dataset)))]
        self._records = [index for index in range(len(dataset)) for _ in range(*self.starts[index : index + 2])]
        self._last: tuple[int, torch.Tensor] | None = None

    @property
    def starts(self) -> list[int]:
        """Of every record the number of its first tile, and behind the last record the number of all."""
        return self._starts

    def __len__(self) -> int:
        return self.starts[-1]

    def sources(self, index: int) -> dict:
        """What a tile is made from: all images of its record, since they share the tiles."""
        record = self._records[index]
        return {"images": self.dataset.records.sources(record), "tile": index - self.starts[record]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self._records[index]
        if self._last is None or self._last[0] != record:  # tiles are asked for in order, images decoded once
            self._last = record, self.dataset.encode_images(record)["pixel_values"]
        return {"pixel_values": self._last[1][index - self.starts[record]]}


class CachedVlm(VlmDataset):
    """A dataset with the features of frozen encoders in place of its images; batches come collated.

    Args:
        dataset: gives the texts, and the epoch they are drawn for.
        features: of its tiles, in their order.
        starts: of every record its first tile.
    """

    def __init__(self, dataset: VlmDataset, features: CachedFeatures | None, starts: Sequence[int]):
        if features is not None and len(features) != starts[-1]:
            raise ValueError(f"expected features of all {starts[-1]} tiles, got {len(features)}")
        self.__dict__.update(dataset.__dict__)
        self.features, self.starts, self._tiles, self._encoded = features, list(starts), {}, {}
        self.collate = VlmCollator(dataset.processor.tokenizer)

    def tiles(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """As in any of these datasets; the images are looked at once."""
        if index not in self._tiles:
            self._tiles[index] = super().tiles(index)
        return self._tiles[index]

    def encode_record(self, index: int) -> Mapping[str, torch.Tensor]:
        """Text and facts of the images; each text is tokenised once."""
        key = (index, repr(self.messages(index)))
        if key not in self._encoded:
            num_tiles, sizes = self.tiles(index)
            facts = {"num_tiles": torch.tensor(num_tiles), "image_sizes": torch.tensor(sizes)} if num_tiles else {}
            self._encoded[key] = self.encode_text(index, num_tiles, sizes) | facts
        return self._encoded[key]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([int(index)]).batch

    def __getitems__(self, indices: list[int]) -> StackedSamples:
        batch = self.collate([self.encode_record(index) for index in indices])
        tiles = [tile for index in indices for tile in range(*self.starts[index : index + 2])]
        if tiles:
            batch |= self.features.__getitems__(tiles).batch
        return StackedSamples(batch, len(indices))


def with_vlm_features(
    model: nn.Module, train_dataset, eval_dataset, folder: str | Path | None, args: TrainingArguments
) -> tuple:
    """The datasets of a run with features in place of images; `folder` None changes nothing.

    One entry per tile: runs with other texts, projectors, fusions or language models share them.

    Args:
        model: a `MultiEncoderVlmForConditionalGeneration` without adapters around it.
    """
    if folder is None:
        return train_dataset, eval_dataset
    check_frozen(model)
    model.to(args.device)
    datasets = (train_dataset, eval_dataset)
    tiles = [None if dataset is None else TilesOf(dataset) for dataset in datasets]
    filled = [None if part is None or not len(part) else part for part in tiles]
    found = with_cached_features(TowerFeatures(model.model.vision_tower), *filled, folder, args)
    return tuple(
        None if dataset is None else CachedVlm(dataset, features, part.starts)
        for dataset, features, part in zip(datasets, found, tiles, strict=True)
    )
