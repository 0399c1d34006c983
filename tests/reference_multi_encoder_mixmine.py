"""Replays of the vectors of LLaVA-HR's adapters and Mini-Gemini's patch info mining."""

import importlib.util

import pytest
import torch
from torch import Tensor
from transformers import ConvNextConfig, ConvNextModel

from vitweave.modeling.conversion.encoder_names import CONVNEXT, TIMM_CONVNEXT
from vitweave.modeling.conversion.release import Part, converted
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.mixture_of_resolution import MixtureOfResolutionAdapter, MixtureOfResolutionFusion
from vitweave.modeling.encoder_fusion.patch_info_mining import PatchInfoMiningFusion
from vitweave.modeling.grid_matching import bilinear, map_to_tokens, tokens_to_map
from vitweave.modeling.image_views import views_of
from vitweave.modeling.projectors import build_projector
from vitweave.modeling.vision_encoder import VisionEncoder

# official name -> ours, by the part of the name that differs
ADAPTER_NAMES = {"gate.0.": "gate.fc1.", "gate.2.": "gate.fc2."}  # below align_stages_latent.N -> adapters.N
MINING_NAMES = {
    "vlm_uni_query_projector.0.": "q_norm.",
    "vlm_uni_query_projector.1.": "q_proj.",
    "vlm_uni_aux_projector.0.": "k_norm.",
    "vlm_uni_aux_projector.1.": "k_proj.",
    "vlm_uni_val_projector.0.": "v_norm.",
    "vlm_uni_val_projector.1.": "v_proj.",
}
PROJECTOR_NAMES = {"mm_projector.0.": "linear_1.", "mm_projector.2.": "linear_2."}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        for official, ours in names.items():
            name = name.replace(official, ours)
        found[name] = tensor
    return found


def side(tokens: Tensor) -> tuple[int, int]:
    """The square grid of (batch, tokens, channels)."""
    return (round(tokens.shape[1] ** 0.5),) * 2


def as_map(features: Tensor) -> Tensor:
    return tokens_to_map(features, side(features)) if features.ndim == 3 else features


# LLaVA-HR ------------------------------------------------------------------------------------------------------------


def replay_adapter(case):
    fast, slow = case.tensors["input.fast"], case.tensors["input.slow"]
    args = case.sidecar["args"]
    adapter = MixtureOfResolutionAdapter(args["fast_vision_dim"], args["slow_vision_dim"]).to(case.dtype)
    assert torch.equal(adapter(as_map(fast), as_map(slow)), as_map(fast)) or not args["zero_init"]
    adapter.load_state_dict(renamed(case.group("state"), ADAPTER_NAMES), strict=True)
    seen = {}
    adapter.fast_proj.register_forward_hook(lambda module, args, output: seen.update(change=output))
    adapter.gate.register_forward_hook(lambda module, args, output: seen.update(pooled=args[0], gate=output))
    case.check("output.fast_out", map_to_tokens(adapter(as_map(fast), as_map(slow))))
    case.check("output.slow_projected_native_grid", adapter.project_slow(as_map(slow)))
    case.check("output.fast_conv_branch", seen["change"])
    case.check("output.gate_input_pooled", seen["pooled"])
    case.check("output.gate_pre_tanh", seen["gate"])


def replay_final_align(case):
    maps = [as_map(case.tensors[f"input.{name}"]) for name in ("fast", "slow")]
    args, grids = case.sidecar["args"], [tuple(feature_map.shape[2:]) for feature_map in maps]
    channels = [args["fast_vision_dim"], args["slow_vision_dim"]]
    fusion = MixtureOfResolutionFusion(channels, grids, adapter_layers=[]).to(case.dtype)
    fusion.load_state_dict(case.group("state"), strict=True)
    case.check("output.out", fusion(EncoderMaps(maps)))


# Mini-Gemini ---------------------------------------------------------------------------------------------------------


def mining_of(case, views: Tensor, detail: Tensor, **options):
    """The fusion for maps of these shapes and the projector behind it, loaded."""
    state = renamed(case.group("state"), MINING_NAMES | PROJECTOR_NAMES)
    projector_state = {name: state.pop(name) for name in list(state) if name.startswith("linear_")}
    grids = [tuple(views.shape[-2:]), tuple(detail.shape[-2:])]
    fusion = PatchInfoMiningFusion([views.shape[-3], detail.shape[1]], grids, **options).to(case.dtype)
    fusion.load_state_dict(state, strict=True)
    projector = build_projector("mlp2x_gelu", views.shape[-3], len(projector_state["linear_2.bias"])).to(case.dtype)
    projector.load_state_dict(projector_state, strict=True)
    return fusion, projector


