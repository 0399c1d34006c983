"""The images of a batch of texts: which tiles, sizes and placeholders belong together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitweave.modeling.modeling_multi_encoder import EncodedByAll


def images_per_sample(placeholders: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """How many images each sample has; refused where placeholders and tokens differ.

    Args:
        placeholders: image tokens in the text of every sample.
        lengths: tokens of every image, in the order of the samples.
    """
    images, first = [], 0
    for sample, expected in enumerate(placeholders):
        found, last = 0, first
        while found < expected and last < len(lengths):
            found, last = found + lengths[last], last + 1
        if found != expected:
            raise ValueError(
                f"sample {sample} has {expected} image tokens in its text, but the next {last - first} images of the"
                f" batch have {found} ({list(lengths[first:last])}). Likely causes: the text was truncated inside of"
                " an image, an image is missing or too many, or the processor counts with other settings than the model"
                " (make it with MultiEncoderVlmProcessor.from_model_config)"
            )
        images.append(last - first)
        first = last
    if first < len(lengths):
        raise ValueError(
            f"expected as many image tokens in the texts as the images have, {sum(lengths)}, got {sum(placeholders)}:"
            f" the last {len(lengths) - first} of {len(lengths)} images have no place in any of"
            f" {len(placeholders)} samples. Likely causes: a text without its image tokens, or truncation"
        )
    return images


def repeat_by_sample(features: Sequence[Tensor], images: Sequence[int], times: int) -> list[Tensor]:
    """The images of every sample `times` over, as beams need them: A B | C becomes A B A B | C C."""
    repeated, first = [], 0
    for count in images:
        repeated += list(features[first : first + count]) * times
        first += count
    return repeated


def check_images(
    pixel_values: Tensor | None,
    num_tiles: Tensor | None,
    image_sizes: Tensor | None,
    encoder_outputs: EncodedByAll | None,
    unpad: bool,
) -> None:
    """Refuse images, tiles and sizes that do not belong together."""
    if (pixel_values is None) == (encoder_outputs is None):
        raise ValueError("expected either pixel_values or encoder_outputs (what `encode` returned for them)")
    tiles = (encoder_outputs["maps"][0] if pixel_values is None else pixel_values).shape[0]
    images = tiles if num_tiles is None else num_tiles.shape[0]
    if image_sizes is not None and image_sizes.shape != (images, 2):
        raise ValueError(f"expected image_sizes ({images}, 2) for {images} images, got {tuple(image_sizes.shape)}")
    if unpad and images != tiles:
        raise ValueError(
            f"expected one tile per image with unpad=True, got {tiles} tiles for {images} images: tiling adds no"
            " padding that could be left out"
        )
    if num_tiles is None or torch.compiler.is_compiling():
        return
    counts = num_tiles.tolist()
    if sum(counts) != tiles or min(counts, default=1) < 1:
        raise ValueError(
            f"expected num_tiles of at least 1 that sum to the {tiles} tiles of pixel_values, got {counts}"
        )


def image_lengths(tokens: Tensor, per_tile: list[int] | int, num_tiles: Tensor | None) -> list[int]:
    """Tokens of every image, from those of its tiles."""
    if num_tiles is None:
        return [per_tile] * (tokens.shape[0] // per_tile) if isinstance(per_tile, int) else per_tile
    if isinstance(per_tile, int):
        return [per_tile * count for count in num_tiles.tolist()]
    return per_tile  # with `unpad`, where every image is one tile
