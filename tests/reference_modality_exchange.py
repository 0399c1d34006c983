"""Replays of the vectors of TokenFusion, channel exchange, CMX's rectify and fuse pair, and the learning rates."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from vitweave.modeling.conversion.cmx import fuse_entries, gate_entries
from vitweave.modeling.conversion.gemini_fusion import score_net_entries
from vitweave.modeling.conversion.name_table import NameTable
from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.channel_exchange import (
    ChannelExchangeFusion,
    exchange_channels,
    sparsity_penalty,
)
from vitweave.modeling.modality_fusion.rectify_fuse import RectifyFuseFusion
from vitweave.modeling.modality_fusion.token_exchange import TokenExchangeFusion
from vitweave.training.schedules import polynomial_schedule

SCORE_NETS = NameTable(score_net_entries("score_nets.{row}.", ""), "score nets")
GATES = NameTable(gate_entries("", ""), "CMX's rectify module")
FUSE = NameTable(fuse_entries("", ""), "CMX's fuse module")


def loosen(case):
    """The official modules ran in float32; the sidecar says how far that is from float64."""
    if case.sidecar.get("dtype") != "float64":
        case.tolerance = max(1e-5, 5 * case.sidecar.get("float32_vs_float64_max_abs", 0))


def stacked(case, name: str) -> Tensor:
    """`name_0`, `name_1`, ... as one tensor, modalities first."""
    found = sorted(n for n in case.tensors if n.rpartition("_")[0] == name and n.rpartition("_")[2].isdigit())
    return torch.stack([case.tensors[n] for n in found])


def check_streams(case, name: str, streams: Tensor):
    for modality, stream in enumerate(streams):
        case.check(f"{name}_{modality}", stream)


# TokenFusion ---------------------------------------------------------------------------------------------------------


def replay_predictor(case):
    loosen(case)
    streams = stacked(case, "input.x").requires_grad_()
    fusion = TokenExchangeFusion(streams.shape[0], case.config["embed_dim"]).to(case.dtype)
    fusion.score_net.load_state_dict(SCORE_NETS.to_ours(case.group("state")), strict=True)
    scores = fusion.score_net(streams)
    check_streams(case, "output.log_probs", fusion.score_net.logits(streams).log_softmax(dim=-1))
    check_streams(case, "output.score", scores)
    penalty = fusion(streams, BlockInputs(streams, (1, streams.shape[2])))[1]
    case.check("output.l1", penalty)
    penalty.backward()
    check_streams(case, "grad.input.x", streams.grad)
    fusion(streams, BlockInputs(streams, (1, streams.shape[2])))
    for modality, share in enumerate(case.sidecar["share_below_0_02"]):
        assert abs(fusion.last_exchange_ratio[modality] - share) < 1e-6


def replay_token_exchange(case):
    loosen(case)
    streams, scores = stacked(case, "input.x"), stacked(case, "input.score")
    modalities, grid = streams.shape[0], (1, streams.shape[2])
    options = {"threshold": case.config["mask_threshold"]}
    if "input.alloc_0" in case.tensors:
        options["partition"] = stacked(case, "input.alloc")[:, None].tolist()
    unscaled = TokenExchangeFusion(modalities, 8, scaled=False, **options)
    exchanged = unscaled.exchange(streams, scores, grid)
    if "output.exchanged_0" not in case.tensors:
        check_streams(case, "output.x", exchanged)
        return
    check_streams(case, "output.exchanged", exchanged)
    streams.requires_grad_(), scores.requires_grad_()
    exchanged = TokenExchangeFusion(modalities, 8, **options).exchange(streams, scores, grid)
    check_streams(case, "output.scaled_exchanged", exchanged)
    (exchanged * stacked(case, "cotangent.scaled_exchanged")).sum().backward()
    check_streams(case, "grad.input.x", streams.grad)
    check_streams(case, "grad.input.score", scores.grad)


# CEN -----------------------------------------------------------------------------------------------------------------


def parameters_of(state: dict[str, Tensor], layer: str, leaf: str) -> Tensor:
    """`{layer}_0.{leaf}`, `{layer}_1.{leaf}`, ..., stacked."""
    found = sorted(
        n for n in state if n.rpartition(".")[2] == leaf and re.fullmatch(rf"{layer}_\d+", n[: -len(leaf) - 1])
    )
    return torch.stack([state[name] for name in found])


def exchanged_maps(maps: Tensor, scales: Tensor, threshold: float) -> Tensor:
    """(modalities, batch, channels, height, width); the fusion wants channels last."""
    return exchange_channels(maps.movedim(2, -1), scales, threshold).movedim(-1, 2)


def replay_cen_exchange(case):
    loosen(case)
    maps, scales = stacked(case, "input.x"), parameters_of(case.group("state"), "bn", "weight")
    threshold = case.config["bn_threshold"]
    check_streams(case, "output.x", exchanged_maps(maps, scales, threshold))
    tokens = maps.flatten(3).transpose(2, 3)
    inputs = BlockInputs(tokens, tuple(maps.shape[3:]), scales=scales)
    fusion = ChannelExchangeFusion(*scales.shape, threshold=threshold)
    check_streams(case, "output.x", fusion(tokens, inputs)[0].transpose(2, 3).unflatten(3, inputs.grid))
    for modality, share in enumerate(case.sidecar.get("share_exchanged", [])):
        assert abs(fusion.last_exchange_ratio[modality] - share) < 1e-6


def replay_cen_bottleneck(case):
    loosen(case)
    state, maps = case.group("state"), stacked(case, "input.x")

    def conv(name: str, maps: Tensor, **options) -> Tensor:
        """One convolution for all modalities."""
        return F.conv2d(maps.flatten(0, 1), state[f"{name}.module.weight"], **options).unflatten(0, maps.shape[:2])

    def norm(name: str, maps: Tensor) -> Tensor:
        leaves = ("running_mean", "running_var", "weight", "bias")
        values = [parameters_of(state, name, leaf) for leaf in leaves]
        return torch.stack([F.batch_norm(part, *rows) for part, *rows in zip(maps, *values, strict=True)])

    threshold, stride = case.config["bn_threshold"], case.config["stride"]
    hidden = norm("bn1.bn", conv("conv1", maps)).relu()
    hidden = norm("bn2.bn", conv("conv2", hidden, stride=stride, padding=1))
    scales = parameters_of(state, "bn2.bn", "weight")
    for modality, share in enumerate(case.sidecar["share_exchanged"]):
        assert ((scales[modality].abs() < threshold).float().mean() - share).abs() < 1e-6
    hidden = norm("bn3.bn", conv("conv3", exchanged_maps(hidden, scales, threshold).relu()))
    skipped = norm("downsample.1.bn", conv("downsample.0", maps, stride=stride))
    check_streams(case, "output.x", (hidden + skipped).relu())
    case.check("output.l1_slim", sparsity_penalty(scales))


def replay_cen_convblock(case):
    loosen(case)
    state, maps, facts = case.group("state"), stacked(case, "input.x"), case.config
    scales = parameters_of(state, "insnorm_conv.insnorm", "weight")
    geometry = {name: facts[name] for name in ("stride", "padding")}
    convolved = F.conv2d(
        F.leaky_relu(maps, 0.2).flatten(0, 1), state["conv.module.weight"], state["conv.module.bias"], **geometry
    )
    convolved = convolved.unflatten(0, maps.shape[:2])
    norms = []
    for modality in range(len(maps)):
        norm = torch.nn.InstanceNorm2d(facts["output_size"], affine=True, track_running_stats=True).to(case.dtype)
        prefix = f"insnorm_conv.insnorm_{modality}."
        norm.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        norms.append(norm)
    for mode in ("eval", "train"):
        normed = torch.stack([norm.train(mode == "train")(part) for norm, part in zip(norms, convolved, strict=True)])
        check_streams(case, f"output.{mode}", exchanged_maps(normed, scales, facts["insnorm_threshold"]))


# CMX -----------------------------------------------------------------------------------------------------------------


def paired_streams(case) -> tuple[Tensor, tuple[int, int]]:
    maps = stacked(case, "input.x")
    return maps.flatten(3).transpose(2, 3), tuple(maps.shape[3:])


def replay_rectify(case):
    loosen(case)
    streams, grid = paired_streams(case)
    options = {name: case.config[name] for name in ("reduction", "lambda_c", "lambda_s")}
    fusion = RectifyFuseFusion(2, case.config["dim"], fuse="none", **options).to(case.dtype)
    state = {name.removeprefix("gates."): tensor for name, tensor in GATES.to_ours(case.group("state")).items()}
    fusion.gates.load_state_dict(state, strict=True)
    rectified, penalty = fusion(streams, BlockInputs(streams, grid))
    assert penalty is None
    check_streams(case, "output.x", rectified.transpose(2, 3).unflatten(3, grid))


def replay_fuse(case):
    loosen(case)
    streams, grid = paired_streams(case)
    dim, heads = case.config["dim"], case.config["num_heads"]
    options = {"fuse": "map", "reduction": case.config["reduction"], "head_width": dim // heads}
    fusion = RectifyFuseFusion(2, dim, **options).to(case.dtype).eval()
    loaded = fusion.load_state_dict(FUSE.to_ours(case.group("state")), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith("gates.") for name in loaded.missing_keys)
    check_streams(case, "inter.cross", fusion.cross_path(streams))
    fused = fusion.fused_map(streams, BlockInputs(streams, grid))
    case.check("output.fused", fused.transpose(1, 2).unflatten(2, grid))


# Learning rates ------------------------------------------------------------------------------------------------------


def replay_schedules(case):
    """What the sidecar has at some steps; `poly_warmup_adamw` counts the decay from the first step."""
    for name in ("poly_warmup_adamw", "warmup_poly"):
        facts = case.sidecar[name]
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=facts["base_lr"])
        schedule = polynomial_schedule(
            optimizer,
            warmup_steps=facts["warmup_iter"],
            total_steps=facts["max_iter"],
            warmup_start=facts["warmup_ratio"],
            power=facts["power"],
            decay_from="start" if name == "poly_warmup_adamw" else "warmup",
        )
        for step, rate in facts["lr_used_at_step"].items():
            found = facts["base_lr"] * schedule.lr_lambdas[0](int(step))
            assert math.isclose(found, rate, rel_tol=1e-6), (name, step, found, rate)


KINDS = {
    "tokenfusion_predictor": replay_predictor,
    "tokenfusion_exchange": replay_token_exchange,
    "cen_exchange": replay_cen_exchange,
    "cen_bottleneck": replay_cen_bottleneck,
    "cen_translation_convblock": replay_cen_convblock,
    "cmx_rectify": replay_rectify,
    "cmx_fusion": replay_fuse,
    "lr_schedules": replay_schedules,
}
