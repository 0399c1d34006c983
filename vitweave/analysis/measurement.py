"""One pass over the images, reduced on the fly: only patch norms and the last patch features are kept."""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitweave.analysis.similarity import mean_pair_cosine, token_cosine
from vitweave.analysis.taps import TAPS, TokenLayout, find_blocks, find_grid, find_layout, tapped


@dataclass
class TapStatistics:
    """What was measured before or after one norm; None where the model has no such token."""

    patch_patch_cosine: Tensor  # (layers, images), mean over pairs of different patches
    abs_mean_patch: Tensor  # (layers, hidden), mean over images and patches
    cls_patch_cosine: Tensor | None  # (layers, images), mean over patches
    cls_patch_cosine_std: Tensor | None  # (layers, images), standard deviation over patches (divided by their number)
    cls_register_cosine: Tensor | None  # (layers, images), mean over registers
    abs_mean_cls: Tensor | None  # (layers, hidden), mean over images


@dataclass
class Measurement:
    """Everything measured on one model and one set of images. All tensors are on the CPU."""

    grid: tuple[int, int]
    layout: TokenLayout
    taps: dict[str, TapStatistics]  # by "before.norm1", "after.norm1", "before.norm2", "after.norm2"
    patch_norms: Tensor | None  # (images, patches) of the residual stream after `norm_block`
    norm_block: int | None
    features: Tensor | None  # (images, patches, hidden) after the final norm
    skipped: dict[str, str] = field(default_factory=dict)  # analysis -> why it was left out


def measure(
    model: nn.Module, batches: Iterable[Tensor], norm_block: int | None = None, keep_features: bool = True
) -> Measurement:
    """Run a vision model over batches of images and measure its tokens around every norm.

    Args:
        model: a plain ViT from transformers or vitweave, vanilla or specialised (the base model or a backbone). Of
            other vision models only the last patch features are kept.
        batches: pixel values (batch, channels, height, width), all of one size.
        norm_block: the block after which patch norms are taken, 0 = first, negative = from the end; None = the last
            one that runs.
        keep_features: keep the patch features, for PCA maps.
    """
    blocks, layout = find_blocks(model), find_layout(model)
    norm_block = _resolve_block(norm_block, len(blocks))
    collector = _Collector(layout, norm_block)
    features, grid = [], None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), tapped(blocks, collector):
            for pixel_values in batches:
                grid = _checked_grid(model, pixel_values, grid, bool(blocks))
                collector.start(grid or (0, 0))  # no grid, no blocks: nothing will be collected
                output = model(pixel_values, **_extra_inputs(model, pixel_values))
                collector.finish()
                final, grid = _patch_features(output, layout, grid, pixel_values)
                if keep_features and final is not None:
                    features.append(final.cpu())
    finally:
        model.train(was_training)
    if grid is None:
        raise ValueError("expected at least one batch of images, got none")
    return Measurement(
        grid=grid,
        layout=layout,
        taps=collector.taps(),
        patch_norms=torch.cat(collector.patch_norms) if collector.patch_norms else None,
        norm_block=collector.last_block,
        features=torch.cat(features) if features else None,
        skipped=_skipped(model, blocks, layout, collector, keep_features, features),
    )


class _Collector:
    """The sink of the taps."""

    def __init__(self, layout: TokenLayout, norm_block: int | None):
        self.layout, self.norm_block = layout, norm_block
        self.per_image: dict[tuple[str, str, int], list[Tensor]] = defaultdict(
            list
        )  # (tap, statistic, block) -> values
        self.sums: dict[tuple[str, str, int], Tensor] = {}
        self.counts: dict[tuple[str, str, int], int] = defaultdict(int)
        self.patch_norms: list[Tensor] = []
        self.last_block: int | None = None
        self.num_patches = self.images = self.batch = 0
        self.norms: Tensor | None = None

    def start(self, grid: tuple[int, int]) -> None:
        self.num_patches, self.norms = grid[0] * grid[1], None

    def finish(self) -> None:
        if self.norms is not None:
            self.patch_norms.append(self.norms.cpu().double())
        self.images += self.batch

    def __call__(self, block: int, tap: str, tokens: Tensor) -> None:
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        self.batch = len(tokens)
        cls, registers, patches = self.layout.split(tokens, self.num_patches)
        if tap == "output":
            if self.norm_block in (None, block):
                self.norms, self.last_block = torch.linalg.vector_norm(patches, dim=-1), block
            return
        bad = ~torch.isfinite(tokens).flatten(1).all(dim=1)
        if bad.any():
            images = (torch.nonzero(bad).flatten() + self.images).tolist()
            raise ValueError(
                f"expected finite tokens, got NaN or infinity {tap} of block {block} in image(s) {images[:8]}; "
                "check these images and the weights, or run in float32"
            )
        self._add(tap, "patch_patch_cosine", block, mean_pair_cosine(patches))
        self._add_magnitude(tap, "abs_mean_patch", block, patches.flatten(0, 1))
        if cls is None:
            return
        cosine = token_cosine(cls, patches)  # (batch, patches)
        self._add(tap, "cls_patch_cosine", block, cosine.mean(dim=1))
        self._add(tap, "cls_patch_cosine_std", block, cosine.std(dim=1, correction=0))
        self._add_magnitude(tap, "abs_mean_cls", block, cls)
        if registers.shape[1]:
            self._add(tap, "cls_register_cosine", block, token_cosine(cls, registers).mean(dim=1))

    def taps(self) -> dict[str, TapStatistics]:
        """Stack the blocks that ran; empty where the model has none."""
        found = {}
        for tap in TAPS:
            rows = {name: self._stack(tap, name) for name in TapStatistics.__dataclass_fields__}
            if rows["patch_patch_cosine"] is not None:
                found[tap] = TapStatistics(**rows)
        return found

    def _add(self, tap: str, statistic: str, block: int, values: Tensor) -> None:
        self.per_image[tap, statistic, block].append(values.cpu().double())

    def _add_magnitude(self, tap: str, statistic: str, block: int, rows: Tensor) -> None:
        key = (tap, statistic, block)
        total = rows.abs().sum(dim=0).cpu().double()
        self.sums[key] = self.sums[key] + total if key in self.sums else total
        self.counts[key] += len(rows)

    def _stack(self, tap: str, statistic: str) -> Tensor | None:
        rows = [torch.cat(v) for key, v in sorted(self.per_image.items()) if key[:2] == (tap, statistic)]
        rows += [v / self.counts[key] for key, v in sorted(self.sums.items()) if key[:2] == (tap, statistic)]
        return torch.stack(rows) if rows else None


