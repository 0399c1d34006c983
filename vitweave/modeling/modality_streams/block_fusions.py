"""Which blocks of a stream encoder fuse, and the hooks of one block's forward."""

from collections.abc import Sequence

from torch import Tensor, nn

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion
from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS, build_modality_fusion
from vitweave.modeling.options import pick

# of one stage: what serves all its blocks or acts on its maps, and which of its blocks fuse
StagePlan = tuple[ModalityFusion | None, list[bool]]


def plan_fusions(config: ModalityFusionConfig, depths: Sequence[int], hidden_sizes: Sequence[int]) -> list[StagePlan]:
    """Build what belongs to a stage and say which blocks fuse.

    Args:
        depths: blocks of every stage.
        hidden_sizes: channels of every stage.
    """
    if config.fusion_type is None or config.num_streams < 2:  # one stream has nothing to fuse with
        return [(None, [False] * depth) for depth in depths]
    fusion_class = pick(MODALITY_FUSIONS, config.fusion_type, "fusion_type")
    at_stages = fusion_class.position == "stage"
    if config.fusion_blocks is not None and at_stages:
        raise ValueError(
            f"fusion_blocks={config.fusion_blocks} counts blocks, but {config.fusion_type!r} acts at the end of every"
            " stage; leave it None"
        )
    plans = []
    for depth, count, hidden_size in zip(depths, fusing_blocks(config, depths), hidden_sizes, strict=True):
        fuses = [not at_stages and block >= depth - count for block in range(depth)]
        shared = at_stages or (fusion_class.shared_by_stage and any(fuses))
        plans.append((new_fusion(config, hidden_size) if shared else None, fuses))
    return plans


def acts_on_stages(config: ModalityFusionConfig) -> bool:
    """Whether the fusion acts at the end of every stage, not in blocks."""
    if config.fusion_type is None:
        return False
    return pick(MODALITY_FUSIONS, config.fusion_type, "fusion_type").position == "stage"


def fusing_blocks(config: ModalityFusionConfig, depths: Sequence[int]) -> list[int]:
    """How many of the last blocks of every stage fuse."""
    count, total = config.fusion_blocks, sum(depths)
    if count is None:
        return list(depths)
    if isinstance(count, int):
        if not 1 <= count <= total:
            raise ValueError(
                f"expected fusion_blocks from 1 to {total}, got {count}; for no fusion set fusion_type=None"
            )
        behind = [sum(depths[stage + 1 :]) for stage in range(len(depths))]  # blocks of the later stages
        return [min(max(count - later, 0), depth) for depth, later in zip(depths, behind, strict=True)]
    fits = len(count) == len(depths) and all(0 <= n <= depth for n, depth in zip(count, depths, strict=True))
    if not fits or not any(count):
        raise ValueError(
            f"expected fusion_blocks to hold a number for every stage, at most its blocks {list(depths)}, got"
            f" {list(count)}; for no fusion set fusion_type=None"
        )
    return list(count)


def new_fusion(config: ModalityFusionConfig, hidden_size: int) -> ModalityFusion:
    """The fusion that the config names, for streams of so many channels."""
    return build_modality_fusion(config.fusion_type, config.num_streams, hidden_size, config.fusion_options)


class BlockFusion:
    """The hooks of one block's forward: the fusion acts at its own position, elsewhere the streams pass.

    Args:
        fusion: None fuses nowhere.
        inputs: what the fusion may read besides the streams.
    """

    def __init__(self, fusion: nn.Module | None, inputs: BlockInputs):
        self.fusion, self.inputs = fusion, inputs
        self.penalty: Tensor | None = None

    def __call__(self, position: str, streams: Tensor, scales: Tensor | None = None) -> Tensor:
        """Streams (modalities, batch, tokens, hidden) at "norm", "attention" or "branch"."""
        if self.fusion is None or self.fusion.position != position:
            return streams
        self.inputs.scales = scales
        streams, self.penalty = self.fusion(streams, self.inputs)
        return streams


def summed(penalties: list[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    found = [penalty for penalty in penalties if penalty is not None]
    return sum(found[1:], start=found[0]) if found else None


def exchange_ratio(fusion: nn.Module | None) -> Tensor | None:
    """What the last forward of a fusion replaced; None where it replaces nothing."""
    return getattr(fusion, "last_exchange_ratio", None)
