"""What layer fusions and dual encoders read of a vision encoder, as tensors that can be kept instead of the images."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from vitweave.modeling.layer_fusion.base import LayerTokens, mean_of_valid
from vitweave.modeling.vision_encoder import VisionFeatures

# one row per image in every entry; see `encode_features`
EncodedImages = dict[str, Tensor]


def read_layers(
    features: VisionFeatures,
    layers: Sequence[int],
    hidden_size: int,
    needs: Collection[str],
    patch_mask: Tensor | None = None,
) -> LayerTokens:
    """What a layer fusion that reads `needs` is given of an encoder's features.

    Args:
        layers: which layers, as the encoder counts them; they are among `features.layers`.
        hidden_size: channels of the fusion.
        patch_mask: (batch, patches), True where a patch shows the image, not padding.
    """
    chosen = [features.layers.index(layer) for layer in layers]
    grid = features.grids[chosen[-1]]
    if patch_mask is not None and patch_mask.shape[1:] != (grid[0] * grid[1],):
        raise ValueError(
            f"expected a patch_mask (batch, {grid[0]}x{grid[1]}={grid[0] * grid[1]} patches), got the shape"
            f" {tuple(patch_mask.shape)}"
        )
    class_tokens, _, base_patches = features.final
    cls = [features.cls[index] for index in chosen]
    means = [None] * len(chosen)
    if "patch_means" in needs or cls[0] is None:
        means = [mean_of_valid(features.patches[index], patch_mask) for index in chosen]
    base_cls = features.pooled
    if base_cls.shape[1] != hidden_size:
        base_cls = class_tokens[:, 0] if class_tokens.shape[1] else mean_of_valid(base_patches, patch_mask)
    return LayerTokens(
        cls=torch.stack(means if cls[0] is None else cls, dim=1),
        patches=torch.stack([features.patches[index] for index in chosen], dim=1) if "patches" in needs else None,
        grid=grid,
        base_cls=base_cls,
        base_patches=base_patches,
        patch_mask=patch_mask,
        patch_means=torch.stack(means, dim=1) if "patch_means" in needs else None,
    )


def encode_features(
    features: VisionFeatures, tokens: LayerTokens | None, patch_mask: Tensor | None, base_patches: bool
) -> EncodedImages:
    """The features of a batch as they can be kept.

    Args:
        tokens: what a layer fusion reads; None without one.
        base_patches: keep the patches after the final norm, which dense fusions and tiles read.

    Returns:
        pooled (batch, pooled size); prefix (batch, class tokens and registers, hidden) after the final norm; grid
        (batch, 2), height and width in patches; patch_mask (batch, patches) where there is one; base_patches (batch,
        patches, hidden); for a fusion base_cls (batch, hidden), cls and patch_means (batch, layers, hidden), patches
        (batch, layers, patches, hidden), the last two where it reads them.
    """
    batch = len(features.pooled)
    found = {
        "pooled": features.pooled,
        "prefix": torch.cat(features.final[:2], dim=1),
        "grid": torch.tensor(features.grids[-1], device=features.pooled.device).expand(batch, 2),
        "patch_mask": None if patch_mask is None else patch_mask.bool(),
        "base_patches": features.final[2] if base_patches else None,
    }
    if tokens is not None:
        found |= {name: getattr(tokens, name) for name in ("base_cls", "cls", "patch_means", "patches")}
    return {name: part for name, part in found.items() if part is not None}


def decode_layers(encoded: EncodedImages, needs: Collection[str]) -> LayerTokens:
    """The tokens of `read_layers`, from what was kept; it may hold more than the fusion needs."""
    check_encoded(encoded, ["base_cls", "cls", *(name for name in ("patch_means", "patches") if name in needs)])
    return LayerTokens(
        cls=encoded["cls"],
        patches=encoded["patches"] if "patches" in needs else None,
        grid=grid_of(encoded),
        base_cls=encoded["base_cls"],
        base_patches=encoded.get("base_patches"),
        patch_mask=encoded.get("patch_mask"),
        patch_means=encoded["patch_means"] if "patch_means" in needs else None,
    )


def grid_of(encoded: EncodedImages) -> tuple[int, int]:
    """Height and width in patches, the same for all images of a batch."""
    height, width = encoded["grid"][0].tolist()
    return height, width


def check_encoded(encoded: EncodedImages, needed: Sequence[str]) -> None:
    """Refuse features without what the model reads."""
    missing = [name for name in ("pooled", "prefix", "grid", *needed) if name not in encoded]
    if missing:
        raise ValueError(
            f"expected {missing} in encoder_outputs too, got {sorted(encoded)}; they are what `encode` of this model"
            " returns for the images"
        )
