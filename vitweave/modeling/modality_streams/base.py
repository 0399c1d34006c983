"""What the encoders of several aligned modalities share."""

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass
class StreamOutput:
    """What a stream encoder returns.

    Args:
        maps: one per stage, (streams, batch, channels_k, height_k, width_k), after the norm of the stage. As many
            streams as modalities, or two where all but the first were merged.
        tokens: (streams, batch, prefix + patches, hidden), the last stage as a sequence.
        present: (streams, batch), bool; None where all are there.
        penalty: scalar, the sum of what all fusions ask to be added to the loss; None without any.
        exchange_ratios: "stage1.block0" -> (streams,), detached, of the fusions that exchange.
        fused: one per stage, (batch, channels_k, height_k, width_k), where the fusion makes one map of the streams.
    """

    maps: tuple[Tensor, ...]
    tokens: Tensor
    present: Tensor | None = None
    penalty: Tensor | None = None
    exchange_ratios: dict[str, Tensor] = field(default_factory=dict)
    fused: tuple[Tensor, ...] | None = None


class ModalityStreams(nn.Module):
    """An encoder whose weights serve all modalities but for the norms, with fusions inside its blocks.

    Modalities are stacked on an axis of their own in front of the batch, so that every shared layer runs once for all.

    Args:
        config: a `ModalityFusionConfig`.
    """

    channels: list[int]  # of every stage
    strides: list[int]  # pixels of one cell of every stage

    @property
    def makes_map(self) -> bool:
        """Whether the fusion makes one map of the streams of every stage."""
        return any(stage.fusion is not None and stage.fusion.makes_map for stage in self.stages)

    def forward(
        self, pixel_values: Tensor, present: Tensor | None = None, num_stages: int | None = None
    ) -> StreamOutput:
        """
        Args:
            pixel_values: (batch, modalities, channels, height, width).
            present: (batch, modalities), bool, False where a sensor is absent; its pixels are not read then, not even
                NaN.
            num_stages: how many stages to run; None is all. The others' maps are left out.
        """
        raise NotImplementedError

    def load_encoder(self, encoder: PreTrainedModel) -> None:
        """Take the weights of a pretrained encoder of `config.stream_config`; those of fusions stay as they are."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Module:
        """What turns pixels into patches."""
        raise NotImplementedError

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module in its place."""
        raise NotImplementedError
