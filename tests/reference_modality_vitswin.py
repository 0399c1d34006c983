"""Replays of the vectors of the two-stream Swin: one block, and a whole segmenter whose last maps are small."""

import torch
from torch import Tensor
from transformers import SwinConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.gemini_fusion_swin import OURS, from_official, to_official
from vitweave.modeling.modality_streams.swin import SwinStreamLayer
from vitweave.modeling.modality_streams.windows import relative_places, shift_mask
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation

FIRST_BLOCK = "encoder.body.layers.0.blocks.0."


def loosen(case):
    """The official modules ran in float32; the sidecar says how far that is from float64."""
    case.tolerance = max(1e-5, 5 * case.sidecar.get("float32_vs_float64_max_abs", 0))


def pair(case, name: str) -> Tensor:
    return torch.stack([case.tensors[f"{name}_{modality}"] for modality in range(2)])


def check_pair(case, name: str, streams: Tensor):
    for modality in range(2):
        case.check(f"{name}_{modality}", streams[modality])


def check_names(official: dict[str, Tensor], ours: dict[str, Tensor]):
    """Nothing is lost or changed on the way there and back."""
    back = to_official(ours)
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert torch.equal(back[name], tensor), name


def swin_like(facts: dict, dim: int, depths: list[int], num_heads: list[int], **options) -> ModalityFusionConfig:
    stream = SwinConfig(embed_dim=dim, depths=depths, num_heads=num_heads, window_size=facts["window_size"])
    return ModalityFusionConfig(
        stream_config=stream,
        fusion_type="gemini",
        fusion_options={"num_heads": facts["cross_heads"]},
        attn_implementation="eager",
        **options,
    )


def check_gradients(case, module: torch.nn.Module, prefix: str = ""):
    """Of every tensor the vector tells about."""
    wanted = {prefix + name: tensor for name, tensor in case.group("grad.state").items()}
    own = dict(module.named_parameters())
    for name, gradient in from_official(wanted).items() if wanted else ():
        name = name.removeprefix(OURS.format(stage=0, block=0)) if prefix else name
        case.tensors["wanted"] = gradient
        case.check("wanted", own[name].grad if name in own else torch.zeros_like(gradient))


def replay_block(case):
    loosen(case)
    facts = case.config
    config = swin_like(facts, facts["dim"], [1], [facts["num_heads"]])
    shifted = facts["shift_size"] > 0
    block = SwinStreamLayer(config, stage=0, drop_path_rate=0.0, shifted=shifted, fuses=True).to(case.dtype).eval()
    assert block.shift == facts["shift_size"]
    official = {FIRST_BLOCK + name: tensor for name, tensor in case.group("state").items()}
    ours = from_official(official)
    check_names(official, ours)
    prefix = OURS.format(stage=0, block=0)
    block.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in ours.items()}, strict=True)
    streams = pair(case, "input.x").requires_grad_()
    grid, window = (facts["H"], facts["W"]), facts["window_size"]
    places = relative_places(window, streams.device)
    mask = shift_mask(tuple(side + -side % window for side in grid), window, streams.device)
    if "input.attn_mask" in case.tensors:
        case.check("input.attn_mask", mask[:, 0])
    output, penalty = block(streams, grid, None, None, places, mask)
    assert penalty is None
    check_pair(case, "output.x", output)
    if "cotangent.x_0" in case.tensors:
        output.backward(pair(case, "cotangent.x"))
        check_pair(case, "grad.input.x", streams.grad)
        check_gradients(case, block, FIRST_BLOCK)


def replay_segmenter(case):
    loosen(case)
    facts = case.config
    config = swin_like(
        facts,
        facts["embed_dim"],
        facts["depths"],
        facts["num_heads"],
        decoder_hidden_size=facts["embedding_dim"],
        num_labels=facts["num_classes"],
    )
    model = ModalityFusionForSemanticSegmentation(config).to(case.dtype).eval()
    ours = from_official(case.group("state"))
    check_names(case.group("state"), ours)
    model.load_state_dict(ours, strict=True)
    seen = {}
    model.ensemble.register_forward_hook(lambda module, args, output: seen.update(streams=args[0], ensemble=output))
    pixels, labels = pair(case, "input.x").transpose(0, 1), case.tensors.get("input.labels")
    output = model(pixels, labels=None if labels is None else labels.long(), output_hidden_states=True)
    for stage, maps in enumerate(output.hidden_states, start=1):
        check_pair(case, f"inter.stage{stage}", maps.transpose(0, 1))
    check_pair(case, "output.logits", seen["streams"])
    case.check("output.logits_ensemble", seen["ensemble"])
    if "output.loss" in case.tensors:
        case.check("output.loss", output.loss)
        output.loss.backward()
        check_gradients(case, model)


KINDS = {"gemini_swin_block": replay_block, "gemini_swin_tiny_seg": replay_segmenter}
