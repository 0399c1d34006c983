"""Retrieval on a frozen vision encoder: its features computed once, texts drawn and encoded anew in every epoch."""

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from vitweave.modeling.encoded_images import EncodedImages
from vitweave.modeling.vision_tower import VisionTower
from vitweave.training.feature_cache import CachedFeatures, StackedSamples, check_frozen, with_cached_features
from vitweave.training.retrieval_data import RetrievalCollator, RetrievalDataset


class FeatureSource(nn.Module):
    """The encoder below a retriever, and what to keep of it: retrievers that differ in their fusion share the features.

    Args:
        needs: keep what a layer fusion with these `needs` reads; None is what the tower's own reads.
        tiles: keep the patches that tiles are cut from.
    """

    def __init__(self, tower: VisionTower, needs: Collection[str] | None = None, tiles: bool = False):
        super().__init__()
        self.encoder = tower.encoder.model
        self.parts = (tower,)  # not a module of its own
        self.needs, self.tiles = tuple(sorted(tower.needs if needs is None else needs)), tiles

    @property
    def encode_options(self) -> dict:
        """What the features depend on besides the weights."""
        (tower,) = self.parts
        layers = tuple(tower.model.config.layers) if tower.is_fused else ()
        return {"layers": layers, "final_norm": tower.encoder.final_norm, "needs": self.needs, "tiles": self.tiles}

    def train(self, mode: bool = True) -> "FeatureSource":
        return super().train(False)

    def encode(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None) -> EncodedImages:
        """What is kept of a batch of images."""
        return self.parts[0].encode(pixel_values, patch_mask, self.needs, self.tiles)


class CachedRetrieval(RetrievalDataset):
    """A retrieval dataset with a frozen encoder's features in place of its images.

    Args:
        dataset: gives the texts, and the epoch they are drawn for.
        features: of its images, in its order.
    """

    def __init__(self, dataset: RetrievalDataset, features: CachedFeatures):
        if len(features) != len(dataset):
            raise ValueError(f"expected features of all {len(dataset)} images, got {len(features)}")
        self.__dict__.update(dataset.__dict__)
        self.features, self._encoded = features, {}
        self.collate_texts = RetrievalCollator(dataset.processor.tokenizer)

    def only(self, names: Collection[str]) -> "CachedRetrieval":
        """With these entries of `encoder_outputs` alone; the others are not read."""
        return CachedRetrieval(self, self.features.only(names))

    def images(self) -> Dataset:
        return self.features

    def encode_text(self, text: str | list[str], index: int) -> dict[str, torch.Tensor]:
        """As in any retrieval dataset; each text is tokenised once."""
        key = (index, text if isinstance(text, str) else tuple(text))
        if key not in self._encoded:
            self._encoded[key] = super().encode_text(text, index)
        return self._encoded[key]

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([int(index)])[0]

    def __getitems__(self, indices: list[int]) -> StackedSamples:
        features = self.features.__getitems__(indices).batch
        texts = self.collate_texts([self.encode_text(self.text(index), index) for index in indices])
        return StackedSamples({"encoder_outputs": features["encoder_outputs"], **texts}, len(indices))


def with_retrieval_features(
    model: nn.Module, train_dataset, eval_dataset, folder: str | Path | None, args: TrainingArguments
) -> tuple:
    """The datasets of a run with features in place of images; `folder` None changes nothing.

    Retrievers on one encoder share them if their fusions read the same.
    """
    if folder is None:
        return train_dataset, eval_dataset
    check_frozen(model)
    model.to(args.device)
    source = FeatureSource(model.tower, tiles=model.alignment is not None)
    datasets = (train_dataset, eval_dataset)
    images = (None if dataset is None else dataset.images() for dataset in datasets)
    found = with_cached_features(source, *images, folder, args)
    return tuple(
        None if dataset is None else CachedRetrieval(dataset, features)
        for dataset, features in zip(datasets, found, strict=True)
    )
