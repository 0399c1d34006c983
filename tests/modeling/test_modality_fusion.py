import copy
import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_checks import check_saved_and_loaded_equal
from tiny_modality_models import NAMES, aligned, mit_fusion, stirred, tiny_mit
from transformers import (
    AutoModel,
    AutoModelForSemanticSegmentation,
    SegformerModel,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers import TrainingArguments as Arguments

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.ensemble import ModalityEnsemble
from vitweave.modeling.losses import OhemThresholdLoss
from vitweave.modeling.masked_batch_norm import MaskedBatchNorm2d
from vitweave.modeling.modality_fusion.base import ModalityNorm
from vitweave.modeling.modality_streams.present import keep_some
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_modality_fusion import (
    ModalityFusionBackbone,
    ModalityFusionForSemanticSegmentation,
    ModalityFusionModel,
)
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage

CLASSES = (ModalityFusionModel, ModalityFusionBackbone, ModalityFusionForSemanticSegmentation)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def segmenter(modalities: int = 2, **changes) -> ModalityFusionForSemanticSegmentation:
    torch.manual_seed(0)
    return stirred(ModalityFusionForSemanticSegmentation(mit_fusion(modalities, **changes)))


def labels(batch: int = 2, height: int = 32, width: int = 40) -> torch.Tensor:
    return torch.randint(0, 5, (batch, height, width), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("fusion_type", ["gemini", "token_exchange", "channel_exchange", "rectify_fuse"])
def test_every_subset_runs_whatever_the_absent_show(fusion_type, no_grad):
    model = segmenter(3, fusion_type=fusion_type)
    subsets = [mask for mask in itertools.product([0, 1], repeat=3) if any(mask)]
    images, mask = aligned(len(subsets), 3), torch.tensor(subsets)
    hidden = images.masked_fill(mask[..., None, None, None] == 0, float("nan"))
    one, two = model(images, mask, labels(7)), model(hidden, mask, labels(7))
    for name in ("loss", "logits", "modality_logits"):
        assert torch.equal(one[name], two[name]) and one[name].isfinite().all(), name
    assert not one.modality_logits[mask == 0].any() and one.modality_logits[mask == 1].any()
    alone = model(images[:1], mask[:1])  # only the third sensor
    torch.testing.assert_close(alone.logits, one.logits[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.logits[0], one.modality_logits[0, 2], atol=1e-6, rtol=1e-5)
    full = model(images[-1:])
    torch.testing.assert_close(full.logits, one.logits[-1:], atol=1e-5, rtol=1e-5)


def test_loss_is_the_sum_over_all_logits_and_the_penalty():
    model = segmenter(fusion_type="token_exchange", penalty_weight=1e-3)
    output = model(aligned(), labels=labels())
    terms = [*output.modality_logits.unbind(1), output.logits]
    expected = sum(torch.nn.functional.cross_entropy(term, labels()) for term in terms) + 1e-3 * output.penalty
    torch.testing.assert_close(output.loss, expected)
    ratios = model.exchange_ratios
    assert list(ratios) == ["stage1.block0", "stage2.block0", "stage2.block1"] and ratios["stage1.block0"].shape == (2,)


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
@pytest.mark.parametrize("auxiliary", ["pairwise", "max"])
def test_every_weight_learns_also_with_checkpointing(modalities, auxiliary):
    model = segmenter(modalities, auxiliary=auxiliary).train()
    model(aligned(2, modalities), labels=labels()).loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, grad in expected.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    again = segmenter(modalities, auxiliary=auxiliary).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    again(aligned(2, modalities), labels=labels()).loss.backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model_class", CLASSES)
def test_saves_and_loads(model_class, tmp_path, no_grad):
    torch.manual_seed(0)
    model = stirred(model_class(mit_fusion(fusion_type="token_exchange")))
    check_saved_and_loaded_equal(model, tmp_path)
    # AutoBackbone takes folders for names on the Hub
    auto = {ModalityFusionModel: AutoModel, ModalityFusionBackbone: ModalityFusionBackbone}
    loaded = auto.get(model_class, AutoModelForSemanticSegmentation).from_pretrained(tmp_path).eval()
    assert type(loaded) is model_class
    first = next(iter(model(aligned()).keys()))
    one, two = model(aligned())[first], loaded(aligned())[first]
    torch.testing.assert_close(two, one, atol=0, rtol=0)


def test_pretrained_encoder_serves_all_modalities(no_grad):
    torch.manual_seed(0)
    encoder = stirred(SegformerModel(tiny_mit()))
    before = copy.deepcopy(encoder.config.to_dict())
    model = ModalityFusionForSemanticSegmentation.from_encoder(encoder, modalities=NAMES[:3], num_labels=5).eval()
    assert encoder.config.to_dict() == before and encoder.config._attn_implementation == "sdpa"
    maps = model(aligned(modalities=3), output_hidden_states=True).hidden_states
    expected = encoder(aligned(modalities=3)[:, 2], output_hidden_states=True).hidden_states
    for ours, theirs in zip(maps, expected, strict=True):  # a new fusion starts as the identity
        torch.testing.assert_close(ours[:, 2], theirs, atol=2e-3, rtol=1e-3)  # 1e-6 here, 1e-5 there
    with pytest.raises(ValueError, match="do not fit"):
        model.modality_fusion.streams.load_encoder(SegformerModel(tiny_mit(depths=[1, 1])))


def test_backbone_serves_heads(no_grad):
    mean, joined = (
        stirred(ModalityFusionBackbone(mit_fusion(merge=merge, out_indices=[0]))) for merge in ("mean", "concat")
    )
    joined.load_state_dict(mean.state_dict())
    mask = torch.tensor([[1, 1], [0, 1]])
    one, both = mean(aligned(), mask).feature_maps[0], joined(aligned(), mask).feature_maps[0]
    assert mean.channels == [32] and joined.channels == [64]
    torch.testing.assert_close(one[0], (both[0, :32] + both[0, 32:]) / 2)
    assert torch.equal(one[1], both[1, 32:]) and not both[1, :32].any()
    assert len(mean(aligned(), output_hidden_states=True).hidden_states) == 2
    config = DensePredictorConfig(backbone_config=mit_fusion(), head_type="mlp", num_labels=3)
    dense = DensePredictorForSemanticSegmentation(config).eval()
    assert dense(aligned(), modality_mask=mask).logits.shape == (2, 3, 32, 40)
    stock = UperNetConfig(backbone_config=mit_fusion(), hidden_size=16, pool_scales=[1], use_auxiliary_head=False)
    side_by_side = aligned().flatten(1, 2)  # (batch, modalities * channels, height, width)
    assert UperNetForSemanticSegmentation(stock).eval()(side_by_side).logits.shape == (2, 2, 32, 40)
    assert torch.equal(mean(side_by_side, mask).feature_maps[0], one)


def test_bad_images_are_refused():
    model = segmenter()
    with pytest.raises(ValueError, match="images of 4 channels name no modalities"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"2 modalities \['rgb', 'depth'\].*modality_mask with"):
        model(aligned(modalities=3))
    with pytest.raises(ValueError, match="repeat the channel"):
        model(aligned()[:, :, :1])
    with pytest.raises(ValueError, match="stack the modalities"):
        model(aligned()[:, 0])
    with pytest.raises(ValueError, match=r"modality_mask \(2, 2\)"):
        model(aligned(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"at least one present modality per image, got none in the images \[1\]"):
        model(aligned(), torch.tensor([[1, 0], [0, 0]]))
    broken = aligned()
    broken[1, 1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"found NaN in pixel_values of \{'depth': \[1\]\}"):
        model(broken)
    model(broken, torch.tensor([[1, 1], [1, 0]]))


def test_modality_dropout_keeps_one():
    torch.manual_seed(0)
    present = torch.tensor([[True, True, False], [False, False, True]]).repeat(400, 1)
    kept = keep_some(present, 0.5)
    assert kept.any(dim=1).all() and not (kept & ~present).any() and kept[1::2, 2].all()
    assert abs(kept[::2, 0].float().mean() - 0.625) < 0.1  # 1/2, and half of the 1/4 where both would go
    model = segmenter(modality_dropout=0.9, fusion_type=None).train()
    seen = []
    model.ensemble.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    model(aligned(8), labels=labels(8)).loss.backward()
    assert seen[0].any(dim=0).all() and not seen[0].all()
    model.eval()(aligned(8))
    assert seen[1] is None


def test_ensemble_weighs_the_present():
    ensemble = ModalityEnsemble(3)
    ensemble.alpha.data = torch.tensor([0.0, 1.0, 2.0])
    logits = torch.randn(3, 2, 5, 4, 4, requires_grad=True)
    present = torch.tensor([[True, True], [False, True], [True, True]])
    mean = ensemble(logits, present)
    weights = torch.tensor([0.0, 2.0]).softmax(0)
    torch.testing.assert_close(mean[0], (weights[0] * logits[0, 0] + weights[1] * logits[2, 0]).detach())
    mean.square().sum().backward()
    assert logits.grad is None and ensemble.alpha.grad.any()
    torch.testing.assert_close(ModalityEnsemble(3, trained=False)(logits), logits.mean(dim=0).detach())


def test_batch_norm_leaves_rows_out():
    torch.manual_seed(0)
    maps, valid = torch.randn(6, 4, 5, 3), torch.tensor([True, False, True, True, False, True])
    plain, masked = torch.nn.BatchNorm2d(4), MaskedBatchNorm2d(4)
    torch.testing.assert_close(masked(maps, valid)[valid], plain(maps[valid]))
    torch.testing.assert_close(masked.running_mean, plain.running_mean)
    torch.testing.assert_close(masked.running_var, plain.running_var)
    frozen = MaskedBatchNorm2d(4, frozen=True).train()
    torch.testing.assert_close(frozen(maps, valid), maps / (1 + 1e-5) ** 0.5)
    assert not frozen.running_mean.any() and frozen.num_batches_tracked == 0


def test_ohem_counts_pixels_below_a_probability():
    torch.manual_seed(0)
    logits, wanted = 3 * torch.randn(2, 5, 8, 8), labels(2, 8, 8)
    wanted[0, :2] = 255
    costs = torch.nn.functional.cross_entropy(logits, wanted, ignore_index=255, reduction="none")
    valid = costs[wanted != 255]
    hard = valid[valid > -torch.tensor(0.7).log()]
    torch.testing.assert_close(OhemThresholdLoss()(logits, wanted), hard.mean())
    few = valid.sort(descending=True).values[: len(valid) // 16]
    torch.testing.assert_close(OhemThresholdLoss(threshold=1e-9)(logits, wanted), few.mean())


@pytest.mark.parametrize("fusion_type", ["gemini", pytest.param("token_exchange", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(fusion_type, no_grad):
    model, mask = segmenter(fusion_type=fusion_type), torch.tensor([[1, 0], [1, 1]])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for inputs in ((aligned(),), (aligned(), mask)):
        torch.testing.assert_close(compiled(*inputs).logits, model(*inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_exports_with_dynamic_batch(no_grad):
    model, mask = segmenter(), torch.tensor([[1, 0], [1, 1]])
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=8)}, "modality_mask": {0: None}}
    shapes["modality_mask"] = dict(shapes["pixel_values"])
    program = torch.export.export(model, (), {"pixel_values": aligned(), "modality_mask": mask}, dynamic_shapes=shapes)
    other, more = aligned(3), torch.tensor([[1, 0], [1, 1], [0, 1]])
    found = program.module()(pixel_values=other, modality_mask=more)
    torch.testing.assert_close(found.logits, model(other, more).logits, atol=1e-5, rtol=1e-5)


def test_lora_adapts_the_shared_projections(tmp_path, no_grad):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = segmenter()
    expected = base(aligned()).logits
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    changed = adapted(pixel_values=aligned()).logits
    assert not torch.allclose(changed, expected)
    adapted.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(base, tmp_path).eval().merge_and_unload()
    torch.testing.assert_close(merged(aligned()).logits, changed, atol=1e-4, rtol=1e-4)


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        mask = torch.tensor([True, index % 2 == 0])
        return {"pixel_values": aligned(8)[index], "modality_mask": mask, "labels": labels(8)[index]}


@pytest.mark.slow
def test_trainer_resumes_exactly(tmp_path):
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "save_steps": 2, "report_to": []}
    options |= {"learning_rate": 1e-2, "disable_tqdm": True, "use_cpu": True, "max_steps": 4}
    settings = {"modality_dropout": 0.3, "drop_path_rate": 0.2, "fusion_type": "token_exchange"}
    whole = Trainer(segmenter(**settings).train(), Arguments(tmp_path / "a", **options), train_dataset=Pictures())
    whole.train()
    resumed = Trainer(segmenter(**settings).train(), Arguments(tmp_path / "b", **options), train_dataset=Pictures())
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert not [name for name, value in resumed.model.state_dict().items() if not torch.equal(value, expected[name])]
    assert whole.predict(Pictures()).predictions.shape == (8, 5, 32, 40)  # the logits alone


def test_one_map_of_all_streams_is_what_heads_read(no_grad):
    options = {"fusion_type": "rectify_fuse", "fusion_options": {"fuse": "map", "head_width": 32}}
    model, images = segmenter(**options), aligned()
    output = model(images, labels=labels())
    assert output.modality_logits is None and model.ensemble.alpha is None and output.logits.shape == (2, 5, 32, 40)
    mask = torch.tensor([[1, 1], [0, 1]])
    hidden = images.masked_fill(mask[..., None, None, None] == 0, float("nan"))
    absent = model(hidden, mask, labels())
    assert absent.logits.isfinite().all() and absent.loss.isfinite()
    torch.testing.assert_close(absent.logits[0], output.logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(absent.logits[1], output.logits[1], atol=1e-3)
    fused = model.modality_fusion.streams(images).fused
    tokens = model.modality_fusion(images).last_hidden_state
    assert torch.equal(tokens, fused[-1].flatten(2).transpose(1, 2))
    backbone = ModalityFusionBackbone(mit_fusion(merge="concat", **options)).eval()
    backbone.load_state_dict(model.modality_fusion.state_dict())
    maps = backbone(images).feature_maps
    assert backbone.num_features == [32, 32] and all(torch.equal(a, b) for a, b in zip(maps, fused, strict=True))


def test_an_encoder_of_its_own_for_every_modality(no_grad):
    encoder, images = SegformerModel(tiny_mit()).eval(), aligned()
    options = {"modalities": NAMES[:2], "fusion_type": None}
    shared = ModalityFusionModel.from_encoder(encoder, **options).eval()
    own = ModalityFusionModel.from_encoder(encoder, shared_weights=False, **options).eval()
    torch.testing.assert_close(own(images).last_hidden_state, shared(images).last_hidden_state)
    before = own(images, output_hidden_states=True).hidden_states
    for name, parameter in own.named_parameters():
        if "q_proj.1." in name:
            parameter.add_(torch.ones_like(parameter).cumsum(0) / 10)
    after = own(images, output_hidden_states=True).hidden_states
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[:, 0], two[:, 0]) and not torch.equal(one[:, 1], two[:, 1])


def test_norms_behind_convolutions_have_an_epsilon_of_their_own():
    norms = {
        name: part.eps
        for name, part in ModalityFusionModel(mit_fusion(conv_norm_eps=1e-3)).named_modules()
        if isinstance(part, ModalityNorm)
    }
    strided = {name for name in norms if "patch_embeddings" in name or "sequence_reduction" in name}
    assert {norms[name] for name in strided} == {1e-3} and {norms[n] for n in norms.keys() - strided} == {1e-6}
    decoder = ModalityFusionForSemanticSegmentation(mit_fusion(decoder_options={"norm_eps": 1e-3, "fuse_bias": True}))
    assert decoder.decoder.norm.eps == 1e-3 and decoder.decoder.fuse.bias is not None
    for changes in ({"shared_weights": False}, {"conv_norm_eps": 1e-5}):
        with pytest.raises(StrictDataclassError, match="belong to a MiT, got them with a 'swin'"):
            ModalityFusionConfig(stream_config={"model_type": "swin"}, **changes)
    with pytest.raises(ValueError, match='take fuse="add"'):
        ModalityFusionForImageToImage(mit_fusion(fusion_type="rectify_fuse", fusion_options={"fuse": "map"}))
