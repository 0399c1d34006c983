"""The stream encoders by name."""

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_streams.base import ModalityStreams
from vitweave.modeling.modality_streams.mit import MitStreams
from vitweave.modeling.modality_streams.swin import SwinStreams
from vitweave.modeling.modality_streams.vit import VitStreams
from vitweave.modeling.options import pick

STREAMS: dict[str, type[ModalityStreams]] = {
    "mit": MitStreams,
    "swin": SwinStreams,
    "vit": VitStreams,
}


def build_streams(config: ModalityFusionConfig) -> ModalityStreams:
    """The encoder of all modalities that `config.stream_config` asks for."""
    return pick(STREAMS, config.stream, "stream")(config)
