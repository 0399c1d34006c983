"""The blocks of one stage of a stream encoder with their fusions, and a record of what those return."""

import torch
from torch import Tensor, nn

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion
from vitweave.modeling.modality_streams.block_fusions import StagePlan, exchange_ratio, summed


class FusionRecord:
    """Penalties and exchange ratios of one forward.

    `ratios`: place -> (streams,), e.g. "stage1.block0"; a compiled graph keeps none. `fused`: a map per stage, (batch,
    hidden, height, width), of fusions that make one of all streams.
    """

    def __init__(self):
        self.penalties: list[Tensor | None] = []
        self.ratios: dict[str, Tensor] = {}
        self.fused: list[Tensor] = []

    def note(self, place: str, fusion: ModalityFusion | None, penalty: Tensor | None) -> None:
        """Remember what a fusion has just returned."""
        self.penalties.append(penalty)
        if not torch.compiler.is_compiling() and exchange_ratio(fusion) is not None:
            self.ratios[place] = exchange_ratio(fusion)

    @property
    def penalty(self) -> Tensor | None:
        """The sum of all penalties."""
        return summed(self.penalties)

    @property
    def fused_maps(self) -> tuple[Tensor, ...] | None:
        """Of all stages; None where no fusion makes any."""
        return tuple(self.fused) or None


class FusingStage(nn.Module):
    """Blocks, of which some fuse, and a fusion that they share or that acts on what the stage returns.

    A block has a `fusion` (None where it has none of its own) and takes `(streams, grid, present, shared, *inputs)`,
    `shared` being the fusion that it shares; it returns the streams and a penalty.

    Args:
        name: of the stage in the record, "stage1".
    """

    blocks: nn.ModuleList

    def __init__(self, name: str, plan: StagePlan):
        super().__init__()
        self.name = name
        self.fusion, self.block_fuses = plan

    @property
    def own_fusions(self) -> list[bool]:
        """Which blocks have a fusion of their own."""
        return [fuses and self.fusion is None for fuses in self.block_fuses]

    def run_blocks(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None, record: FusionRecord, *inputs
    ) -> Tensor:
        """(streams, batch, tokens, hidden) through all blocks; `inputs` are what the blocks want besides."""
        for index, (block, fuses) in enumerate(zip(self.blocks, self.block_fuses, strict=True)):
            shared = self.fusion if fuses else None
            streams, penalty = block(streams, grid, present, shared, *inputs)
            record.note(f"{self.name}.block{index}", block.fusion if shared is None else shared, penalty)
        return streams

    def fuse_maps(
        self, streams: Tensor, grid: tuple[int, int], present: Tensor | None, record: FusionRecord, num_prefix: int = 0
    ) -> Tensor:
        """Where the fusion acts at the end of a stage: (streams, batch, tokens, hidden) to the same.

        It gets maps: the prefix passes by.
        """
        if self.fusion is None or self.fusion.position != "stage":
            return streams
        patches = streams[:, :, num_prefix:]
        inputs = BlockInputs(patches, grid, present)
        fused, penalty = self.fusion(patches, inputs)
        if self.fusion.makes_map:
            record.fused.append(self.fusion.fused_map(fused, inputs).transpose(1, 2).unflatten(2, grid))
        record.note(f"{self.name}.maps", self.fusion, penalty)
        return torch.cat([streams[:, :, :num_prefix], fused], dim=2) if num_prefix else fused
