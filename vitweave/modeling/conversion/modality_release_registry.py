"""The released modality-fusion models by name."""

from vitweave.modeling.conversion.cmx import CMX
from vitweave.modeling.conversion.gemini_fusion import GEMINI_FUSION, GEMINI_FUSION_DELIVER, TOKEN_FUSION
from vitweave.modeling.conversion.gemini_fusion_swin import GEMINI_FUSION_SWIN
from vitweave.modeling.conversion.modality_release import ModalityRelease
from vitweave.modeling.conversion.segformer import MIT, SEGFORMER
from vitweave.modeling.options import pick

MODALITY_RELEASES: dict[str, ModalityRelease] = {
    "cmx": CMX,
    "gemini-fusion": GEMINI_FUSION,
    "gemini-fusion-deliver": GEMINI_FUSION_DELIVER,
    "gemini-fusion-swin": GEMINI_FUSION_SWIN,
    "mit": MIT,
    "segformer": SEGFORMER,
    "token-fusion": TOKEN_FUSION,
}


def find_modality_release(name: str) -> ModalityRelease:
    """The family of that name."""
    return pick(MODALITY_RELEASES, name, "release")
