"""Replays of the vectors of the two-stream MiT: attention, block, decoder, and whole segmenters with gradients."""

import math

import torch
from torch import Tensor
from transformers import SegformerConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.gemini_fusion import STREAMS, from_official
from vitweave.modeling.heads.mlp import MlpHead
from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_streams.block_fusions import BlockFusion
from vitweave.modeling.modality_streams.mit import MitLayer
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation

BLOCK = "encoder.block1.0."
TOKEN_EXCHANGE = {"fusion_type": "token_exchange"}


def loosen(case):
    """The official modules ran in float32; the sidecar says how far that is from float64."""
    case.tolerance = max(1e-5, 5 * case.sidecar.get("float32_vs_float64_max_abs", 0))


def stacked(case, name: str) -> Tensor:
    """`name_0`, `name_1`, ... as one tensor, modalities first."""
    found = sorted(n for n in case.tensors if n.rpartition("_")[0] == name and n.rpartition("_")[2].isdigit())
    return torch.stack([case.tensors[n] for n in found])


def check_streams(case, name: str, streams: Tensor):
    for modality, stream in enumerate(streams):
        case.check(f"{name}_{modality}", stream)


def known(case) -> dict[str, Tensor]:
    """The official gradients of the vector among NaN: it holds those of some tensors only."""
    nothing = {
        name: torch.full(tensor.shape, math.nan, dtype=case.dtype) for name, tensor in case.group("state").items()
    }
    return nothing | case.group("grad.state")


def check_gradients(case, module: torch.nn.Module, wanted: dict[str, Tensor]):
    """Of every tensor the vector tells, to a part of the largest entry; the keys' bias of a fusion has none."""
    own, checked = dict(module.named_parameters()), 0
    for name, gradient in wanted.items():
        told = ~gradient.isnan()
        if not told.any():
            continue
        found = own[name].grad if name in own else torch.zeros_like(gradient)
        scale = max(1.0, gradient[told].abs().max().item())
        away = (found[told] - gradient[told]).abs().max().item()
        assert away <= 2 * case.tolerance * scale, f"the gradient of {name} is {away} away"
        checked += 1
    assert checked


# One block ------------------------------------------------------------------------------------------------------------


