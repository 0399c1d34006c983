"""One Q-Former over the tokens of all encoders."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers import initialization as init

from vitweave.configuration.encoder_fusion_plans import Grid, plan_query_former
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps


class QueryFormerFusion(EncoderFusion):
    """The multi-encoder querying transformer (MEQ-Former) of BRAVE (arXiv:2404.07204), which has no released code.

    The tokens of every encoder are projected to a common width and concatenated, without encoder embeddings; learnt
    queries attend to them in every second block of a Q-Former. The Q-Former is BLIP-2's (arXiv:2301.12597) as in
    transformers, the form whose parameters add up to the paper's 116 million; InstructBLIP's adds a second feed-forward
    part for text, which a fusion of images would never use. The paper's queries also attend to the prompt.

    In training, each encoder of each image is left out with probability `encoder_dropout`: its tokens are masked in
    the cross-attention. One encoder always stays (of those that were all drawn to go, one at random).

    Args:
        in_channels, grids: as in every fusion.
        hidden_size: of the output, by one linear layer; None for the queries as they are, `width` wide.
        queries_per_encoder: so many queries for each encoder; all of them read all encoders.
        width: of the queries.
        depth: blocks.
        num_heads: of all attentions.
        mlp_ratio: width of the feed-forward parts.
        encoder_hidden_size: what the tokens of every encoder are projected to.
        cross_attention_frequency: every so many blocks, from the first one, attend to the encoders.
        encoder_dropout: probability in [0, 1).
        dropout: of hidden states and attention weights.
    """

    takes_prefixes = True

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        queries_per_encoder: int = 32,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        encoder_hidden_size: int = 1408,
        cross_attention_frequency: int = 2,
        encoder_dropout: float = 0.2,
        dropout: float = 0.1,
    ):
        sizes = {"hidden_size": hidden_size, "queries_per_encoder": queries_per_encoder, "width": width}
        super().__init__(partial(plan_query_former, in_channels, **sizes), grids)
        if not 0 <= encoder_dropout < 1:
            raise ValueError(f"expected encoder_dropout in [0, 1), got {encoder_dropout}")
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"expected num_heads to divide width={width}, got {num_heads}")
        if min(depth, cross_attention_frequency) < 1:
            raise ValueError(
                f"expected at least one block and cross-attention at least in the first one, got depth={depth},"
                f" cross_attention_frequency={cross_attention_frequency}"
            )
        self.encoder_dropout = encoder_dropout
        self.projections = nn.ModuleList(nn.Linear(channels, encoder_hidden_size) for channels in in_channels)
        self.query = nn.Parameter(torch.empty(self.num_tokens, width))
        self.q_former = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=depth,
                num_attention_heads=num_heads,
                intermediate_size=int(width * mlp_ratio),
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                cross_attention_frequency=cross_attention_frequency,
                encoder_hidden_size=encoder_hidden_size,
            )
        )
        self.output = nn.Identity() if hidden_size is None else nn.Linear(width, hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        """Queries from a narrow normal distribution."""
        init.normal_(self.query, std=0.02)

    def forward(self, features: EncoderMaps) -> Tensor:
        tokens = [feature_map.flatten(2).transpose(1, 2) for feature_map in features.maps]
        for index, prefix in enumerate(features.prefixes):
            if prefix is not None:
                tokens[index] = torch.cat([prefix, tokens[index]], dim=1)
        states = [projection(part) for projection, part in zip(self.projections, tokens, strict=True)]
        mask = self.kept_tokens(states) if self.training and self.encoder_dropout > 0 else None
        states = torch.cat(states, dim=1)  # (batch, tokens of all encoders, encoder_hidden_size)
        fused = self.q_former(
            query_embeds=self.query.expand(states.shape[0], -1, -1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        return self.output(fused.last_hidden_state)

    def kept_tokens(self, states: list[Tensor]) -> Tensor:
        """(batch, tokens of all encoders), True for those of the encoders that are kept this time."""
        kept = keep_encoders(states[0].shape[0], len(states), self.encoder_dropout, states[0].device)
        each = kept.split(1, dim=1)
        return torch.cat([flag.expand(-1, part.shape[1]) for flag, part in zip(each, states, strict=True)], dim=1)


def keep_encoders(batch: int, encoders: int, dropout: float, device: torch.device) -> Tensor:
    """(batch, encoders), each True with probability 1 - dropout, but at least one of each image."""
    draws = torch.rand(batch, encoders, device=device)
    luckiest = draws == draws.amax(dim=1, keepdim=True)
    return (draws >= dropout) | luckiest
