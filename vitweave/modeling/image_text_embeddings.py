"""What a dual encoder makes of a batch, joined from chunks of it and from all processes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from vitweave.modeling.gather import gather_rows


class ImageEmbeddings(NamedTuple):
    """Unit vectors of images.

    Args:
        pooled: (images, projection_dim).
        tiles: (images, tiles, projection_dim); None without tile <-> sentence alignment.
        tile_mask: (images, tiles), True where a tile holds a valid patch.
    """

    pooled: Tensor
    tiles: Tensor | None = None
    tile_mask: Tensor | None = None


class TextEmbeddings(NamedTuple):
    """Unit vectors of texts.

    Args:
        pooled: (texts, projection_dim).
        sentences: (texts, sentences, projection_dim); None without alignment or without sentences.
        sentence_mask: (texts, sentences), True where there is a sentence.
    """

    pooled: Tensor
    sentences: Tensor | None = None
    sentence_mask: Tensor | None = None


@dataclass
class ImageTextRetrieverOutput(ModelOutput):
    """What the retriever says about a batch of images and a batch of texts.

    Args:
        loss: contrastive loss of the pairs, image i with text i.
        logits_per_image: (images, texts), scaled cosines of the global embeddings.
        logits_per_text: (texts, images), the same.
        text_embeds: (texts, projection_dim), unit vectors.
        image_embeds: (images, projection_dim), unit vectors.
        local_scores: (images, texts), how well tiles and sentences fit; in evaluation, with alignment and sentences.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    local_scores: Tensor | None = None


Embeddings = TypeVar("Embeddings", ImageEmbeddings, TextEmbeddings)


def gathered(embeddings: Embeddings) -> Embeddings:
    """The embeddings of all processes, with gradient."""
    return type(embeddings)(*(None if part is None else gather_rows(part) for part in embeddings))


def check_one(pixel_values: Tensor | None, encoder_outputs: dict[str, Tensor] | None) -> None:
    """Refuse images twice, or not at all."""
    if (pixel_values is None) == (encoder_outputs is None):
        raise ValueError(
            "expected either pixel_values or encoder_outputs (what `encode` returned for the images), got"
            f" {'neither' if pixel_values is None else 'both'}"
        )


def check_rows(
    images: int, input_ids: Tensor | None, patch_mask: Tensor | None, caption_ids: Tensor | None, must_pair: bool
) -> None:
    """Refuse a batch without texts, and inputs that have not one row per image or text."""
    if input_ids is None:
        raise ValueError("expected input_ids (texts, tokens), got none; get_image_features embeds images alone")
    if must_pair and images != input_ids.shape[0]:
        raise ValueError(
            f"expected as many images as texts, image i with text i, got {images} and {input_ids.shape[0]}"
        )
    rows = (("patch_mask", patch_mask, images), ("caption_ids", caption_ids, input_ids.shape[0]))
    for name, given, expected in rows:
        if given is not None and given.shape[0] != expected:
            raise ValueError(f"expected {expected} rows of {name}, one per sample, got {given.shape[0]}")


def rows_of(value, start: int, end: int):
    """These rows of a tensor, or of every tensor in a dict; anything else as it is."""
    if isinstance(value, dict):
        return {name: part[start:end] for name, part in value.items()}
    return value[start:end] if isinstance(value, Tensor) else value


def encode_in_chunks(encode: Callable[..., Embeddings], chunk_size: int, **inputs) -> Embeddings:
    """Encode a batch chunk by chunk, with the activations of one chunk in memory at a time.

    The chunks are encoded without activations being kept; the backward pass has the gradient of the loss with respect
    to all embeddings first, and then encodes each chunk again, with the random numbers of the first time, and sends its
    part of that gradient through it. That is GradCache (arXiv:2101.06983), written as one checkpoint per chunk, so that
    mixed precision, DistributedDataParallel and the Trainer need to know nothing of it.

    Args:
        inputs: tensors (batch, ...) and dicts of them, cut into chunks, and anything else, passed on.
    """
    parts = [value.values() if isinstance(value, dict) else [value] for value in inputs.values()]
    rows = len(next(value for part in parts for value in part if isinstance(value, Tensor)))
    parts = []
    for start in range(0, rows, chunk_size):
        chunk = {name: rows_of(value, start, start + chunk_size) for name, value in inputs.items()}
        parts.append(checkpoint(encode, use_reentrant=False, **chunk))
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))
