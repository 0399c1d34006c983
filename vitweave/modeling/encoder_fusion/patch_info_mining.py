"""Every low-resolution token looks at the window of high-resolution cells that it covers (Mini-Gemini)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitweave.configuration.encoder_fusion_plans import Grid, finest_grid, plan_patch_info_mining
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import bilinear, map_to_tokens
from vitweave.modeling.start_values import start_as_in_torch


class CentredCells(torch.autograd.Function):
    """Copied windows of cells, centred over the channels, and their norms; one temporary tensor on the way back.

    Takes a view (batch, height, width, channels, window height, window width), returns (windows, channels, cells) and
    (windows, cells).
    """

    @staticmethod
    def forward(ctx, split: Tensor) -> tuple[Tensor, Tensor]:
        cells = split.clone(memory_format=torch.contiguous_format).flatten(4).flatten(0, 2)
        cells.sub_(cells.mean(dim=1, keepdim=True))
        precise = torch.promote_types(cells.dtype, torch.float32)
        norms = torch.linalg.vector_norm(cells, dim=1, dtype=precise)
        ctx.shape = split.shape
        ctx.save_for_backward(cells, norms)
        return cells, norms

    @staticmethod
    def backward(ctx, to_cells: Tensor, to_norms: Tensor) -> Tensor:
        cells, norms = ctx.saved_tensors
        along = (to_norms / norms).masked_fill(norms == 0, 0).to(cells.dtype)  # cells all the same have no direction
        gradient = torch.addcmul(to_cells, cells, along[:, None]).sub_(to_cells.mean(dim=1, keepdim=True))
        return gradient.view(ctx.shape)


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
        cells, norms = CentredCells.apply(split)  # (windows, detail channels, cells), (windows, cells)
        variance = norms.square() / cells.shape[1]  # (windows, cells)
        to_unit_k, to_unit_v = (
            (variance + norm.eps).rsqrt().to(cells.dtype)[:, None] for norm in (self.k_norm, self.v_norm)
        )
        folded = (query @ self.k_proj.weight)[:, None]  # (windows, 1, detail channels)
        # the shift is the same for all cells of a window; only beside NaN scores, which count as zero, does it matter
        shift = folded @ self.k_norm.bias + (query @ self.k_proj.bias)[:, None]
        scores = (folded * self.k_norm.weight) @ cells * to_unit_k + shift[:, None]
        weights = torch.nan_to_num(scores).softmax(dim=2) * to_unit_v  # (windows, 1, cells)
        average = (cells @ weights.transpose(1, 2))[:, :, 0]  # (windows, detail channels)
        return self.v_proj(average * self.v_norm.weight + self.v_norm.bias)

    def plain_attention(self, query: Tensor, split: Tensor) -> Tensor:
        """Keys and values of every cell; shapes as in `folded_attention`."""
        cells = split.flatten(4).flatten(0, 2).transpose(1, 2)  # (windows, cells, detail channels)
        keys, values = self.k_proj(self.k_norm(cells)), self.v_proj(self.v_norm(cells))
        scores = query[:, None] @ keys.transpose(1, 2)
        return (torch.nan_to_num(scores).softmax(dim=2) @ values)[:, 0]
