"""Principal components of patch features as colour maps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PcaMaps:
    """Three principal components of the patch features of a set of images."""

    maps: Tensor  # (images, height, width, components) in [0, 1]; 0 on patches left out as background
    components: Tensor  # (components, hidden), unit rows
    explained_variance_ratio: Tensor  # (components,)
    foreground: Tensor | None = None  # (images, height, width) bool, the patches of the refit


def principal_components(rows: Tensor, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, SVD, and a fixed sign: each component's loading of largest magnitude is positive.

    Args:
        rows: (samples, hidden).

    Returns:
        scores (samples, count), components (count, hidden), explained variance ratio (count,).
    """
    if min(rows.shape) < count:
        raise ValueError(
            f"expected at least {count} patches and dimensions for {count} components, got {tuple(rows.shape)}"
        )
    centred = rows - rows.mean(dim=0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:count]
    largest = components.abs().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    variance = singular.square()
    ratio = variance[:count] / variance.sum().clamp_min(torch.finfo(variance.dtype).tiny)
    return centred @ components.T, components, ratio


def pca_maps(
    features: Tensor,
    grid: tuple[int, int],
    foreground_threshold: float | None = None,
    foreground_side: str = "above",
) -> PcaMaps:
    """Colour maps of patch features: the first three components, each scaled to [0, 1] over the whole set.

    Args:
        features: (images, patches, hidden), the patch tokens after the final norm.
        grid: (height, width) of the patches.
        foreground_threshold: where given, patches whose first component (scaled to [0, 1]) lies on `foreground_side`
            of it are kept, the components are fitted again to these, and the others are black.
        foreground_side: "above" or "below"; which side shows the objects depends on the model.
    """
    images, patches, hidden = features.shape
    if grid[0] * grid[1] != patches:
        raise ValueError(f"expected {grid[0]}x{grid[1]}={grid[0] * grid[1]} patches, got {patches}")
    rows = features.reshape(-1, hidden).double()
    scores, components, ratio = principal_components(rows)
    if foreground_threshold is None:
        maps = scale_columns(scores).reshape(images, *grid, -1)
        return PcaMaps(maps, components, ratio)
    keep = _foreground(scale_columns(scores)[:, 0], foreground_threshold, foreground_side)
    scores, components, ratio = principal_components(rows[keep])
    maps = torch.zeros(len(rows), scores.shape[1], dtype=scores.dtype, device=scores.device)
    maps[keep] = scale_columns(scores)
    return PcaMaps(maps.reshape(images, *grid, -1), components, ratio, keep.reshape(images, *grid))


def scale_columns(scores: Tensor) -> Tensor:
    """Min-max each column to [0, 1]; a constant column becomes 0."""
    low, high = scores.min(dim=0).values, scores.max(dim=0).values
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def _foreground(first: Tensor, threshold: float, side: str) -> Tensor:
    if side not in ("above", "below"):
        raise ValueError(f"unknown foreground_side {side!r}; known: ['above', 'below']")
    keep = first > threshold if side == "above" else first < threshold
    if keep.sum() < 3:
        raise ValueError(
            f"only {int(keep.sum())} of {len(keep)} patches have a first component {side} {threshold}; "
            f"move foreground_threshold towards {0 if side == 'above' else 1}"
        )
    return keep
