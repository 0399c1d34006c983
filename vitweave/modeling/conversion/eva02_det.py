"""EVA-02 detector ViT as EAGLE stores it (NVlabs/EAGLE, eva_vit.py): its tensor names and ours."""

import re

from torch import Tensor

# regular expressions, applied in order
EVA02_DET_NAMES = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
    (r"\.mlp\.w2\.", ".mlp.up_proj."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w3\.", ".mlp.down_proj."),
)
# stored once globally and once per block
EVA02_DET_DROPPED = ((r"(.*\.)?rope(_win|_glb)?\.freqs_(cos|sin)$", "rotary constants, computed from the config"),)


def rename_eva02_det(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Official tensors to those of `Eva02DetModel`.

    Args:
        state: tensors by their official names, without the tower's prefix.

    Returns:
        the tensors by our names, and the names left out with the reason.
    """
    kept, dropped = {}, {}
    for name, tensor in state.items():
        reason = next((reason for pattern, reason in EVA02_DET_DROPPED if re.match(pattern, name)), None)
        if reason is not None:
            dropped[name] = reason
            continue
        for pattern, replacement in EVA02_DET_NAMES:
            name = re.sub(pattern, replacement, name)
        kept[name] = tensor
    return kept, dropped
