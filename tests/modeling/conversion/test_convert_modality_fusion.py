"""Released modality-fusion checkpoints become ours, strictly, with the published outputs, and the way back."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official_mit import (
    HEADS,
    cmx,
    cmx_logits,
    gemini_fusion,
    gemini_fusion_deliver,
    gemini_fusion_swin,
    imagenet_mit,
    segformer,
    segformer_logits,
    token_fusion,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSemanticSegmentation, PreTrainedModel

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.modality_release_registry import MODALITY_RELEASES
from vitweave.modeling.conversion.report import ConversionReport
from vitweave.modeling.convert_modality_fusion import convert_modality_fusion, to_released
from vitweave.modeling.modality_layers import PerModality
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation, ModalityFusionModel

VECTORS = Path(os.environ.get("VITWEAVE_REFERENCE_DIR", "")) / "multimodal_fusion" / "vectors"
FILES = {  # name -> release, official tensors, what is left out
    "gemini": ("gemini-fusion", gemini_fusion, 0),
    "swin": ("gemini-fusion-swin", gemini_fusion_swin, 5),
    "deliver2": ("gemini-fusion-deliver", lambda: gemini_fusion_deliver(2), 0),
    "deliver3": ("gemini-fusion-deliver", lambda: gemini_fusion_deliver(3), 16),
    "deliver4": ("gemini-fusion-deliver", lambda: gemini_fusion_deliver(4), 16),
    "token": ("token-fusion", token_fusion, 0),
    "cmx": ("cmx", cmx, 0),
    "segformer": ("segformer", segformer, 2),
    "mit": ("mit", imagenet_mit, 2),
}
CASES = {  # stored vector -> release
    "gemini_mit_tiny_seg": "gemini-fusion",
    "gemini_swin_tiny_seg": "gemini-fusion-swin",
    "gemini_deliver_2mod": "gemini-fusion-deliver",
    "gemini_deliver_4mod": "gemini-fusion-deliver",
    "tokenfusion_mit_tiny_seg": "token-fusion",
}
UNIT = "encoder.block3.1.attn.cross_attn_1_to_0.in_proj_bias"
needs_vectors = pytest.mark.skipif(not VECTORS.is_dir(), reason="needs whole models in VITWEAVE_REFERENCE_DIR")


def vector(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """The official tensors, inputs and outputs, and the options that no tensor tells."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    facts = json.loads((VECTORS / f"{name}.json").read_text())["config"]
    options = {"num_attention_heads": facts["num_heads"]} if "deliver" in name else {}
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    return state, tensors, options


