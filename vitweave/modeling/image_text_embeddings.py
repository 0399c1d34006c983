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


def encode_in_chunks(encode: Callable[..., Embeddings], chunk_size: int, **inputs: Tensor | int | None) -> Embeddings:
    """Encode a batch chunk by chunk, with the activations of one chunk in memory at a time.

    The chunks are encoded without activations being kept; the backward pass has the gradient of the loss with respect
    to all embeddings first, and then encodes each chunk again, with the random numbers of the first time, and sends its
    part of that gradient through it. That is GradCache (arXiv:2101.06983), written as one checkpoint per chunk, so that
    mixed precision, DistributedDataParallel and the Trainer need to know nothing of it.

    Args:
        inputs: tensors (batch, ...), cut into chunks, and anything else, passed on.
    """
    rows = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    parts = []
    for start in range(0, rows, chunk_size):
        chunk = {
            name: value[start : start + chunk_size] if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        parts.append(checkpoint(encode, use_reentrant=False, **chunk))
    columns = zip(*parts, strict=True)
    return type(parts[0])(*(None if column[0] is None else torch.cat(column) for column in columns))
