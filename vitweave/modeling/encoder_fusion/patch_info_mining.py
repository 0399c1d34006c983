"""Every low-resolution token looks at the window of high-resolution cells that it covers (Mini-Gemini)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitweave.configuration.encoder_fusion_plans import Grid, finest_grid, plan_patch_info_mining
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import bilinear, map_to_tokens
from vitweave.modeling.linear_weights import weight_of
from vitweave.modeling.start_values import start_as_in_torch


class WindowAttention(torch.autograd.Function):
    """The average of normed cells, weighted by the softmax of their products with the query of their window.

    With w the cells centred over the channels, `score_j = query . w_j / std_j + shift` and
    `average = sum_j softmax(score)_j w_j / std_j`. Written out because the gradient then needs one tensor of the size
    of the cells, where the chain of operations holds three at once. All tensors have the type of the map.

    Args:
        split: (batch, height, width, channels, window height, window width), a view of a map.
        query: (windows, 1, channels); windows = batch * height * width.
        shift: (windows, 1, 1).
        eps: of the norms behind the scores and behind the average.
    """

    @staticmethod
    def forward(ctx, split: Tensor, query: Tensor, shift: Tensor, eps: tuple[float, float]) -> Tensor:
        cells = split.clone(memory_format=torch.contiguous_format).flatten(4).flatten(0, 2)
        cells.sub_(cells.mean(dim=1, keepdim=True))
        precise = torch.promote_types(cells.dtype, torch.float32)
        variance = torch.linalg.vector_norm(cells, dim=1, keepdim=True, dtype=precise).square() / cells.shape[1]
        unit_k, unit_v = ((variance + value).rsqrt().to(cells.dtype) for value in eps)  # (windows, 1, cells)
        products = query @ cells
        scores = products * unit_k + shift
        weights = torch.nan_to_num(scores).softmax(dim=2)
        ctx.shape = split.shape
        ctx.save_for_backward(cells, query, unit_k, unit_v, products, weights, scores.isfinite())
        return (weights * unit_v) @ cells.transpose(1, 2)  # (windows, 1, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_average: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        cells, query, unit_k, unit_v, products, weights, finite = ctx.saved_tensors
        along = to_average @ cells  # (windows, 1, cells)
        to_weights = along * unit_v
        to_scores = weights * (to_weights - (weights * to_weights).sum(dim=2, keepdim=True)) * finite
        to_products = to_scores * unit_k
        to_query, to_shift = to_products @ cells.transpose(1, 2), to_scores.sum(dim=2, keepdim=True)
        if not ctx.needs_input_grad[0]:
            return None, to_query, to_shift, None
        # d unit / d variance = -unit^3 / 2, and d variance / d cell = 2 cell / channels
        to_variance = to_scores * products * unit_k**3 + weights * along * unit_v**3
        factors = torch.cat([to_products, weights * unit_v], dim=1)  # (windows, 2, cells)
        to_cells = torch.cat([query, to_average], dim=1).transpose(1, 2) @ factors
        to_cells.addcmul_(cells, to_variance, value=-1 / cells.shape[1])
        return to_cells.sub_(to_cells.mean(dim=1, keepdim=True)).view(ctx.shape), to_query, to_shift, None


class PatchInfoMiningFusion(EncoderFusion):
    """Patch info mining of Mini-Gemini (arXiv:2403.18814).

    The tokens of encoder 0 are queries; the maps of all others, on their finest grid, are the detail. A query reads the
    window of cells that it covers, M x M of them where M is the ratio of the sides:

        score_j = softmax_scale * q_proj(q_norm(query)) . k_proj(k_norm(cell_j))
        out = query + sum_j softmax(score)_j v_proj(v_norm(cell_j))

    with one head, and NaN scores count as zero. All layers start as torch draws them, so that a new fusion does not
    return the queries. The MLP of the paper is the projector behind the tower. The released code scales the scores by
    1/sqrt(channels) and has the norms; the paper writes neither: `softmax_scale=1.0` is its form.

    Several views of an image (the HD models) come as the map (batch, views, channels, height, width) of encoder 0, the
    view of the whole image first, then crops row by row; the detail covers the whole image. The crops are put
    together again and mined on one grid, the global view reads the detail shrunk to 1 / crops. The tokens are those of
    the views, one after the other.

    Evaluation: the norms' affine parts and W_k are folded into the query and W_v is applied behind the average, so that
    neither keys nor values exist: 2 c (c + c_aux) multiplications per query instead of 2 M^2 c c_aux, and one copy of
    the detail. It reads the weights of `k_proj` and `v_proj`, so projections that something has wrapped (LoRA before
    merging, quantisation) are evaluated as they are written. `k_proj.bias` and `k_norm.bias` cancel in the softmax:
    their gradients are zero but for rounding.

    Args:
        softmax_scale: None for 1 / sqrt(channels of encoder 0).
        crops: number of crops per side, 1 for the whole image.
        has_global_view: whether the first view shows the whole image beside crops.
    """

    takes_views = True

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        softmax_scale: float | None = None,
        crops: int = 1,
        has_global_view: bool = False,
    ):
        options = {"hidden_size": hidden_size, "crops": crops, "has_global_view": has_global_view}
        super().__init__(partial(plan_patch_info_mining, in_channels, **options), grids)
        channels, detail_channels = in_channels[0], sum(in_channels[1:])
        self.crops, self.has_global_view = crops, has_global_view
        self.softmax_scale = channels**-0.5 if softmax_scale is None else softmax_scale
        self.q_norm, self.q_proj = nn.LayerNorm(channels), nn.Linear(channels, channels)
        self.k_norm, self.k_proj = nn.LayerNorm(detail_channels), nn.Linear(detail_channels, channels)
        self.v_norm, self.v_proj = nn.LayerNorm(detail_channels), nn.Linear(detail_channels, channels)

    def set_start_values(self) -> None:
        """As torch draws them."""
        start_as_in_torch(self)

    def forward(self, features: EncoderMaps) -> Tensor:
        """(batch, tokens of all views, channels of encoder 0)."""
        views, detail = features.maps[0], self.common_detail(features.maps[1:])
        if views.ndim == 4:
            views = views[:, None]
        mined = []
        if self.has_global_view:
            shrunk = detail if self.crops == 1 else bilinear(detail, self.shrunk_grid(detail))
            mined.append(map_to_tokens(self.mine(views[:, 0], shrunk)))
            views = views[:, 1:]
        mined.append(self.mine_crops(views, detail))
        return torch.cat(mined, dim=1) if len(mined) > 1 else mined[0]

    def common_detail(self, maps: Sequence[Tensor]) -> Tensor:
        """The maps on the finest of their grids, one behind the other in the channels."""
        if len(maps) == 1:
            return maps[0]
        grid = finest_grid([(part.shape[2], part.shape[3]) for part in maps])
        return torch.cat([bilinear(part, grid) for part in maps], dim=1)

    def shrunk_grid(self, detail: Tensor) -> Grid:
        """The grid of the detail for the global view."""
        return detail.shape[2] // self.crops, detail.shape[3] // self.crops

    def mine_crops(self, crops: Tensor, detail: Tensor) -> Tensor:
        """(batch, crops^2, channels, height, width) to the tokens of all crops, (batch, tokens, channels)."""
        if self.crops == 1:
            return map_to_tokens(self.mine(crops[:, 0], detail))
        side, (height, width) = self.crops, crops.shape[-2:]
        # (batch, row, column, channels, y, x) -> (batch, channels, row, y, column, x)
        whole = crops.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        mined = self.mine(whole, detail).unflatten(3, (side, width)).unflatten(2, (side, height))
        return mined.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)  # (batch, row, column, y, x, channels)

    def mine(self, queries: Tensor, detail: Tensor) -> Tensor:
        """
        Args:
            queries: (batch, channels, height, width).
            detail: (batch, detail channels, height * window height, width * window width).

        Returns:
            (batch, channels, height, width).
        """
        height, width = queries.shape[-2:]
        tokens = queries.permute(0, 2, 3, 1).flatten(0, 2)  # (batch * height * width = windows, channels)
        query = self.q_proj(self.q_norm(tokens)) * self.softmax_scale
        split = detail.unflatten(3, (width, -1)).unflatten(2, (height, -1)).permute(0, 2, 4, 1, 3, 5)
        folds = type(self.k_proj) is type(self.v_proj) is nn.Linear
        mined = self.folded_attention(query, split) if folds else self.plain_attention(query, split)
        return (tokens + mined).unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)

    def folded_attention(self, query: Tensor, split: Tensor) -> Tensor:
        """
        Args:
            query: (windows, channels), scaled.
            split: the detail as (batch, height, width, detail channels, window height, window width).

        Returns:
            (windows, channels).
        """
        folded = (query @ weight_of(self.k_proj))[:, None]  # (windows, 1, detail channels)
        # the shift is the same for all cells of a window; only beside NaN scores, which count as zero, does it matter
        shift = folded @ self.k_norm.bias + (query @ self.k_proj.bias)[:, None]
        eps = (self.k_norm.eps, self.v_norm.eps)
        given = [part.to(split.dtype) for part in (folded * self.k_norm.weight, shift[:, None])]
        device = "cpu" if split.device.type == "meta" else split.device.type  # meta tensors have no autocast
        with torch.autocast(device, enabled=False):  # the way back runs without it, too
            average = WindowAttention.apply(split, *given, eps)[:, 0]
        return self.v_proj(average * self.v_norm.weight + self.v_norm.bias)

    def plain_attention(self, query: Tensor, split: Tensor) -> Tensor:
        """Keys and values of every cell; shapes as in `folded_attention`."""
        cells = split.flatten(4).flatten(0, 2).transpose(1, 2)  # (windows, cells, detail channels)
        keys, values = self.k_proj(self.k_norm(cells)), self.v_proj(self.v_norm(cells))
        scores = query[:, None] @ keys.transpose(1, 2)
        return (torch.nan_to_num(scores).softmax(dim=2) @ values)[:, 0]
