"""What frozen encoders say about a data set, computed once: class tokens and mean patches, or all tokens."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from vitweave.modeling.vision_encoder import VisionEncoder, VisionFeatures
from vitweave.training.classification_data import collate_classification
from vitweave.training.feature_cache import FeatureCollator, cache_features
from vitweave.training.modes import evaluating


class FrozenEncoder(nn.Module):
    """An encoder that is not trained. `encode` says what is kept of an image.

    Encoders without a class token (ConvNeXt, Swin, MobileNetV2, SigLIP) stand in with their pooled output, which
    belongs to the last layer; of them no other layer can be asked for, because nothing is trained to sum it up.
    """

    def __init__(self, encoder: VisionEncoder, num_layers: int = 1):
        super().__init__()
        self.has_class_token = encoder.facts.num_class_tokens > 0
        if num_layers > 1 and not self.has_class_token:
            raise ValueError(
                f"{encoder.config.model_type} has no class token, only the pooled output of its last layer; "
                f"expected 1 layer, got {num_layers}"
            )
        if not 1 <= num_layers <= encoder.num_layers:
            raise ValueError(f"expected 1 to {encoder.num_layers} layers, got {num_layers}")
        last = range(encoder.num_layers + 1)[-num_layers:]
        self.backbone = VisionEncoder(encoder.model, layers=list(last), final_norm=True)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stays in eval mode: what is not trained draws no dropout and moves no statistics."""
        return super().train(False)

    def features(self, pixel_values: Tensor) -> tuple[VisionFeatures, list[Tensor]]:
        """What the encoder returns and, for each layer, the (batch, hidden) that sums it up."""
        found = self.backbone(pixel_values)
        return found, list(found.cls) if self.has_class_token else [found.pooled]


class PooledEncoder(FrozenEncoder):
    """Keeps of the last layers the class token and the mean patch, both after the final norm."""

    def encode(self, pixel_values: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """(batch, channels, height, width) to `class_tokens` and `mean_patches`, each one (batch, hidden) per layer."""
        found, cls_tokens = self.features(pixel_values)
        return {"class_tokens": tuple(cls_tokens), "mean_patches": tuple(p.mean(dim=1) for p in found.patches)}


class TokenEncoder(FrozenEncoder):
    """Keeps all tokens of the last layer after the final norm, [CLS] (or the pooled output, if as wide) first."""

    def encode(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """(batch, channels, height, width) to `tokens` (batch, tokens, hidden)."""
        found, cls_tokens = self.features(pixel_values)
        parts = [found.class_tokens[-1], found.registers[-1], found.patches[-1]]
        if not self.has_class_token and cls_tokens[-1].shape[-1] == parts[-1].shape[-1]:
            parts[0] = cls_tokens[-1][:, None]
        return {"tokens": torch.cat(parts, dim=1)}


@dataclass
class EncodedImages:
    """Features of a data set in memory; every probe takes them in the place of the data set they were computed from.

    Args:
        features: what `encode` returned, its tensors (images, ...).
        labels: (images,) class ids.
    """

    features: dict
    labels: Tensor
    id2label: dict[int, str] | None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, encoder: FrozenEncoder) -> dict:
        """What `encoder` would return for these images; refused where something else was kept of them."""
        width = encoder.backbone.hidden_sizes[-1] if encoder.has_class_token else encoder.backbone.facts.pooled_size
        if isinstance(encoder, TokenEncoder):
            if "tokens" in self.features and self.features["tokens"].shape[-1] == encoder.backbone.hidden_sizes[-1]:
                return self.features
            raise ValueError("expected all tokens of this encoder's last layer; give the images, or use num_layers")
        layers, kept = len(encoder.backbone.layers), self.features.get("class_tokens", ())
        if len(kept) < layers or kept[-1].shape[-1] != width:
            widths = [tokens.shape[-1] for tokens in kept]
            raise ValueError(
                f"expected features of {width} channels of {layers} layers, got layers of {widths}; encode the images "
                f"with this encoder and num_layers={layers}"
            )
        return {name: part[-layers:] for name, part in self.features.items()}


def encode_images(
    encoder: VisionEncoder,
    dataset: Dataset,
    num_layers: int | None = 4,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
    cache_folder: str | Path | None = None,
) -> EncodedImages:
    """Encode a data set once for several probes.

    Args:
        cache_folder: where the features are also kept on disk for later runs (`feature_cache`).
        num_layers: class tokens and mean patches of the last `num_layers` are kept; of an encoder without class token
            the pooled output. None keeps all tokens of the last layer.
    """
    if not encoder.facts.num_class_tokens:
        num_layers = num_layers and 1
    frozen_encoder = TokenEncoder(encoder) if num_layers is None else PooledEncoder(encoder, num_layers)
    names = label_names(dataset)
    if cache_folder is not None:
        with frozen(frozen_encoder):
            dataset = cache_features(frozen_encoder, dataset, cache_folder, None, None, num_workers, batch_size)
    features, labels = compute_features(frozen_encoder, dataset, batch_size, num_workers, progress)
    return EncodedImages(features, labels, names)


def compute_features(
    encoder: FrozenEncoder,
    dataset: Dataset | EncodedImages,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
    description: str = "features",
) -> tuple[dict, Tensor]:
    """Encode every image of a data set once; only what `encode` returns is kept in memory, on the CPU.

    Args:
        dataset: an `ImageClassificationDataset`, any dataset with its items, or `EncodedImages`.

    Returns:
        what `encode` returns, its tensors (images, ...), and labels (images,).
    """
    if isinstance(dataset, EncodedImages):
        return dataset.read(encoder), dataset.labels
    if getattr(dataset, "augmentation", None) is not None:
        raise ValueError(
            "features are computed once, so the images must not change; give the dataset augmentation=None"
        )
    if not len(dataset):
        raise ValueError("expected at least one image, got an empty dataset")
    collator = FeatureCollator(collate_classification)
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collator)
    device = next(encoder.parameters()).device
    store, labels, start = None, [], 0
    with frozen(encoder):
        for batch in tqdm(loader, desc=description, disable=not progress):
            cached = "encoder_outputs" in batch
            encoded = batch["encoder_outputs"] if cached else encoder.encode(batch["pixel_values"].to(device))
            store = allocate(encoded, len(dataset)) if store is None else store
            start = write_rows(store, encoded, start)
            labels.append(batch["labels"])
    return store, torch.cat(labels)


