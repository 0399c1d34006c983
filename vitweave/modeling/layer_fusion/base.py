"""What the layer fusions share: their input and output, the norm of each layer, and the zero-initialised read-out."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

NEEDS = ("cls", "patches", "patch_means")
NORMS = ("none", "shared", "per_layer")


@dataclass
class LayerTokens:
    """The tokens of the selected layers of one encoder, shallow to deep, and what the encoder returns by itself.

    Args:
        cls: (batch, layers, hidden).
        patches: (batch, layers, patches, hidden); None if the fusion does not need them.
        grid: (height, width), patches = height * width, never assumed square.
        base_cls: (batch, hidden), the pooled output of the encoder without fusion. Not `cls[:, -1]`: the final norm
            lies between the two in most encoders, and only this one makes the unfused start exact.
        base_patches: (batch, patches, hidden), the same for the patches.
        patch_mask: (batch, patches), True = valid; every image has at least one valid patch.
        patch_means: (batch, layers, hidden), means of the valid patches of every layer, where they are known already
            (cached features); `mean_patches` computes them otherwise.
    """

    cls: Tensor
    patches: Tensor | None
    grid: tuple[int, int]
    base_cls: Tensor
    base_patches: Tensor | None
    patch_mask: Tensor | None = None
    patch_means: Tensor | None = None

    def mean_patches(self) -> Tensor:
        """(batch, layers, hidden), the mean of the valid patches of every layer."""
        return mean_of_valid(self.patches, self.patch_mask) if self.patch_means is None else self.patch_means


@dataclass
class FusedTokens:
    """What a layer fusion returns.

    Args:
        pooled: (batch, hidden).
        patches: (batch, patches, hidden), row by row; None if the fusion leaves them as they are (`base_patches`).
        feature_maps: (batch, channels_k, height_k, width_k), fine to coarse.
        layer_weights: (layers,), or (batch, layers) where they depend on the image; what each layer counts.
        attentions: what the fusion attended to, if asked for; its shape is in the docstring of the fusion.
        extra_tokens: (batch, extra tokens, hidden), tokens that belong to no place on the grid.
    """

    pooled: Tensor
    patches: Tensor | None = None
    feature_maps: tuple[Tensor, ...] | None = None
    layer_weights: Tensor | None = None
    attentions: Tensor | None = None
    extra_tokens: Tensor | None = None


class LayerFusion(nn.Module):
    """Tokens of several layers of one encoder to one embedding, and patches or maps where the fusion is dense.

    A fusion takes `(num_layers, hidden_size, **its own options)` and maps `LayerTokens` to `FusedTokens`. Its options
    are keyword arguments of its constructor, `norm` and `direct` among them:

        norm: "per_layer" gives every layer a LayerNorm of its own, [CLS] and patches apart, because the norm of the
            residual stream grows with depth. "none" reads the tokens as they come. "shared" does so too: whoever calls
            the fusion has applied the encoder's final norm to every layer (`VisionEncoder(final_norm=True)`).
        direct: False returns `base + gamma * fused` with gamma zero at the start, so that the output is the encoder's
            own, bit for bit, until training moves gamma; the fusion itself must then not start at zero, or nothing
            would ever get a gradient. True returns `fused`, as the papers do.

    Start values: transformers initialises out-of-tree models leaf by leaf. A module of ours whose own parameters start
    at special values has a method `set_start_values()` that sets them with `transformers.initialization` (which leaves
    loaded weights alone); the constructor calls it, and so does `_init_weights` of every vitweave model.

    `map_channels` says which maps a backbone can take from the fusion: the channels of each of its `feature_maps`, or
    of the fused patches as one map; empty where it fuses no patches. It follows from the read-out "patch", and a
    fusion that returns its patches or maps otherwise sets it itself.

    Args:
        needs: what the fusion reads of `LayerTokens`: "cls", "patches", "patch_means".
        residuals: names of the read-outs, each with a `gamma_<name>`.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        needs: Collection[str] = ("cls",),
        residuals: Collection[str] = ("global",),
        norm: str = "per_layer",
        direct: bool = False,
    ):
        super().__init__()
        check_choice("norm", norm, NORMS)
        if num_layers < 1:
            raise ValueError(f"expected at least one layer to fuse, got num_layers={num_layers}")
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self.needs, self.norm_kind, self.direct = frozenset(needs), norm, direct
        self.map_channels: tuple[int, ...] = (hidden_size,) if "patch" in residuals else ()
        if norm == "per_layer" and "cls" in self.needs:
            self.norm_cls = layer_norms(num_layers, hidden_size)
        if norm == "per_layer" and "patches" in self.needs:
            self.norm_patch = layer_norms(num_layers, hidden_size)
        if norm == "per_layer" and "patch_means" in self.needs:
            self.norm_mean = layer_norms(num_layers, hidden_size)
        for name in () if direct else residuals:
            self.register_parameter(f"gamma_{name}", nn.Parameter(torch.zeros(hidden_size)))

    def set_start_values(self) -> None:
        """Give the fusion's own parameters their start values: gammas zero; a subclass adds its own."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("gamma_"):
                init.zeros_(parameter)

    def normed_cls(self, tokens: LayerTokens) -> Tensor:
        """(batch, layers, hidden) after the norm of each layer."""
        return apply_norms(self.norm_cls, tokens.cls) if self.norm_kind == "per_layer" else tokens.cls

    def normed_patches(self, tokens: LayerTokens) -> Tensor:
        """(batch, layers, patches, hidden) after the norm of each layer."""
        return apply_norms(self.norm_patch, tokens.patches) if self.norm_kind == "per_layer" else tokens.patches

    def normed_means(self, tokens: LayerTokens) -> Tensor:
        """(batch, layers, hidden), the mean of the valid patches of each layer after the norm of that layer."""
        means = tokens.mean_patches()
        return apply_norms(self.norm_mean, means) if self.norm_kind == "per_layer" else means

    def residual(self, name: str, base: Tensor, fused: Tensor) -> Tensor:
        """`base + gamma_<name> * fused`, or `fused` alone in the direct form."""
        return fused if self.direct else base + getattr(self, f"gamma_{name}") * fused

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Warn of options that fit no grid of (height, width) patches; for whoever knows the grid when it builds."""

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        raise NotImplementedError