def quarter_logits(model: PreTrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of the streams and of the ensemble, before they are brought to the size of the images."""
    found = []
    handle = model.decoder.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(images)
    handle.remove()
    streams = found[0].unflatten(0, (-1, len(images)))
    return streams, model.ensemble(streams)


def check_back(model: PreTrainedModel, release: str, state: dict[str, Tensor]):
    """Every official tensor comes back, bit for bit; score nets that nothing reads as zeros, strange heads not."""
    back, last = to_released(model, release), model.config.num_modalities - 1
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("decode_head.conv_seg.", "head."))}
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        unread = ".extra_score_predictor." in name and f".score_nets.{last}." in name
        wanted = torch.zeros_like(tensor) if unread else tensor
        assert torch.equal(back[name], wanted) and back[name].dtype == tensor.dtype, name


def check_report(report: ConversionReport, model: PreTrainedModel, state: dict[str, Tensor]):
    """Every tensor on both sides is in it, once."""
    assert set(report.copied) == set(model.state_dict()) and not report.new
    named = {official for names in report.copied.values() for official in names.split(", ")}
    assert named | set(report.dropped) == set(state) and not named & set(report.dropped)


SLOW = ("deliver2", "deliver4")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FILES])
def test_every_tensor_goes_there_and_back(name, tmp_path):
    release, make, dropped = FILES[name]
    state = make()
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "official.safetensors")
    model, report = convert_modality_fusion(tmp_path / "official.safetensors", release)
    assert len(report.dropped) == dropped and not model.training
    check_report(report, model, state)
    check_back(model, release, state)


@needs_vectors
@pytest.mark.parametrize("name", CASES)
def test_vectors_through_a_file(name, tmp_path):
    state, tensors, options = vector(name)
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "official.safetensors")
    model, report = convert_modality_fusion(tmp_path / "official.safetensors", CASES[name], **options)
    images = torch.stack([tensors[f"input.x_{index}"] for index in range(model.config.num_modalities)], dim=1)
    streams, ensemble = quarter_logits(model, images)
    wanted = tensors["output.logits_ensemble"]
    if wanted.shape[-1] != ensemble.shape[-1]:  # the DeLiVER code brings logits to the size of the images
        streams, ensemble = (
            F.interpolate(x.flatten(0, -4), wanted.shape[-2:], mode="bilinear") for x in (streams, ensemble)
        )
    torch.testing.assert_close(ensemble, wanted, atol=1e-5, rtol=0)
    for index in range(2):
        torch.testing.assert_close(
            streams[index].reshape(wanted.shape), tensors[f"output.logits_{index}"], atol=1e-5, rtol=0
        )
    check_report(report, model, state)
    check_back(model, CASES[name], state)


@needs_vectors
def test_losses_are_those_of_deliver():
    state, tensors, options = vector("gemini_deliver_4mod")
    model, _ = convert_modality_fusion(state, "gemini-fusion-deliver", **options)
    images = torch.stack([tensors[f"input.x_{index}"] for index in range(4)], dim=1)
    with torch.no_grad():
        loss = model(images, labels=tensors["input.labels"].long()).loss
    torch.testing.assert_close(loss, tensors["output.loss_ohem"], atol=1e-4, rtol=0)


def test_dead_and_computed_tensors_are_named_with_their_reason():
    _, report = convert_modality_fusion(gemini_fusion_deliver(4), "gemini-fusion-deliver")
    nets = {
        f"backbone.extra_score_predictor.{stage}.score_nets.3.{place}.{leaf}"
        for stage, place, leaf in itertools.product(range(4), range(2), ("weight", "bias"))
    }
    assert set(report.dropped) == nets and "one more than it reads" in str(report)
    _, report = convert_modality_fusion(gemini_fusion_swin(), "gemini-fusion-swin")
    assert "relative_position_index, ...: places in a window, computed from its size" in str(report)
    left = {"encoder.score_predictor.0.score_nets.0.1.weight": torch.ones(16, 16)}
    _, report = convert_modality_fusion(gemini_fusion() | left, "gemini-fusion")
    assert list(report.dropped) == list(left) and "left over" in str(report)


def test_what_training_left_out_shows():
    state = gemini_fusion()
    trained, _ = convert_modality_fusion(state, "gemini-fusion")
    assert not trained.config.decoder_frozen_norm and trained.config.ensemble == "trained"
    norm = "decoder.linear_fuse.bn.running_"
    state |= {norm + "mean": torch.zeros(24), norm + "var": torch.ones(24), "alpha": torch.ones(2)}
    model, report = convert_modality_fusion(state, "gemini-fusion")
    assert model.config.decoder_frozen_norm and model.config.ensemble == "mean" and model.ensemble.alpha is None
    assert "never trained" in report.dropped["alpha"]
    check_back(model, "gemini-fusion", state)
    with pytest.raises(ValueError, match=r"unknown name:\n    alpha"):  # a mean is no trained ensemble
        convert_modality_fusion(state | {"alpha": torch.tensor([1.0, 2.0])}, "gemini-fusion", model.config)


@pytest.mark.parametrize("name", [UNIT, "alpha", "encoder.block1.0.norm1.ln_1.weight", "decoder.linear_pred.bias"])
def test_a_missing_a_strange_and_a_misshapen_tensor_are_refused_by_name(name):
    state = gemini_fusion()
    missing = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=f"(?s)(nothing in it is for|expected ').*{name}"):
        convert_modality_fusion(missing, "gemini-fusion")
    with pytest.raises(ValueError, match=r"(?s)unknown name.*encoder\.block1\.0\.attn\.other\.weight"):
        convert_modality_fusion(state | {"encoder.block1.0.attn.other.weight": torch.ones(3)}, "gemini-fusion")
    wrong = torch.ones(5, *state[name].shape[1:])
    with pytest.raises(ValueError, match=rf"(?s)another shape.*{name}: expected \[\d+.*got \[5"):
        convert_modality_fusion(state | {name: wrong}, "gemini-fusion")


def random_images(batch: int, modalities: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, modalities, 3, 70, 64, generator=generator, dtype=torch.float64)


def in_float64(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def test_cmx(tmp_path):
    state, images = cmx(), random_images(2, 2)
    save_file(state, tmp_path / "cmx.safetensors")
    model, _ = convert_modality_fusion(tmp_path, "cmx", dtype=torch.float64)
    streams, decoded = quarter_logits(model, images)
    torch.testing.assert_close(decoded, cmx_logits(in_float64(state), images), atol=1e-10, rtol=1e-10)
    assert len(streams) == 1
    assert any(isinstance(part, PerModality) for part in model.modules())
    output = model(images, labels=torch.zeros(2, 70, 64, dtype=torch.long))
    assert output.modality_logits is None and output.loss.isfinite()
    model.train()(images, labels=torch.zeros(2, 70, 64, dtype=torch.long)).loss.backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not idle
    model.eval().save_pretrained(tmp_path / "ours")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "ours")
    before, after = quarter_logits(model, images)[1], quarter_logits(again, images)[1]
    assert torch.equal(before, after)


def test_segformer_and_its_encoder():
    state, images = segformer(), random_images(1, 1)
    model, report = convert_modality_fusion(state, "segformer", dtype=torch.float64)
    assert model.config.modalities == ["rgb"] and set(report.dropped) == {
        "decode_head.conv_seg.weight",
        "decode_head.conv_seg.bias",
    }
    wanted = segformer_logits(in_float64(state), images[:, 0])
    torch.testing.assert_close(quarter_logits(model, images)[1], wanted, atol=1e-10, rtol=1e-10)
    encoder, report = convert_modality_fusion(imagenet_mit(), "mit")
    assert type(encoder) is ModalityFusionModel and "classifier of ImageNet" in report.dropped["head.weight"]


def test_segformer_for_more_modalities_and_a_new_fusion():
    state, image = in_float64(segformer()), random_images(1, 1)
    alone, _ = convert_modality_fusion(state, "segformer")
    pair, report = convert_modality_fusion(state, "segformer", modalities=["rgb", "thermal"])
    both = quarter_logits(pair, image.expand(-1, 2, -1, -1, -1))[1]
    torch.testing.assert_close(both, quarter_logits(alone, image)[1])
    assert pair.config.modalities == ["rgb", "thermal"] and not report.new
    config = ModalityFusionConfig(**pair.config.to_dict() | {"fusion_type": "gemini"})
    fused, report = convert_modality_fusion(state, "segformer", config)
    assert report.new and all(".fusion." in name for name in report.new)
    torch.testing.assert_close(quarter_logits(fused, image.expand(-1, 2, -1, -1, -1))[1], both)
    with pytest.raises(ValueError, match="have no place in SegFormer"):
        to_released(fused, "segformer")
    with torch.no_grad():
        pair.modality_fusion.streams.stages[0].layer_norm.weight[1] += 1
    with pytest.raises(ValueError, match="differs between modalities"):
        to_released(pair, "segformer")


def test_the_way_back_refuses_what_the_official_code_cannot_compute():
    model, _ = convert_modality_fusion(gemini_fusion(), "gemini-fusion")
    for changes, message in (
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05, not 1e-06"),
        ({"fusion_options": {"num_heads": 4}}, "num_heads=4, not 8"),
        ({"fusion_blocks": 2}, r"(?s)nothing in it is for.*encoder\.block1\.0\.attn\.cross_attn"),
    ):
        config = ModalityFusionConfig(**model.config.to_dict() | changes)
        with pytest.raises(ValueError, match=message):
            to_released(ModalityFusionForSemanticSegmentation(config), "gemini-fusion")
    with pytest.raises(ValueError, match="expected a ModalityFusionModel for 'mit'"):
        to_released(model, "mit")


def test_errors_of_the_call(tmp_path):
    state = gemini_fusion_deliver(4)
    with pytest.raises(ValueError, match="do not divide the widths"):
        convert_modality_fusion(state, "gemini-fusion-deliver", num_attention_heads=[1, 2, 3, 8])
    with pytest.raises(ValueError, match="of 4 modalities, got the names"):
        convert_modality_fusion(state, "gemini-fusion-deliver", modalities=["a", "b"])
    with pytest.raises(ValueError, match="did you mean 'gemini-fusion'"):
        convert_modality_fusion(state, "gemini-fusio")
    with pytest.raises(ValueError, match=r"expected \'encoder\.patch_embed1\.proj\.module\.weight\' in"):
        convert_modality_fusion(state, "gemini-fusion")
    (tmp_path / "nyu.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)torch.load\('nyu.pth', weights_only=True\).*save_file.*'segmenter'"):
        convert_modality_fusion(tmp_path / "nyu.pth", "gemini-fusion")


def test_half_precision_keeps_counters():
    model, _ = convert_modality_fusion(cmx(), "cmx", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.decoder.norm.num_batches_tracked == 3
    assert tuple(model.config.stream_config.num_attention_heads) == HEADS


def test_every_release_has_a_test():
    assert set(MODALITY_RELEASES) == {*CASES.values(), "cmx", "segformer", "mit"}
