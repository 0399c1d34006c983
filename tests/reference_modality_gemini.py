"""Replays of the vectors of GeminiFusion's module, cross-attention, and the fusion of points and images."""

import torch

from vitweave.modeling.conversion.gemini_units import from_official_units
from vitweave.modeling.modality_fusion.base import BlockInputs, others
from vitweave.modeling.modality_fusion.cross_attention import CrossAttentionFusion
from vitweave.modeling.modality_fusion.gemini import GeminiFusion
from vitweave.modeling.modality_fusion.point_image_fusion import PointImageFusion, project_points

MATRIX_NAMES = {  # the formula's names -> ours
    "w_q": "to_query.weight",
    "w_k": "to_key.weight",
    "w_v": "to_value.weight",
}
EQ6_NAMES = {
    "noise_k": "key_noise",
    "noise_v": "value_noise",
    "phi.fc1.bias": "relation.own_proj.bias",
    "phi.fc2.weight": "relation.gate_proj.weight",
    "phi.fc2.bias": "relation.gate_proj.bias",
}
POINT_NAMES = {
    "lateral_convs.": "laterals.",
    ".conv.": ".",
    "img_transform.0.": "image_proj.",
    "img_transform.1.": "image_norm.",
    "pts_transform.0.": "point_proj.",
    "pts_transform.1.": "point_norm.",
    "alpha": "stream_logits",
}


def allow_float32(case):
    """Official outputs in float32 differ from their own in float64 by this much."""
    noise = case.sidecar.get("float32_vs_float64_max_abs")
    if noise is not None:
        case.tolerance = max(1e-5, 5 * noise)


def inputs_of(streams: torch.Tensor) -> BlockInputs:
    return BlockInputs(residual=streams, grid=(1, streams.shape[2]))


def pair(case, group: str, name: str) -> torch.Tensor:
    """(modalities, ...) of `<group>.<name>_0` and `_1`."""
    return torch.stack([case.tensors[f"{group}.{name}_{index}"] for index in range(2)])


def check_pair(case, name: str, actual: torch.Tensor):
    for index in range(2):
        case.check(f"{name}_{index}", actual[index])


def check_gradients(case, module: torch.nn.Module):
    """Of every tensor of the state; that of the keys' bias is zero."""
    wanted = from_official_units(case.group("grad.state"))
    own = dict(module.named_parameters())
    assert wanted.keys() == module.state_dict().keys()
    for name, gradient in wanted.items():
        case.tensors["wanted"] = gradient
        case.check("wanted", own[name].grad if name in own else torch.zeros_like(gradient))


def replay_core(case):
    allow_float32(case)
    fusion = GeminiFusion(2, case.config["dim"], num_heads=case.config["n_heads"]).to(case.dtype)
    fusion.load_state_dict(from_official_units(case.group("state")))
    streams = pair(case, "input", "x").requires_grad_()
    relation = fusion.relation(streams, others(streams))
    check_pair(case, "inter.relation", relation[:, 0])
    share = fusion.other_shares(streams, relation, None)[:, 0].mean(dim=-1)
    check_pair(case, "inter.attn_head_mean", torch.stack([1 - share, share], dim=-1))
    fused, penalty = fusion(streams, inputs_of(streams))
    assert penalty is None
    check_pair(case, "output.y", fused)
    fused.backward(pair(case, "cotangent", "y"))
    check_pair(case, "grad.input.x", streams.grad)
    check_gradients(case, fusion)


def shared_matrices(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The formulas multiply by their matrices from the right."""
    return {ours: state[name].T[None] for name, ours in MATRIX_NAMES.items()}


def replay_eq6(case):
    config = case.config
    fusion = GeminiFusion(2, config["C"], num_heads=config["heads"], form="paper").to(case.dtype)
    state = case.group("state")
    ours = {name: state[official] for official, name in EQ6_NAMES.items()} | shared_matrices(state)
    for name in ("key_noise", "value_noise"):
        ours[name] = ours[name][None]
    own, other = state["phi.fc1.weight"].chunk(2, dim=1)
    fusion.load_state_dict(ours | {"relation.own_proj.weight": own, "relation.other_proj.weight": other})
    streams = pair(case, "input", "x")
    check_pair(case, "inter.relation", fusion.relation(streams, others(streams))[:, 0])
    check_pair(case, "output.y", fusion(streams, inputs_of(streams))[0])


def replay_cross_literal(case):
    streams = pair(case, "input", "x")
    for per_token, name in ((False, "output.y"), (True, "output.pixelwise_y")):
        fusion = CrossAttentionFusion(2, case.config["C"], form="paper", per_token=per_token).to(case.dtype)
        fusion.load_state_dict(shared_matrices(case.group("state")))
        check_pair(case, name, fusion(streams, inputs_of(streams))[0])


def replay_cross_multihead(case):
    fusion = CrossAttentionFusion(2, case.config["C"], num_heads=case.config["heads"]).to(case.dtype)
    fusion.load_state_dict(from_official_units(case.group("state")))
    streams = pair(case, "input", "x")
    check_pair(case, "output.y", fusion(streams, inputs_of(streams))[0])
    query, keys = fusion.by_head(fusion.to_query(streams)), fusion.by_head(fusion.to_key(streams.flip(0)))
    scores = torch.einsum("mbqhd,mbkhd->mbhqk", query, keys) * query.shape[-1] ** -0.5
    check_pair(case, "inter.attn_head_mean", scores.softmax(dim=-1).mean(dim=2))


def replay_points(case):
    allow_float32(case)
    config = case.config
    levels = len(config["level_sizes"])
    fusion = PointImageFusion([config["img_channels"]] * levels, config["pts_channels"], config["out_channels"])
    state = {}
    for name, tensor in from_official_units(case.group("state")).items():
        for official, ours in POINT_NAMES.items():
            name = name.replace(official, ours)
        parts = name.split(".")[0] in dict(fusion.named_children()) or name == "stream_logits"
        state[name if parts else f"fusion.{name}"] = tensor
    fusion.load_state_dict(state)
    fusion.to(case.dtype).eval()
    uv, image_index = projected_points(case)
    pyramid = [case.tensors[f"input.img_feats.level{index}"] for index in range(levels)]
    given = (pyramid, uv, image_index, config["img_pad_shape"])
    sampled = fusion.read_pyramid(*given)
    case.check("inter.sampled_img_feats", sampled)
    points = case.tensors["input.point_feats"]
    case.check("inter.img_pre_fuse", fusion.image_norm(fusion.image_proj(sampled)))
    case.check("inter.pts_pre_fuse", fusion.point_norm(fusion.point_proj(points)))
    case.check("output.fused", fusion(points, *given))


def projected_points(case) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and rows of all points of the batch, and the image that each belongs to."""
    config, found = case.config, []
    for index in range(config["B"]):
        uv = project_points(case.tensors[f"input.points.sample{index}"][:, :3], case.tensors["input.lidar2img"])
        uv = uv * uv.new_tensor(config["img_scale_factor"])
        if config["flip"][index]:
            uv[:, 0] = config["img_shape"][1] - uv[:, 0]
        found.append(uv)
    counts = torch.tensor([uv.shape[0] for uv in found])
    return torch.cat(found), torch.arange(config["B"]).repeat_interleave(counts)


KINDS = {
    "gemini_fusion_core": replay_core,
    "gemini_eq6_literal": replay_eq6,
    "cross_attention_literal": replay_cross_literal,
    "cross_attention_multihead": replay_cross_multihead,
    "gemini_point_fusion": replay_points,
}