class ZeroLinear(nn.Linear):
    """Linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        self.set_start_values()

    def set_start_values(self) -> None:
        """Weight and bias zero."""
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class FeedForward(nn.Module):
    """`fc2(gelu(fc1(x)))`.

    Args:
        last: the class of `fc2`, `ZeroLinear` for an output that starts at zero.
    """

    def __init__(self, in_features: int, hidden_features: int, out_features: int, last: type[nn.Linear] = nn.Linear):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = last(hidden_features, out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


def layer_norms(num_layers: int, hidden_size: int) -> nn.ModuleList:
    """One LayerNorm per layer."""
    return nn.ModuleList(nn.LayerNorm(hidden_size, eps=1e-6) for _ in range(num_layers))


def apply_norms(norms: nn.ModuleList, states: Tensor) -> Tensor:
    """The norm of each layer on (batch, layers, ..., hidden)."""
    return torch.stack([norm(state) for norm, state in zip(norms, states.unbind(1), strict=True)], dim=1)


def mean_of_valid(patches: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid patches.

    Args:
        patches: (batch, ..., patches, hidden).
        mask: (batch, patches), True = valid, or None for all.

    Returns:
        (batch, ..., hidden).
    """
    if mask is None:
        return patches.mean(dim=-2)
    valid = mask.view(mask.shape[0], *[1] * (patches.ndim - 3), mask.shape[1], 1)
    return patches.masked_fill(~valid, 0).sum(dim=-2) / valid.sum(dim=-2).clamp(min=1)


def check_choice(option: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that an option does not have."""
    if value not in known:
        raise ValueError(f"expected {option} to be one of {sorted(known, key=str)}, got {value!r}")