def in_block(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Official tensors of a block, or of the part `prefix` of it, named as in our block."""
    ours = from_official({f"{BLOCK}{prefix}{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix(f"{STREAMS}.0.blocks.0."): tensor for name, tensor in ours.items()}


def block_like(facts: dict, **options) -> MitLayer:
    sizes = {"num_encoder_blocks": 1, "depths": [1], "hidden_sizes": [facts["dim"]], "sr_ratios": [facts["sr_ratio"]]}
    sizes |= {"num_attention_heads": [facts["num_heads"]], "mlp_ratios": [int(facts.get("mlp_ratio", 4))]}
    stream = SegformerConfig(patch_sizes=[7], strides=[4], **sizes)
    config = ModalityFusionConfig(stream_config=stream, attn_implementation="eager", **options)
    return MitLayer(config, stage=0, drop_path_rate=0.0, fuses=True)


def gemini_options(facts: dict) -> dict:
    return {"fusion_type": "gemini", "fusion_options": {"num_heads": facts["n_heads"]}}


def replay_attention(case, block: MitLayer, streams: Tensor, fuse: BlockFusion):
    output = block.attention(streams, fuse.inputs.grid, fuse)
    check_streams(case, "output.x", output)
    output.backward(stacked(case, "cotangent.x"))
    check_streams(case, "grad.input.x", streams.grad)


def replay_gemini_attention(case):
    loosen(case)
    block = block_like(case.config, **gemini_options(case.config)).to(case.dtype)
    own = in_block(case.group("state"), "attn.")
    left_out = block.load_state_dict(own, strict=False)
    assert not left_out.unexpected_keys
    assert not [name for name in left_out.missing_keys if name.startswith(("attention.", "fusion."))]
    streams = stacked(case, "input.x").requires_grad_()
    grid = (case.config["H"], case.config["W"])
    seen = {}
    block.fusion.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output[0]))
    replay_attention(case, block, streams, BlockFusion(block.fusion, BlockInputs(streams, grid)))
    check_streams(case, "inter.pre_fusion", seen["before"])
    check_streams(case, "inter.post_fusion", seen["after"])
    parts = torch.nn.ModuleDict({"attention": block.attention, "fusion": block.fusion})
    check_gradients(case, parts, in_block(known(case), "attn."))


def replay_token_exchange_attention(case):
    loosen(case)
    options = {"threshold": case.config["mask_threshold"]}
    block = block_like(case.config, **TOKEN_EXCHANGE, fusion_options=options).to(case.dtype)
    left_out = block.load_state_dict(in_block(case.group("state"), "attn."), strict=False)
    assert not left_out.unexpected_keys
    assert not [name for name in left_out.missing_keys if name.startswith("attention.")]
    streams, scores = stacked(case, "input.x").requires_grad_(), stacked(case, "input.score").requires_grad_()
    block.fusion.score_net.forward = lambda residual: scores  # the vector gives the scores
    grid = (case.config["H"], case.config["W"])
    replay_attention(case, block, streams, BlockFusion(block.fusion, BlockInputs(streams, grid)))
    check_streams(case, "grad.input.score", scores.grad)
    wanted = in_block(known(case), "attn.")
    check_gradients(case, torch.nn.ModuleDict({"attention": block.attention}), wanted)


def replay_block(case):
    loosen(case)
    block = block_like(case.config, **gemini_options(case.config)).to(case.dtype).eval()
    block.load_state_dict(in_block(case.group("state")), strict=True)
    output, penalty = block(stacked(case, "input.x"), (case.config["H"], case.config["W"]), None, None)
    assert penalty is None
    check_streams(case, "output.x", output)


# Decoder and whole models ---------------------------------------------------------------------------------------------


def replay_decoder(case):
    loosen(case)
    facts, state = case.config, case.group("state")
    head = MlpHead(facts["in_channels"], facts["num_classes"], facts["embedding_dim"]).to(case.dtype).eval()
    ours = from_official({f"decoder.{name}": tensor for name, tensor in state.items()})
    head.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in ours.items()}, strict=True)
    case.check("output.logits", head([case.tensors[f"input.c{stage}"] for stage in range(1, 5)]))


def segmenter(case, **options) -> ModalityFusionForSemanticSegmentation:
    facts = case.config
    sizes = {"hidden_sizes": facts["embed_dims"], "num_attention_heads": facts["num_heads"]}
    sizes |= {name: facts[name] for name in ("depths", "sr_ratios", "mlp_ratios")}
    modalities = facts.get("num_modalities", 2)
    config = ModalityFusionConfig(
        modalities=[f"sensor{index}" for index in range(modalities)],
        stream_config=SegformerConfig(**sizes),
        decoder_hidden_size=facts["embedding_dim"],
        num_labels=facts["num_classes"],
        auxiliary="max",
        **options,
    )
    model = ModalityFusionForSemanticSegmentation(config).to(case.dtype).eval()
    model.load_state_dict(from_official(case.group("state")), strict=True)
    return model


def check_segmenter(case, model, quarter: bool, loss_name: str):
    """Stages, logits and loss of a whole model; `quarter`: the vector's logits have a quarter of the images' size."""
    images, labels = stacked(case, "input.x").transpose(0, 1), case.tensors["input.labels"].long()
    seen = {}
    model.ensemble.register_forward_hook(lambda module, args, output: seen.update(streams=args[0], ensemble=output))
    output = model(images, labels=labels, output_hidden_states=True)
    if not quarter:
        seen = {"streams": output.modality_logits.transpose(0, 1), "ensemble": output.logits}
    check_streams(case, "output.logits", seen["streams"])
    case.check("output.logits_ensemble", seen["ensemble"])
    for stage, maps in enumerate(output.hidden_states, start=1):
        check_streams(case, f"inter.stage{stage}", maps.transpose(0, 1))
    case.check(loss_name, output.loss)
    return output


def replay_gemini_segmenter(case):
    loosen(case)
    model = segmenter(case, **gemini_options(case.config))
    check_segmenter(case, model, True, "output.loss").loss.backward()
    check_gradients(case, model, from_official(known(case)))


def replay_token_exchange_segmenter(case):
    loosen(case)
    facts = case.config
    options = {"fusion_options": {"threshold": facts["mask_threshold"]}, "penalty_weight": facts["lamda"]}
    model = segmenter(case, **TOKEN_EXCHANGE, **options)
    scores = []
    for stage in model.modality_fusion.streams.stages:
        stage.fusion.score_net.register_forward_hook(lambda module, args, output: scores.append(output))
    output = check_segmenter(case, model, True, "output.loss")
    case.check("output.l1", output.penalty)
    case.check("output.task_loss", output.loss - facts["lamda"] * output.penalty)
    for index, score in enumerate(scores):
        check_streams(case, f"output.score.block{index}", score)
    shares = [ratio.tolist() for ratio in model.exchange_ratios.values()]
    torch.testing.assert_close(shares, case.sidecar["share_below_0_02_per_block"], atol=6e-4, rtol=0)
    output.loss.backward()
    check_gradients(case, model, from_official(known(case)))


def replay_deliver(case):
    loosen(case)
    losses = {"losses": {"ohem_threshold": 1.0}}
    model = segmenter(case, **gemini_options(case.config), **losses)
    scores = {}
    for index, stage in enumerate(model.modality_fusion.streams.stages, start=1):
        if stage.auxiliary is not None:
            stage.auxiliary.score.register_forward_hook(
                lambda module, args, output, stage=index: scores.update({stage: output.sigmoid()})
            )
    check_segmenter(case, model, False, "output.loss_ohem").loss.backward()
    if case.group("grad.state"):
        check_gradients(case, model, from_official(known(case)))
    for stage, score in scores.items():
        for index in range(score.shape[1]):
            wanted = case.tensors[f"inter.aux_score.stage{stage}_{index + 1}"]
            case.check(f"inter.aux_score.stage{stage}_{index + 1}", score[:, index].reshape(wanted.shape))
    model = segmenter(case, **gemini_options(case.config))
    check_segmenter(case, model, False, "output.loss_ce")


KINDS = {
    "gemini_fusion_attention": replay_gemini_attention,
    "gemini_block": replay_block,
    "gemini_mit_tiny_seg": replay_gemini_segmenter,
    "gemini_deliver": replay_deliver,
    "mlp_decoder": replay_decoder,
    "tokenfusion_attention": replay_token_exchange_attention,
    "tokenfusion_mit_tiny_seg": replay_token_exchange_segmenter,
}
