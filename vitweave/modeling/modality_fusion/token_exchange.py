"""Tokens that say little are replaced by the token of another sensor at the same place (TokenFusion)."""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion, ModalityNorm
from vitweave.modeling.modality_layers import ModalityLinear, has_company, part_of_present

TILE = 12  # side of the drawn partition: 144 cells fall into 2, 3 or 4 equal groups


class ScoreNet(nn.Module):
    """How much a token of each modality says, in (0, 1): a norm and four layers per modality.

    Args:
        start_score: what all scores start near.
    """

    def __init__(self, num_modalities: int, hidden_size: int, start_score: float = 0.5):
        super().__init__()
        if hidden_size < 4:
            raise ValueError(
                f"a score net halves its width twice: expected hidden_size of 4 or more, got {hidden_size}"
            )
        if not 0 < start_score < 1:
            raise ValueError(f"expected start_score between 0 and 1, got {start_score}")
        self.start_score = start_score
        self.norm = ModalityNorm(num_modalities, hidden_size, eps=1e-5)
        self.fc1 = ModalityLinear(num_modalities, hidden_size, hidden_size)
        self.fc2 = ModalityLinear(num_modalities, hidden_size, hidden_size // 2)
        self.fc3 = ModalityLinear(num_modalities, hidden_size // 2, hidden_size // 4)
        self.fc4 = ModalityLinear(num_modalities, hidden_size // 4, 2)
        self.act = nn.GELU()
        self.set_start_values()

    def set_start_values(self) -> None:
        half = math.log(self.start_score / (1 - self.start_score)) / 2
        init.copy_(self.fc4.bias, torch.tensor([half, -half]).expand_as(self.fc4.bias))

    def logits(self, streams: Tensor) -> Tensor:
        """(modalities, batch, tokens, hidden) to (modalities, batch, tokens, 2): to keep it, and to replace it."""
        hidden_states = self.norm(streams)
        for layer in (self.fc1, self.fc2, self.fc3):
            hidden_states = self.act(layer(hidden_states))
        return self.fc4(hidden_states)

    def forward(self, streams: Tensor) -> Tensor:
        """(modalities, batch, tokens), at least float32."""
        logits = self.logits(streams)
        keep, replace = logits.to(torch.promote_types(logits.dtype, torch.float32)).unbind(dim=-1)
        return (keep - replace).sigmoid()  # the first of two softmax probabilities


class TokenExchangeFusion(ModalityFusion):
    """TokenFusion (arXiv:2204.08721): a token with a low score gives its place to another sensor's.

    A score net per modality, one for all blocks of a stage, reads what the block got, before its first norm:

        u_m = s_m * p_m                                   p_m what the output projection of attention returns
        u_m'[i] = u_m[i] if s_m[i] >= threshold else u_o[i]

    from the u of all modalities at once; the residual stream keeps its tokens. Tokens are scaled by their score also
    where none is replaced, and a borrowed token carries the score of its own stream. The selection has no gradient: a
    score learns from the tokens that stay or are borrowed, and from the penalty, the SUM of all scores, which grows
    with batch, resolution and depth. This is the released code. The paper scales the input of attention and exchanges
    the input of the block, which has no place in a branch; GeminiFusion's account of it does not scale at all:
    `scaled=False`, where only the penalty teaches the scores. Class tokens and registers are neither scored nor
    exchanged.

    More than two modalities (Eq. 7 of the paper, no released code): a fixed random partition of the places says which
    modality replaces a token. Here it belongs to a tile that is repeated over the grid, so that a place keeps its rule
    at every resolution.

    Absent sensors lend nothing; the next one of the modalities that is present stands in. A stream without company is
    neither exchanged nor scaled nor penalised.

    Start: with `start_score` near 1 a new fusion is nearly the identity (scores are inside (0, 1), it cannot be exact);
    0.5, where biases are zero, is the released start and halves every attention branch.

    Args:
        threshold: a score below it gives up the token; equal keeps it. 0 exchanges none, above 1 exchanges all.
        scaled: whether tokens are multiplied by their scores.
        scale_alone: whether also those of a stream whose other sensors are all absent, as a checkpoint that has never
            seen absent sensors expects it.
        start_score: what the scores start near.
        seed: of the partition for more than two modalities.
        partition: in its place, (modalities, height, width) of a tile, index of the modality that replaces.
    """

    position = "branch"
    shared_by_stage = True

    def __init__(
        self,
        num_modalities: int,
        hidden_size: int,
        *,
        threshold: float = 0.02,
        scaled: bool = True,
        scale_alone: bool = False,
        start_score: float = 0.99,
        seed: int = 0,
        partition: Sequence[Sequence[Sequence[int]]] | None = None,
    ):
        super().__init__(num_modalities, hidden_size)
        self.threshold, self.scaled, self.scale_alone = threshold, scaled, scale_alone
        self.score_net = ScoreNet(num_modalities, hidden_size, start_score)
        self.partition = draw_partition(num_modalities, seed) if partition is None else partition
        check_partition(self.partition, num_modalities)
        if num_modalities > 2:
            shape = (num_modalities, len(self.partition[0]), len(self.partition[0][0]))
            self.register_buffer("groups", torch.empty(shape, dtype=torch.int64), persistent=False)
            self.fill_buffers()

    def fill_buffers(self) -> None:
        """How many modalities behind a place's own the one lies that replaces it, less one."""
        if self.num_modalities > 2:
            partition = torch.tensor(self.partition)
            own = torch.arange(self.num_modalities)[:, None, None]
            init.copy_(self.groups, (partition - own - 1) % self.num_modalities)

    def forward(self, streams: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        present, prefix = inputs.present, inputs.num_prefix_tokens
        tokens, residual = streams[:, :, prefix:], inputs.residual[:, :, prefix:]
        if present is not None:
            absent = ~present[:, :, None, None]
            tokens, residual = tokens.masked_fill(absent, 0), residual.masked_fill(absent, 0)
        scores = self.score_net(residual)
        fused = self.exchange(tokens, scores, inputs.grid, present)
        if prefix:
            fused = torch.cat([streams[:, :, :prefix], fused], dim=2)
        if present is None:
            return fused, scores.sum()
        return fused, scores.masked_fill(~self.scored(present)[:, :, None], 0).sum()

    def exchange(self, tokens: Tensor, scores: Tensor, grid: tuple[int, int], present: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: (modalities, batch, tokens, hidden), finite where a sensor is absent.
            scores: (modalities, batch, tokens).
            present: (modalities, batch).

        Returns:
            What takes the place of `tokens`.
        """
        keep = scores.float() >= self.threshold  # (modalities, batch, tokens)
        if present is not None:
            keep = keep | ~has_company(present)[:, :, None]
            scores = scores.masked_fill(~self.scored(present)[:, :, None], 1)
        if self.scaled:
            tokens = tokens * scores[..., None].to(tokens.dtype)
        if not torch.compiler.is_exporting():
            self.last_exchange_ratio = part_of_present((~keep).float().mean(dim=2), present)
        return torch.where(keep[..., None], tokens, self.borrowed(tokens, grid, present))

    def scored(self, present: Tensor) -> Tensor:
        """Which streams of which images are scaled and penalised, (modalities, batch)."""
        return present if self.scale_alone else has_company(present)

    def borrowed(self, tokens: Tensor, grid: tuple[int, int], present: Tensor | None) -> Tensor:
        """The tokens that may replace those of the streams, of the same shape."""
        if self.num_modalities == 2:
            return tokens.flip(0)
        return tokens.gather(0, self.lenders(grid, present)[..., None].expand_as(tokens))

    def lenders(self, grid: tuple[int, int], present: Tensor | None) -> Tensor:
        """Index of the modality that replaces a token, (modalities, batch or 1, tokens); for three or more."""
        modalities = torch.arange(self.num_modalities, device=self.groups.device)[:, None, None]
        rows, columns = (
            torch.arange(side, device=self.groups.device) % period
            for side, period in zip(grid, self.groups.shape[1:], strict=True)
        )
        groups = self.groups[:, rows[:, None], columns].flatten(1)  # (modalities, tokens)
        if present is None:
            return ((modalities[..., 0] + 1 + groups) % self.num_modalities)[:, None]
        tries = torch.arange(self.num_modalities - 1, device=groups.device)
        tries = (tries[:, None] + tries) % (self.num_modalities - 1)  # (groups, order): the own group's modality first
        candidates = (modalities + 1 + tries) % self.num_modalities  # (modalities, groups, order)
        first = present[candidates].int().argmax(dim=2)  # (modalities, groups, batch)
        lender = candidates.gather(2, first)  # the first of them that is present
        return lender.gather(1, groups[..., None].expand(-1, -1, lender.shape[2])).transpose(1, 2)


def draw_partition(num_modalities: int, seed: int) -> list[list[list[int]]]:
    """Equal groups of the places of a tile per modality, at random, the same wherever it is drawn."""
    generator, partition = random.Random(seed), []
    for modality in range(num_modalities):
        others = [other for other in range(num_modalities) if other != modality]
        places = [others[place % len(others)] for place in range(TILE * TILE)]
        generator.shuffle(places)
        partition.append([places[start : start + TILE] for start in range(0, TILE * TILE, TILE)])
    return partition


def check_partition(partition: Sequence[Sequence[Sequence[int]]], num_modalities: int) -> None:
    """Refuse one that is no tile per modality, or where a modality replaces itself."""
    sizes = {(len(tile), len(row)) for tile in partition for row in tile}
    if len(partition) != num_modalities or len(sizes) != 1:
        raise ValueError(
            f"expected partition to hold {num_modalities} tiles of one size, one per modality, got {len(partition)}"
            f" with (height, width) {sorted(sizes)}"
        )
    for modality, tile in enumerate(partition):
        found = {lender for row in tile for lender in row}
        others = set(range(num_modalities)) - {modality}
        if not found <= others:
            raise ValueError(f"expected modality {modality} to be replaced by {sorted(others)}, got {sorted(found)}")
