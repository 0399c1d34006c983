"""Tokens of all encoders in one sequence."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitweave.configuration.encoder_fusion_plans import Grid, plan_sequence_concat
from vitweave.modeling.encoder_fusion.base import EncoderFusion, EncoderMaps
from vitweave.modeling.grid_matching import map_to_tokens
from vitweave.modeling.projectors import build_projector


class SequenceConcatFusion(EncoderFusion):
    """The tokens of every encoder through a projector of its own, in turns or one encoder after the other.

    LEO (arXiv:2501.06986): the paper puts one sequence after the other (`order="append"`, also the sequence append of
    EAGLE, arXiv:2408.15998), the code alternates, token k of encoder 0, token k of encoder 1, ... The default is the
    code's order, in which its language model is trained. It needs as many tokens of every encoder, and takes any number
    of encoders in turn. `hidden_size=None` is the first encoder's width.

    Args:
        order: "interleave" or "append".
        projector: one name for all encoders, or one for each, see `PROJECTORS`; "norm_mlp" is LEO's.
        num_prefixes: with "append", how many class tokens and registers each encoder keeps; they lead its tokens and go
            through its projector with them.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        grids: Sequence[Grid],
        hidden_size: int | None = None,
        *,
        order: str = "interleave",
        projector: str | Sequence[str] = "norm_mlp",
        num_prefixes: Sequence[int] | None = None,
    ):
        options = {"order": order, "projector": projector, "num_prefixes": num_prefixes}
        super().__init__(partial(plan_sequence_concat, in_channels, hidden_size=hidden_size, **options), grids)
        self.order, self.takes_prefixes = order, order == "append"
        self.num_prefixes = [0] * len(in_channels) if num_prefixes is None else list(num_prefixes)
        names = [projector] * len(in_channels) if isinstance(projector, str) else projector
        self.projectors = nn.ModuleList(
            build_projector(name, channels, self.hidden_size) for name, channels in zip(names, in_channels, strict=True)
        )

    def forward(self, features: EncoderMaps) -> Tensor:
        sequences = [
            projector(self.tokens_of(features, index)) for index, projector in enumerate(self.projectors)
        ]  # (batch, tokens of the encoder, hidden)
        if self.order == "append":
            return torch.cat(sequences, dim=1)
        return torch.stack(sequences, dim=2).flatten(1, 2)  # (batch, tokens * encoders, hidden)

    def tokens_of(self, features: EncoderMaps, index: int) -> Tensor:
        """(batch, prefixes + tokens, channels) of one encoder."""
        tokens, wanted = map_to_tokens(features.maps[index]), self.num_prefixes[index]
        prefixes = features.prefixes[index] if self.takes_prefixes and features.prefixes else None
        found = 0 if prefixes is None else prefixes.shape[1]
        if found != wanted:
            raise ValueError(
                f"expected num_prefixes={self.num_prefixes} class tokens and registers, got {found} of encoder {index}"
            )
        return tokens if prefixes is None else torch.cat([prefixes, tokens], dim=1)
