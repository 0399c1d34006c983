"""Evaluation of a depth model under a named protocol."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vitweave.processing.sliding_window import sliding_window_logits
from vitweave.training.depth_data import collate_depth
from vitweave.training.depth_metrics import DepthMetrics, predicted_depth_at_labels
from vitweave.training.depth_protocols import DepthProtocol, find_protocol
from vitweave.training.modes import evaluating


def predict_depth(
    model, pixel_values: Tensor, flip: bool = False, window: tuple[int, int] | int | None = None, stride=None
) -> Tensor:
    """Predicted depth (batch, height, width), averaged with the mirrored images' and over windows if asked.

    Args:
        pixel_values: (batch, channels, height, width).
        flip: average with the mirrored prediction for the mirrored image.
        window, stride: pixels of overlapping windows, one number or (height, width); the stride is 2/3 of the window
            unless given. Windows see less context, and absolute depth suffers from that: use them for large images.
    """

    def predict(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).predicted_depth[:, None]

    def whole(pixels: Tensor) -> Tensor:
        if window is None:
            return predict(pixels)
        edges = (window, window) if isinstance(window, int) else window
        return sliding_window_logits(predict, pixels, edges, stride or tuple(-(-2 * edge // 3) for edge in edges))

    depth = whole(pixel_values)
    if flip:
        depth = (depth + whole(pixel_values.flip(-1)).flip(-1)) / 2
    return depth[:, 0]


def evaluate_depth(
    model,
    dataset,
    protocol: str | DepthProtocol = "nyu_eigen",
    batch_size: int = 8,
    device: str | torch.device | None = None,
    window: tuple[int, int] | int | None = None,
    stride: tuple[int, int] | int | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, float | int | str]:
    """Measure a depth model on a dataset; memory does not grow with the images.

    Labels are compared at the size the dataset gives them, to which the prediction is resized bilinearly; whoever
    resizes depth in the processor evaluates at that size.

    Args:
        model: called with pixel_values, returns `.predicted_depth` (batch, height, width); in eval mode meanwhile.
        dataset: items {"pixel_values", "labels"}, such as a `DepthDataset` without augmentation.
        device: where to compute; default: where the model is.
        window, stride: see `predict_depth`.

    Returns:
        protocol (its name), abs_rel, sq_rel, rmse, log10, rmse_log, silog, a1, a2, a3, images and images_without_depth.
    """
    protocol = find_protocol(protocol)
    if getattr(dataset, "augmentation", None) is not None:
        raise ValueError("the dataset augments its images; evaluate on one made with augmentation=None")
    returned = getattr(getattr(model, "config", None), "depth_target", protocol.prediction)
    if returned != protocol.prediction:
        raise ValueError(
            f"the model returns {returned}, the protocol {protocol.name!r} expects {protocol.prediction}; use one of "
            "its kind, or DEPTH_PROTOCOLS[name].variant(prediction=...)"
        )
    metrics = DepthMetrics(protocol)
    if device is not None:
        model.to(device)
    weight = next(model.parameters())
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_depth)
    with evaluating(model):
        for batch in tqdm(loader, desc=protocol.name, disable=not progress):
            pixels = batch["pixel_values"].to(device=weight.device, dtype=weight.dtype)
            predicted = predict_depth(model, pixels, protocol.flip, window, stride)
            metrics.update(predicted_depth_at_labels(predicted, batch["labels"]), batch["labels"])
    return metrics.compute()
