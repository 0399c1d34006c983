"""Token sequences and maps: splitting, reshaping, and running a layer by the role of each token."""

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction


def split_prefix(tokens: Tensor, num_cls: int, num_registers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a ViT sequence into class, register and patch tokens.

    Args:
        tokens: (batch, num_cls + num_registers + patches, hidden), class tokens first.

    Returns:
        cls (batch, num_cls, hidden), registers (batch, num_registers, hidden), patches (batch, patches, hidden).
    """
    rest = tokens[:, num_cls:]
    return tokens[:, :num_cls], rest[:, :num_registers], rest[:, num_registers:]


def tokens_to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, height * width, hidden) -> (batch, hidden, height, width)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def add_linear(
    parent: nn.Module,
    name: str,
    in_features: int,
    out_features: int,
    bias: bool,
    specialized: bool,
    cls_rank: int,
    down: str | None = None,
):
    """Give `parent` the linear layer `name` and, if specialised, its [CLS] twin or its rank-`cls_rank` update.

    Args:
        down: name of the update's down-projection, by default `<name>_cls_down`; layers that name the same share it.
    """
    patch_layer = nn.Linear(in_features, out_features, bias=bias)
    setattr(parent, name, patch_layer)
    if specialized and cls_rank:
        down = down or f"{name}_cls_down"
        if not hasattr(parent, down):
            setattr(parent, down, LowRankDown(in_features, cls_rank, bias=False))
        setattr(parent, f"{name}_cls_up", LowRankUp(cls_rank, out_features, bias=False))
    elif specialized:
        twin = nn.Linear(in_features, out_features, bias=bias)
        twin.patch_layer = (patch_layer,)  # in a tuple it is no sub-module: only the initialisation looks at it
        setattr(parent, f"{name}_cls", twin)


class LowRankDown(nn.Linear):
    """Down-projection of a low-rank update; drawn Kaiming-uniform."""


class LowRankUp(nn.Linear):
    """Up-projection of a low-rank update; starts at zero, so that the update does."""


def by_role(parent: nn.Module, name: str, num_cls_rows: int, *inputs: Tensor) -> Tensor:
    """Run the token-wise layer `parent.<name>` with the weights that each token's role owns.

    The patch layer runs on all rows and the few [CLS] rows are then overwritten: in eager mode this is the fastest of
    the equivalent forms, because nothing long is split or concatenated. Layers are called as modules, so adapters,
    hooks and quantised replacements keep working. The overwrite is in place, which autograd allows for the outputs of
    linear, norm and LayerScale layers.

    Args:
        inputs: the layer's arguments, each (batch, tokens, hidden) with the [CLS] rows first.
    """
    output = getattr(parent, name)(*inputs)
    twin = getattr(parent, f"{name}_cls", None)
    if twin is not None:
        return overwrite_rows(output, twin(*leading_rows(inputs, num_cls_rows))[:, :num_cls_rows])
    up = getattr(parent, f"{name}_cls_up", None)
    if up is not None:
        down = getattr(parent, f"{name}_cls_down", None) or parent.qkv_cls_down
        update = parent.cls_scale * up(down(inputs[0][:, :num_cls_rows]))
        return overwrite_rows(output, output[:, :num_cls_rows] + update)
    return output


def overwrite_rows(output: Tensor, rows: Tensor) -> Tensor:
    """Put `rows` (batch, n, hidden) in the place of the first n rows of `output` (batch, tokens, hidden)."""
    if not torch.compiler.is_compiling() and isinstance(output.grad_fn, BackwardCFunction):
        # behind a backward hook or another custom function autograd forbids writing in place
        return torch.cat((rows.to(output.dtype), output[:, rows.shape[1] :]), dim=1)
    output[:, : rows.shape[1]] = rows.to(output.dtype)
    return output


def leading_rows(inputs: tuple[Tensor, ...], num_rows: int) -> list[Tensor]:
    """The first rows of each (batch, tokens, hidden), as a tensor of their own.

    Contiguous, or linear layers take a slow batched path. Products of few rows, not a multiple of 4, are summed in
    another order and round differently (1e-5 on a ViT-Ti's logits, more row counts with more threads): a small batch
    gets more rows, which the caller drops, so that an image's output does not depend on the batch it is in.
    """
    batch = inputs[0].shape[0]
    if not torch.compiler.is_compiling() and batch * num_rows < 32:
        num_rows += next(more for more in range(4) if batch * (num_rows + more) % 4 == 0)
    return [tokens[:, :num_rows].contiguous() for tokens in inputs]


class LayerScale(nn.Module):
    """Residual connection with one learnt factor per channel: residual + lambda * branch (arXiv:2103.17239)."""

    def __init__(self, hidden_size: int, value: float):
        super().__init__()
        self.value = value
        self.lambda1 = nn.Parameter(torch.full((hidden_size,), float(value)))

    def forward(self, branch: Tensor, residual: Tensor) -> Tensor:
        return torch.addcmul(residual, branch, self.lambda1)


class DropPath(nn.Module):
    """Drops a whole sample's residual branch in training (arXiv:1603.09382); all its tokens share the draw."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.empty(branch.shape[0], 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.rate)
        return branch * (keep / (1 - self.rate))
