"""Logits to class maps."""

import torch.nn.functional as F
from torch import Tensor
from transformers.image_utils import SizeDict

from vitweave.processing.label_maps import divisor_padding, resized_size


def cut_padding(logits: Tensor, image_size: tuple[int, int], divisor: int | tuple[int, int]) -> Tensor:
    """Cut the margins off that `size_divisor` added to an image of `image_size`: (1, labels, height, width)."""
    top, bottom, left, right = divisor_padding(image_size, divisor)
    height, width = image_size[0] + top + bottom, image_size[1] + left + right
    if logits.shape[-2:] != (height, width):
        logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return logits[..., top : height - bottom, left : width - right]


def semantic_maps(
    logits: Tensor,
    target_sizes: list[tuple[int, int]] | Tensor | None,
    return_scores: bool = False,
    size: SizeDict | None = None,
    size_divisor: int | tuple[int, int] | None = None,
) -> list:
    """Argmax over the labels, after resizing each image's logits bilinearly to its target size.

    Args:
        logits: (batch, num_labels, height, width).
        size: the size the images were resized to before padding, or None if they kept their own.
    """
    from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

    results = []
    targets = [None] * len(logits) if target_sizes is None else target_sizes
    for scores, target in zip(logits, targets, strict=True):
        if target is not None:
            target, scores = tuple(int(length) for length in target), scores[None]
            if size_divisor:
                scores = cut_padding(scores, target if size is None else resized_size(target, size), size_divisor)
            scores = F.interpolate(scores, size=target, mode="bilinear", align_corners=False)[0]
        output = {"segmentation": scores.argmax(dim=0), "segmentation_scores": scores}
        results.append(SemanticSegmentationPostProcessorOutput(output) if return_scores else output["segmentation"])
    return results
