"""LEO (arXiv:2501.06986) as Mozhgan91/LEO stores it, and InternVL (arXiv:2312.14238), whose layout it shares."""

from torch import Tensor

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.conversion.encoder_names import encoder_names
from vitweave.modeling.conversion.language_models import intern_parts
from vitweave.modeling.conversion.release import TOWER, Part, Release, TensorNames, encoder_parts

NORM_MLP = TensorNames(renames=((r"^0\.", "layer_norm."), (r"^1\.", "linear_1."), (r"^3\.", "linear_2.")))


def leo_parts(config: MultiEncoderConfig) -> list[Part]:
    """InternViT, SAM, and the projector of each, which stand before the tokens alternate."""
    projectors = [Part(f"mlp{index + 1}.", f"{TOWER}fusion.projectors.{index}.", NORM_MLP) for index in range(2)]
    return [*encoder_parts(config, ("vision_model_1.", "vision_model_2."), encoder_names), *projectors]


def leo_sizes(config: MultiEncoderConfig, tensors: dict[str, Tensor]) -> dict:
    """The projectors lead to the width of the language model."""
    width = tensors.get("fusion.projectors.0.linear_2.bias")
    return {} if width is None else {"hidden_size": width.shape[0]}


def internvl_parts(config: MultiEncoderConfig) -> list[Part]:
    """InternViT and its projector."""
    projector = Part("mlp1.", "model.multi_modal_projector.", NORM_MLP)
    return [*encoder_parts(config, ("vision_model.",), encoder_names), projector]


LEO = Release(leo_parts, intern_parts, leo_sizes, projector="identity", text_key="llm_config")
INTERNVL = Release(internvl_parts, intern_parts, projector="norm_mlp", text_key="llm_config")