def _resolve_block(block: int | None, count: int) -> int | None:
    if block is None or count == 0:
        return None
    if not -count <= block < count:
        raise ValueError(f"norm_block {block} is out of range: the model has {count} blocks, 0..{count - 1}")
    return block % count


def _checked_grid(model: nn.Module, pixel_values: Tensor, grid: tuple | None, plain: bool) -> tuple[int, int] | None:
    if pixel_values.dim() != 4:
        raise ValueError(
            f"expected pixel values (batch, channels, height, width), got shape {tuple(pixel_values.shape)}"
        )
    if not torch.isfinite(pixel_values).all():
        raise ValueError("the pixel values contain NaN or infinity; check the images and the processor")
    if not plain:
        return grid
    found = find_grid(model, *pixel_values.shape[-2:])
    if grid is not None and grid != found:
        raise ValueError(f"expected images of one size: {grid[0]}x{grid[1]} patches so far, now {found[0]}x{found[1]}")
    return found


def _extra_inputs(model: nn.Module, pixel_values: Tensor) -> dict:
    """Arguments that make a model see all patches in order and accept another image size than its own."""
    accepted = inspect.signature(model.forward).parameters
    inputs = {}
    size = getattr(model.config, "image_size", None)
    own_size = (size, size) if isinstance(size, int) else tuple(size or ())
    if "interpolate_pos_encoding" in accepted and own_size != tuple(pixel_values.shape[-2:]):
        inputs["interpolate_pos_encoding"] = True
    if "noise" in accepted:  # masked autoencoders shuffle the patches by sorting this noise
        height, width = find_grid(model, *pixel_values.shape[-2:])
        inputs["noise"] = torch.arange(height * width, device=pixel_values.device).expand(len(pixel_values), -1)
    return inputs


def _patch_features(
    output, layout: TokenLayout, grid: tuple | None, pixel_values: Tensor
) -> tuple[Tensor | None, tuple]:
    """The last patch features (batch, patches, hidden) of a model's or backbone's output, and their grid."""
    final = getattr(output, "last_hidden_state", None)
    if final is None:
        maps = getattr(output, "feature_maps", None)
        final = maps[-1] if maps else None
    if final is None:
        return None, grid
    if final.dim() == 4:
        return final.flatten(2).transpose(1, 2), tuple(final.shape[-2:])
    if grid is None:  # a model of several stages: one token per (height * width / tokens) pixels
        height, width = pixel_values.shape[-2:]
        stride = round((height * width / final.shape[1]) ** 0.5)
        grid = (height // stride, width // stride)
    return layout.split(final, grid[0] * grid[1])[2], grid


def _skipped(model, blocks, layout: TokenLayout, collector: _Collector, keep_features: bool, features: list) -> dict:
    reasons = {}
    name = type(model).__name__
    if not blocks:
        why = f"{name} is no plain ViT: found no single sequence of blocks with norm1, attention, norm2 and mlp"
        return {"token_similarity": why, "dimensions": why, "patch_norms": why}
    if layout.num_cls == 0:
        reasons["cls_patch_cosine"] = reasons["dimensions"] = f"{name} has no class token"
    elif not any("cls_patch_cosine" in key for key in collector.per_image):
        reasons["cls_patch_cosine"] = reasons["dimensions"] = f"the blocks of {name} run without their class token"
    if layout.num_cls == 0 or layout.num_registers == 0:
        reasons["cls_register_cosine"] = f"{name} has no {'registers' if layout.num_cls else 'class token'}"
    if keep_features and not features:
        reasons["pca"] = f"the output of {name} has neither last_hidden_state nor feature_maps"
    return reasons