def replay_mining(case):
    queries, detail = as_map(case.tensors["input.lr_tokens"]), case.tensors["input.hr_map"]
    fusion, projector = mining_of(case, queries, detail)
    assert detail.shape[2] == queries.shape[2] * case.sidecar["window_side_M"]
    summed = fusion(EncoderMaps([queries, detail]))
    case.check("output.mined", summed - map_to_tokens(queries))
    case.check("output.summed", summed)
    case.check("output.projected", projector(summed))


def replay_hd(case):
    crops, has_global = case.sidecar["image_grid"], case.sidecar["image_global"]
    images, features = case.tensors["input.images"], case.tensors["input.lr_features_in_call_order"]
    batch, count = images.shape[0], crops**2

    def views_first_global(in_call_order: Tensor) -> Tensor:
        """All crops of all images, then all global views, to (batch, views, ...) with the global view first."""
        of_crops = in_call_order[: batch * count].unflatten(0, (batch, count))
        return (
            torch.cat([in_call_order[batch * count :].unflatten(0, (batch, 1)), of_crops], 1)
            if has_global
            else of_crops
        )

    called = case.tensors["output.lr_tower_input"].flatten(0, -4)
    assert torch.equal(views_first_global(called), images.roll(1, dims=1) if has_global else images)
    views, detail = (
        tokens_to_map(views_first_global(features).flatten(0, 1), side(features)),
        case.tensors["input.hr_map"],
    )
    views = views.unflatten(0, (batch, -1))
    fusion, projector = mining_of(case, views, detail, crops=crops, has_global_view=has_global)
    tokens = projector(fusion(EncoderMaps([views, detail])))
    assert tokens.shape[1] == fusion.num_tokens
    case.check("output.tokens", tokens)


def replay_input_prep(case):
    pixels = case.tensors["input.hr_pixels"].float()  # in float64 the places that are read round otherwise
    crops, view = case.sidecar["image_grid"], case.sidecar["lr_size"]
    case.check("output.lr_full", views_of(pixels, view * crops)[:, 0])
    views = views_of(pixels, view, crops, global_view=True)
    case.check("output.crops_then_global", views.roll(-1, dims=1).flatten(0, 1))


def replay_convnext(case):
    pixels, sizes = case.tensors["input.pixel_values"], {key: case.sidecar[key] for key in ("dims", "depths")}
    if case.sidecar["norm_eps"] == 1e-6:  # the only one that transformers has
        model = ConvNextModel(ConvNextConfig(hidden_sizes=sizes["dims"], depths=sizes["depths"])).to(case.dtype).eval()
        left_out = model.load_state_dict(converted([Part("", "", CONVNEXT)], case.group("state")), strict=False)
        assert left_out.missing_keys == ["layernorm.weight", "layernorm.bias"] and not left_out.unexpected_keys
        stages = VisionEncoder(model, layers=[1, 2, 3, 4], final_norm=False)(pixels).feature_maps
    else:
        stages = timm_stages(case, pixels, **sizes)
    for index, stage in enumerate(stages):
        case.check(f"output.stage_{index}", stage)
    grid = tuple(stages[0].shape[2:])
    case.check("output.multi_scale_map", torch.cat([bilinear(stage, grid) for stage in stages], dim=1))


def timm_stages(case, pixels: Tensor, **sizes) -> list[Tensor]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm: ConvNextModel of transformers has no other eps than 1e-6")
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(num_classes=0, norm_eps=case.sidecar["norm_eps"], conv_mlp=False, **sizes).to(case.dtype).eval()
    state = converted([Part("", "", TIMM_CONVNEXT)], case.group("state"))
    left_out = model.load_state_dict({name.removeprefix("timm_model."): t for name, t in state.items()}, strict=False)
    assert left_out.missing_keys == ["head.norm.weight", "head.norm.bias"] and not left_out.unexpected_keys
    stages, state = [], model.stem(pixels)
    for stage in model.stages:
        state = stage(state)
        stages.append(state)
    return stages


KINDS = {
    "llava_hr_mr_adapter": replay_adapter,
    "llava_hr_final_align": replay_final_align,
    "mini_gemini_patch_info_mining": replay_mining,
    "mini_gemini_hd_encode": replay_hd,
    "mini_gemini_input_prep": replay_input_prep,
    "mini_gemini_aux_convnext": replay_convnext,
}
