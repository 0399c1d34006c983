"""Cross-attention: every token attends to all tokens of the other modalities."""

import torch.nn.functional as F
from torch import Tensor

from vitweave.modeling.modality_fusion.base import BlockInputs, hide_absent, keep_unfused, others
from vitweave.modeling.modality_fusion.base_attention import AttentionUnits


class CrossAttentionFusion(AttentionUnits):
    """The baseline that GeminiFusion (arXiv:2406.01210, Equation 2) replaces: `y_m = x_m + attention(x_m, x_o, x_o)`.

    Its cost is quadratic in the number of tokens. With more than two modalities, a token attends to the tokens of all
    others in one softmax; absent modalities are masked.

    No checkpoint was released. `form="released"`, the default, has the projections of the released GeminiFusion, by the
    same names, so that one state serves both; `form="paper"` is the equation as it is printed, with one head, one set
    of projections for all streams, no biases and no output projection.

    `per_token` lets a token see only those of its own place, the paper's per-token cross-attention (Equation 3). With
    two modalities that is one key, whose softmax is 1, so `y_m = x_m + W_v x_o`, and queries and keys are idle.

    By default it starts as the identity, with a zero output projection.

    Args:
        num_modalities, hidden_size: as in every fusion.
        num_heads: of the attention.
        form: "released" or "paper".
        per_token: whether a token sees only its own place.
        start: "identity" or "released".
    """

    def __init__(
        self,
        num_modalities: int,
        hidden_size: int,
        *,
        num_heads: int = 8,
        form: str = "released",
        per_token: bool = False,
        start: str = "identity",
    ):
        super().__init__(num_modalities, hidden_size, num_heads, form, start)
        self.per_token = per_token
        if per_token and num_modalities == 2:  # kept for the state, out of training
            self.to_query.requires_grad_(False)
            self.to_key.requires_grad_(False)
        self.set_start_values()

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, None]:
        known = hide_absent(streams, inputs.present)
        read = self.read_place if self.per_token else self.read_all
        fused = known + self.output(read(known, inputs.present).flatten(-2))
        return keep_unfused(fused, streams, inputs.present), None

    def read_all(self, streams: Tensor, present: Tensor | None) -> Tensor:
        """Values of all tokens of the others, averaged: (modalities, batch, tokens, heads, width)."""
        modalities, batch, tokens, _ = streams.shape
        context = others(streams).transpose(1, 2).flatten(2, 3)  # (modalities, batch, others * tokens, hidden)
        query, keys, values = (
            self.by_head(states).flatten(0, 1).transpose(1, 2)  # (modalities * batch, heads, tokens, width)
            for states in (self.to_query(streams), self.to_key(context), self.to_value(context))
        )
        mask = None
        if present is not None and modalities > 2:  # with one other, a stream without it stays as it is
            mask = readable(present).transpose(1, 2).flatten(0, 1)  # (modalities * batch, others)
            mask = mask.repeat_interleave(tokens, dim=1)[:, None, None]
        found = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return found.transpose(1, 2).unflatten(0, (modalities, batch))

    def read_place(self, streams: Tensor, present: Tensor | None) -> Tensor:
        """Values of the others' tokens of the same place, averaged: (modalities, batch, tokens, heads, width)."""
        context = others(streams)
        values = self.by_head(self.to_value(context))  # (modalities, others, batch, tokens, heads, width)
        if self.num_modalities == 2:
            return values[:, 0]
        query, keys = self.by_head(self.to_query(streams)), self.by_head(self.to_key(context))
        scores = (query.unsqueeze(1) * keys).sum(dim=-1) * query.shape[-1] ** -0.5
        if present is not None:
            scores = scores.masked_fill(~readable(present)[..., None, None], float("-inf"))
        return (scores.softmax(dim=1).unsqueeze(-1) * values).sum(dim=1)


def readable(present: Tensor) -> Tensor:
    """(modalities, others, batch): which others are there; all of them where none is, so that no softmax is empty."""
    there = others(present)
    return there | ~there.any(dim=1, keepdim=True)