@contextmanager
def frozen(model: nn.Module):
    """No gradients and eval mode inside; behind it every module and parameter is as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def allocate(encoded, length: int):
    """Room for `length` images, in the form of what `encode` returned for a batch."""
    if isinstance(encoded, dict):
        return {name: allocate(part, length) for name, part in encoded.items()}
    if isinstance(encoded, Tensor):
        return torch.empty(length, *encoded.shape[1:], dtype=encoded.dtype)
    return tuple(allocate(part, length) for part in encoded)


def write_rows(store, encoded, start: int) -> int:
    """Copy a batch into `store` from image `start` on; returns the image after it."""
    if isinstance(encoded, Tensor):
        stop = start + len(encoded)
        store[start:stop] = encoded.to(store.device)
        return stop
    keys = encoded if isinstance(encoded, dict) else range(len(encoded))
    return max([write_rows(store[key], encoded[key], start) for key in keys])


def label_names(*datasets: Dataset) -> dict[int, str] | None:
    """The class names of the data sets, which must agree; None where they have none."""
    known = [names for names in (getattr(dataset, "id2label", None) for dataset in datasets) if names]
    if any(names != known[0] for names in known):
        odd = next(names for names in known if names != known[0])
        raise ValueError(
            f"expected one id2label in all parts, got {known[0]} and {odd}; give the later parts the "
            "id2label of the first"
        )
    return dict(known[0]) if known else None


def count_classes(labels: Sequence[Tensor], id2label: dict[int, str] | None) -> int:
    """How many classes a probe tells apart; refuses a single one and labels without a name."""
    low, high = int(min(part.min() for part in labels)), int(max(part.max() for part in labels))
    num_labels = len(id2label) if id2label else high + 1
    if low < 0 or high >= num_labels:
        raise ValueError(f"expected labels from 0 to {num_labels - 1}, got {low} to {high}; check id2label")
    if num_labels < 2 or len(labels[0].unique()) < 2:
        raise ValueError(
            f"expected training images of at least two classes, got class {low} alone; nothing to tell apart"
        )
    return num_labels
