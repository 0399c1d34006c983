"""Replays of the encoder-fusion vectors: unshufflings, resizes, projectors, LEO's and EAGLE's fusions."""

from collections.abc import Mapping

import torch
from torch import Tensor

from vitweave.modeling.grid_matching import pixel_unshuffle_a, pixel_unshuffle_b, resample_positions
from vitweave.modeling.projectors import build_projector

# official key of a projector -> ours
MLP_KEYS = {str(2 * index): f"linear_{index + 1}" for index in range(8)}
NORM_MLP_KEYS = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
SE_MLP_KEYS = {"se.0": "squeeze", "se.2": "excite", "proj.0": "linear_1", "proj.2": "linear_2"}
RESIDUAL_KEYS = {"pre_norm": "layer_norm", "proj.0": "linear_1", "proj.2": "linear_2"}


def renamed(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of official names under ours; every name must be in the table."""
    return {f"{keys[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor for name, tensor in state.items()}


def load(module: torch.nn.Module, state: dict[str, Tensor], case) -> torch.nn.Module:
    module.load_state_dict(state, strict=True)
    return module.to(case.dtype).eval()


def replay_pixel_unshuffle(case):
    vit = case.tensors["input.vit_channels_last"].permute(0, 3, 1, 2)
    factor = round(1 / case.sidecar["vit_scale_factor"])
    unshuffled = pixel_unshuffle_a(vit, factor)
    case.check("output.vit_v2_channels_last", unshuffled.permute(0, 2, 3, 1))
    case.check("output.vit_v1_channels_last", unshuffled.permute(0, 3, 2, 1))  # the two axes of the grid swapped
    sam = pixel_unshuffle_b(case.tensors["input.sam_channels_first"], case.sidecar["sam_factor"])
    case.check("output.sam_channels_last", sam.permute(0, 2, 3, 1))


def replay_projectors(case):
    tokens, width = case.tensors["input.x"], case.sidecar["hidden_size"]
    for name in case.group("output"):
        state = case.group(f"state.{name}")
        if name == "simple_res_block":
            projector = build_projector("residual", tokens.shape[-1], tokens.shape[-1])
            state = renamed(state, RESIDUAL_KEYS)
        else:
            projector = build_projector(name, tokens.shape[-1], tokens.shape[-1] if name == "identity" else width)
            state = state if name == "linear" else renamed(state, MLP_KEYS)
        case.check(f"output.{name}", load(projector, state, case)(tokens))


def replay_se_mlp(case):
    tokens, state = case.tensors["input.x"], renamed(case.group("state"), SE_MLP_KEYS)
    projector = build_projector("se_mlp", tokens.shape[-1], state["linear_1.weight"].shape[0])
    case.check("output.out", load(projector, state, case)(tokens))


def replay_position_table(case):
    table, new = case.tensors["input.pos_embed"], case.sidecar["new_grid"]
    resampled = resample_positions(table, (new, new), stored=(case.sidecar["old_grid"],) * 2, num_prefixes=1)
    case.check("output.pos_embed_resampled", resampled)


KINDS = {
    "clip_pos_embed_resample": replay_position_table,
    "pixel_unshuffle": replay_pixel_unshuffle,
    "projector_se_mlp": replay_se_mlp,
    "projectors_llava_family": replay_projectors,
}
