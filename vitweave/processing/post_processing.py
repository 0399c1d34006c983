"""What a dense model returns, at the size of the original images."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import SizeDict

from vitweave.processing.label_maps import divisor_padding, resized_size


def cut_padding(maps: Tensor, image_size: tuple[int, int], divisor: int | tuple[int, int]) -> Tensor:
    """Cut the margins off that `size_divisor` added to an image of `image_size`: (1, channels, height, width)."""
    top, bottom, left, right = divisor_padding(image_size, divisor)
    height, width = image_size[0] + top + bottom, image_size[1] + left + right
    if maps.shape[-2:] != (height, width):
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return maps[..., top : height - bottom, left : width - right]


def at_target_sizes(
    maps: Tensor,
    targets: list[tuple[int, int] | None] | Tensor,
    size: SizeDict | None = None,
    size_divisor: int | tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Each image's map (channels, height, width), without its padding and resized bilinearly to its target size.

    Args:
        maps: (batch, channels, height, width).
        targets: (height, width) of each original image, or None to leave its map as it is.
        size: the size the images were resized to before padding, or None if they kept their own.
    """
    for one, target in zip(maps, targets, strict=True):
        if target is not None:
            target, one = tuple(int(length) for length in target), one[None]
            if size_divisor:
                one = cut_padding(one, target if size is None else resized_size(target, size), size_divisor)
            one = F.interpolate(one, size=target, mode="bilinear", align_corners=False)[0]
        yield one


def semantic_maps(
    logits: Tensor,
    targets: list[tuple[int, int] | None] | Tensor,
    return_scores: bool = False,
    size: SizeDict | None = None,
    size_divisor: int | tuple[int, int] | None = None,
) -> list:
    """Argmax over the labels of logits (batch, num_labels, height, width), at the target sizes."""
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

    results = []
    for scores in at_target_sizes(logits, targets, size, size_divisor):
        output = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
        results.append(SemanticSegmentationPostProcessorOutput(output) if return_scores else output["segmentation"])
    return results


def depth_maps(
    predicted_depth: Tensor,
    targets: list[tuple[int, int] | None] | Tensor,
    size: SizeDict | None = None,
    size_divisor: int | tuple[int, int] | None = None,
) -> list[dict[str, Tensor]]:
    """`predicted_depth` (height, width) of each image, from (batch, height, width), at the target sizes."""
    if predicted_depth.ndim != 3:
        raise ValueError(f"expected predicted_depth (batch, height, width), got {tuple(predicted_depth.shape)}")
    maps = at_target_sizes(predicted_depth[:, None], targets, size, size_divisor)
    return [{"predicted_depth": depth[0]} for depth in maps]
