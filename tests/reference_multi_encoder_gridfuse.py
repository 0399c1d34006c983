"""Replays of the encoder-fusion vectors: unshufflings, resizes, projectors, LEO's and EAGLE's fusions."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SamVisionConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.sam.modeling_sam import SamVisionNeck

from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.grid_matching import (
    bilinear_ac,
    map_to_tokens,
    pixel_unshuffle_a,
    pixel_unshuffle_b,
    resample_positions,
)
from vitweave.modeling.projectors import build_projector
from vitweave.modeling.tokens import tokens_to_map

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


def replay_leo(case):
    sidecar, given, state = case.sidecar, case.group("input"), case.group("state")
    patches = given["vision_1_last_hidden_state"][:, 1:]  # without the class token
    side = math.isqrt(patches.shape[1])
    maps = [
        pixel_unshuffle_a(tokens_to_map(patches, (side, side)), round(1 / sidecar["downsample_ratio"])),
        pixel_unshuffle_b(given["vision_2_neck_map"], sidecar["downsample_ratio2"]),
    ]
    channels, grids = [m.shape[1] for m in maps], [tuple(m.shape[-2:]) for m in maps]
    table = state["embed_tokens.weight"]
    fusion = build_encoder_fusion("sequence_concat", channels, grids, table.shape[1])
    projectors = [renamed(case.group(f"state.mlp{number}"), NORM_MLP_KEYS) for number in (1, 2)]
    load(
        fusion, {f"projectors.{i}.{n}": tensor for i, part in enumerate(projectors) for n, tensor in part.items()}, case
    )
    for number, (projector, feature_map) in enumerate(zip(fusion.projectors, maps, strict=True), 1):
        case.check(f"output.projected_{number}", projector(map_to_tokens(feature_map)))
    fused = fusion(EncoderMaps(maps))
    case.check("output.interleaved_per_tile", fused)
    embeddings = F.embedding(given["input_ids"], table)
    places = (given["input_ids"] == sidecar["image_context_token_id"])[..., None].expand_as(embeddings)
    real = fused[given["image_flags"] == 1]
    assert (
        places.sum()
        == real.numel()
        == fusion.num_tokens * table.shape[1] * sum(map(sum, sidecar["per_row_image_tile_counts"]))
    )
    case.check("output.inputs_embeds", embeddings.masked_scatter(places, real))


def allow_float32_places(case):
    """The references found the places between which they interpolate in float32; in float64 they lie elsewhere."""
    if case.dtype == torch.float64:
        case.tolerance = max(case.tolerance, 1e-4)


def replay_channel_concat(case):
    allow_float32_places(case)
    towers, pixels = case.sidecar["towers"], case.tensors["input.pixel_values"]
    maps = []
    for index, tower in enumerate(towers):
        feature = case.tensors[f"input.feature_{index}_{tower['name']}"]
        side = (tower["side"],) * 2
        maps.append(tokens_to_map(feature, side) if tower["returns"] == "tokens" else feature)
        resized = f"output.resized_pixels_for_{index}"
        if resized in case.tensors:
            case.check(resized, bilinear_ac(pixels, (tower["input_image_size"],) * 2))
    channels, grids = [tower["channels"] for tower in towers], [(tower["side"],) * 2 for tower in towers]
    fusion = build_encoder_fusion("channel_concat", channels, grids, options={"grid": case.sidecar["grid_size"]})
    assert fusion.hidden_size == case.sidecar["hidden_size"]
    case.check("output.fused", fusion(EncoderMaps(maps)))


def replay_sam_neck(case):
    sizes = case.sidecar["args"]
    neck = SamVisionNeck(SamVisionConfig(hidden_size=sizes["hidden_size"], output_channels=sizes["output_channels"]))
    parts = torch.nn.ModuleDict({"conv1": neck.conv1, "layer_norm1": neck.layer_norm1})  # EAGLE leaves the rest out
    load(parts, case.group("state"), case)
    hidden = case.tensors["input.encoder_hidden_channels_last"].permute(0, 3, 1, 2)
    short = parts["layer_norm1"](parts["conv1"](hidden))
    case.check("output.short_neck_channels_last", short.permute(0, 2, 3, 1))
    case.check("output.tower_map_channels_first", pixel_unshuffle_b(short, case.sidecar["unshuffle_factor"]))


def replay_pix2struct(case):
    mean, std = (torch.tensor(stat, dtype=case.dtype).view(3, 1, 1) for stat in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = (case.tensors["input.clip_normalised_pixels"] * std + mean) * 255
    exact, case.tolerance = case.tolerance, max(case.tolerance, 1e-4)  # of values up to 255, stored in float32
    case.check("output.denormalised_pixels_0_255", pixels)
    case.tolerance = exact
    allow_float32_places(case)
    tokens = next(tensor for name, tensor in case.tensors.items() if name.startswith("input.encoder_tokens"))
    side = math.isqrt(tokens.shape[1])
    name = next(name for name in case.tensors if name.startswith("output.map_"))
    feature_map = tokens_to_map(tokens[:, : side * side], (side, side))
    case.check(name, bilinear_ac(feature_map, tuple(case.tensors[name].shape[-2:])))


KINDS = {
    "clip_pos_embed_resample": replay_position_table,
    "eagle_channel_concat": replay_channel_concat,
    "eagle_pix2struct_post": replay_pix2struct,
    "eagle_sam_neck_unshuffle": replay_sam_neck,
    "leo_fusion": replay_leo,
    "pixel_unshuffle": replay_pixel_unshuffle,
    "projector_se_mlp": replay_se_mlp,
    "projectors_llava_family": replay_projectors,
}
