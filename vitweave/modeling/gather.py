"""Rows of all processes as one batch, with the gradient of every process."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is another process to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor, fill: float | int | bool = 0) -> Tensor:
    """The rows of all processes below each other, in the order of the processes.

    Processes may hold different numbers of rows (a last batch), and rows of different length, which are padded with
    `fill` to the longest. The gradient of a process's rows is the sum over the losses of all processes; where each
    computes the same loss of the joint batch and DistributedDataParallel averages their gradients, the result is the
    gradient of one process with the joint batch.

    Args:
        rows: (batch, ...), of the same number of dimensions in all processes.
    """
    if not is_distributed():
        return rows
    if rows.dtype == torch.bool:
        return GatherRows.apply(rows.to(torch.uint8), int(fill)).bool()
    return GatherRows.apply(rows, fill)


class GatherRows(torch.autograd.Function):
    """All rows forward; backward the sum over processes of the gradients of the own rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, fill: float | int) -> Tensor:
        shapes = gather_shapes(rows)
        longest = shapes.amax(dim=0).tolist()
        padded = pad_to(rows, longest, fill).contiguous()
        gathered = [torch.empty_like(padded) for _ in range(len(shapes))]
        dist.all_gather(gathered, padded)
        counts = shapes[:, 0].tolist()
        ctx.own_shape, ctx.start = rows.shape, sum(counts[: dist.get_rank()])
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        own = gradient[ctx.start : ctx.start + ctx.own_shape[0]]
        return own[tuple(slice(size) for size in ctx.own_shape)], None


def gather_shapes(rows: Tensor) -> Tensor:
    """(processes, dimensions), the shape of `rows` in every process."""
    own = torch.tensor([rows.ndim, *rows.shape], device=rows.device)
    shapes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, own)
    return torch.stack(shapes)[:, 1:].cpu()


def pad_to(rows: Tensor, shape: list[int], fill: float | int) -> Tensor:
    """Append `fill` to every dimension until `rows` has the given shape."""
    missing = [(0, size - have) for size, have in zip(shape, rows.shape, strict=True)]
    return F.pad(rows, [edge for pair in reversed(missing) for edge in pair], value=fill)
