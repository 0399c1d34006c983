"""Replays of the vectors of TokenFusion's image-to-image networks."""

import torch
from transformers import SegformerConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.token_fusion_translation import discriminator_from_official, generator_from_official
from vitweave.modeling.modeling_modality_translation import ModalityDiscriminator, ModalityFusionForImageToImage


def loosen(case):
    """The official modules ran in float32; the sidecar says how far that is from float64."""
    case.tolerance = max(1e-5, 5 * case.sidecar.get("float32_vs_float64_max_abs", 0))


def stacked(case, name: str) -> torch.Tensor:
    """`name_0`, `name_1`, ... as one tensor (batch, modalities, ...)."""
    count = sum(n.startswith(f"{name}_") for n in case.tensors)
    return torch.stack([case.tensors[f"{name}_{index}"] for index in range(count)], dim=1)


def config_of(case, **options) -> ModalityFusionConfig:
    facts = case.config
    sizes = {name: facts[name] for name in ("depths", "sr_ratios", "mlp_ratios")}
    sizes |= {"hidden_sizes": facts["embed_dims"], "num_attention_heads": facts["num_heads"]}
    stages = len(facts["depths"])
    stream = SegformerConfig(num_encoder_blocks=stages, patch_sizes=[3] * stages, strides=[2] * stages, **sizes)
    return ModalityFusionConfig(stream_config=stream, **options)


def check_all_gradients(case, model: torch.nn.Module, inputs: torch.Tensor, prefix: str):
    """The gradients that the vector tells, if it does; all others are finite."""
    told = case.group("grad.state")
    wanted = {} if not told else (generator_from_official if prefix == "image" else discriminator_from_official)(told)
    for name, parameter in model.named_parameters():
        if name in wanted:
            scale = max(1.0, wanted[name].abs().max().item())
            torch.testing.assert_close(parameter.grad, wanted[name], atol=2 * case.tolerance * scale, rtol=0, msg=name)
        elif parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
    for index in range(inputs.shape[1]):
        if f"grad.input.x_{index}" in case.tensors:
            case.check(f"grad.input.x_{index}", inputs.grad[:, index])


def backward(case, outputs: torch.Tensor, prefix: str):
    """From the cotangents of the vector, or from ones."""
    names = [f"cotangent.{prefix}_{index}" for index in range(outputs.shape[1])]
    known = all(name in case.tensors for name in names)
    outputs.backward(torch.stack([case.tensors[n] for n in names], dim=1) if known else torch.ones_like(outputs))


def replay_generator(case):
    loosen(case)
    options = {"threshold": case.config["mask_threshold"]}
    config = config_of(case, fusion_type="token_exchange", fusion_options=options)
    model = ModalityFusionForImageToImage(config).to(case.dtype).eval()
    model.load_state_dict(generator_from_official(case.group("state")), strict=True)
    scores = []
    for stage in model.modality_fusion.streams.stages:
        stage.fusion.score_net.register_forward_hook(lambda module, args, output: scores.append(output))
    images = stacked(case, "input.x").requires_grad_()
    output = model(images)
    drawn = output.modality_reconstructions
    for index in range(drawn.shape[1]):
        case.check(f"output.image_{index}", drawn[:, index])
    case.check("output.image_ensemble", output.reconstruction)
    case.check("output.alpha_soft", model.ensemble.alpha.softmax(dim=0))
    assert len(scores) == len(case.config["depths"])  # the last block of every stage
    for stage, found in enumerate(scores, start=1):
        for modality, score in enumerate(found):
            wanted = case.tensors[f"output.score.stage{stage}_{modality}"]
            case.check(f"output.score.stage{stage}_{modality}", score.reshape(wanted.shape))
    shares = [ratio.tolist() for ratio in model.exchange_ratios.values()]
    torch.testing.assert_close(shares, case.sidecar["share_below_0_02_per_stage"], atol=6e-4, rtol=0)
    backward(case, drawn, "image")
    check_all_gradients(case, model, images, "image")


def replay_discriminator(case):
    loosen(case)
    model = ModalityDiscriminator(config_of(case)).to(case.dtype).eval()
    model.load_state_dict(discriminator_from_official(case.group("state")), strict=True)
    seen = stacked(case, "input.x").requires_grad_()
    found = model(seen, stacked(case, "input.y")).sigmoid()
    for index in range(found.shape[1]):
        case.check(f"output.prob_{index}", found[:, index, None])
    backward(case, found, "prob")
    check_all_gradients(case, model, seen, "prob")


KINDS = {
    "tokenfusion_translation_generator": replay_generator,
    "tokenfusion_translation_discriminator": replay_discriminator,
}
