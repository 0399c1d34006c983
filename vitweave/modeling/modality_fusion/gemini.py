"""GeminiFusion: every token attends to itself and to the tokens of the other modalities at its own place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import BlockInputs, hide_absent, keep_unfused, others
from vitweave.modeling.modality_fusion.base_attention import AttentionUnits


class GeminiFusion(AttentionUnits):
    """Pixel-wise fusion of GeminiFusion (arXiv:2406.01210).

    A token x_m has one query, and two keys and values for another modality's token x_o of the same place: its own, with
    a learnt noise added, and the other's; the key of the other is its own token gated by the relation of the two.

        r   = phi(x_m, x_o)                          (hidden,), sums to 1
        k_A = W_k (x_m + n_k)     v_A = W_v (x_m + n_v) + b_v
        k_B = W_k (x_m * r)       v_B = W_v x_o + b_v
        y_m = x_m + W_out [share_A v_A + share_B v_B] + b_out,   shares = softmax(q k_A / sqrt(d), q k_B / sqrt(d))

    It is evaluated by differences: share_B = sigmoid(-q (k_A - k_B) / sqrt(d)), where k_A - k_B takes one projection.
    Tokens at different places never meet, so the cost is linear in their number.

    The released checkpoints have projections and noise for each stream that is updated, 8 heads and an output
    projection: `form="released"`, the default. `form="paper"` is Equation 6 as it is printed: one projection and noise
    for all streams, one head, no biases, no output projection. Both gate by a two-layer MLP with a softmax over the
    channels, which the streams share.

    More than two modalities, which have no published form (the released code merges all but the first): a token has
    its own noisy key and one of each other modality, and the softmax runs over all of them. A modality that is absent
    has no share, and with two present out of three the result is that of the two.

    The released code starts with a perturbation of the encoder (`start="released"`). By default the output projection
    is zero at the start, so the fusion is the identity; it is the only part with a gradient in the very first step.

    Args:
        num_modalities, hidden_size: as in every fusion.
        num_heads: of the attention.
        form: "released" or "paper".
        start: "identity" or "released".
    """

    def __init__(
        self,
        num_modalities: int,
        hidden_size: int,
        *,
        num_heads: int = 8,
        form: str = "released",
        start: str = "identity",
    ):
        super().__init__(num_modalities, hidden_size, num_heads, form, start)
        units = self.to_key.weight.shape[0]
        self.relation = Relation(hidden_size)
        self.key_noise = nn.Parameter(torch.empty(units, hidden_size))
        self.value_noise = nn.Parameter(torch.empty(units, hidden_size))
        self.set_start_values()

    def set_start_values(self) -> None:
        """Noise from a standard normal distribution; the projections see `start`."""
        super().set_start_values()
        self.relation.set_start_values()
        init.normal_(self.key_noise)
        init.normal_(self.value_noise)

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, None]:
        known = hide_absent(streams, inputs.present)
        neighbours = others(known)  # (modalities, others, batch, tokens, hidden)
        shares = self.other_shares(known, self.relation(known, neighbours), inputs.present).unsqueeze(-1)
        own = self.by_head(self.to_value(known, shift=self.value_noise))  # (modalities, batch, tokens, heads, width)
        offers = self.by_head(self.to_value(neighbours))  # (modalities, others, batch, tokens, heads, width)
        if self.num_modalities == 2:  # in one pass: on large maps memory costs as much as the products
            mixed = torch.lerp(own, offers[:, 0], shares[:, 0])
        else:
            mixed = own * (1 - shares.sum(dim=1)) + (shares * offers).sum(dim=1)
        fused = known + self.output(mixed.flatten(-2))
        return keep_unfused(fused, streams, inputs.present), None

    def other_shares(self, streams: Tensor, relation: Tensor, present: Tensor | None) -> Tensor:
        """How much each token takes from the tokens of the others, (modalities, others, batch, tokens, heads)."""
        own = streams.unsqueeze(1)
        differences = self.to_key(torch.addcmul(own, own, relation, value=-1), shift=self.key_noise)
        query = self.by_head(self.to_query(streams)).unsqueeze(1)
        scores = (query * self.by_head(differences)).sum(dim=-1) * -((self.hidden_size // self.num_heads) ** -0.5)
        if present is not None:
            scores = scores.masked_fill(~others(present)[..., None, None], float("-inf"))
        if self.num_modalities == 2:
            return scores.sigmoid()
        return torch.cat([torch.zeros_like(scores[:, :1]), scores], dim=1).softmax(dim=1)[:, 1:]


class Relation(nn.Module):
    """How two tokens of one place are related: a softmax over channels of a two-layer MLP of both.

    The layer over [own, other] is stored in two halves, so that the own token is projected once for all of its pairs.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.own_proj = nn.Linear(hidden_size, hidden_size)
        self.other_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate_proj = nn.Linear(hidden_size, hidden_size)

    def set_start_values(self) -> None:
        """Truncated normal weights, no biases."""
        for layer in (self.own_proj, self.other_proj, self.gate_proj):
            init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                init.zeros_(layer.bias)

    def forward(self, streams: Tensor, neighbours: Tensor) -> Tensor:
        """Streams (modalities, ..., hidden) and, of each, the others (modalities, others, ..., hidden).

        Returns:
            (modalities, others, ..., hidden), positive, summing to 1.
        """
        hidden = self.other_proj(neighbours).add_(self.own_proj(streams).unsqueeze(1))
        return self.gate_proj(F.gelu(hidden)).softmax(dim=-1)
