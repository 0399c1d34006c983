"""Depth models over own and native backbones: what the table of every class does not say."""

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import (
    AutoModelForDepthEstimation,
    BeitConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DPTImageProcessorPil,
    SwinConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.class_tokens import class_token_request, class_tokens_of
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone
from vitweave.modeling.own_models import build_backbone
from vitweave.training.lora import lora_config

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}
WITH_CLASS_TOKEN = {
    "beit": lambda **o: BeitConfig(**TINY, intermediate_size=64, out_indices=[2, 3], **o),
    "dinov2": lambda **o: Dinov2Config(**TINY, mlp_ratio=2, out_indices=[2, 3], **o),
    "dinov2_with_registers": lambda **o: Dinov2WithRegistersConfig(**TINY, mlp_ratio=2, out_indices=[2, 3], **o),
    "dinov3_vit": lambda **o: DINOv3ViTConfig(**TINY, intermediate_size=64, out_indices=[2, 3], **o),
    "specialized_vit": lambda **o: SpecializedViTConfig(
        **TINY, mlp_ratio=2, num_register_tokens=2, specialize_final_norm=True, out_indices=[2, 3], **o
    ),
}
WITHOUT_CLASS_TOKEN = {
    "swin": SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, out_indices=[1, 2]),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, out_indices=[1, 2]),
}
CLASSLESS = {"linear": {"use_cls_token": False}, "dpt": {"readout": "ignore"}, "regression": {}}


def build(name="specialized_vit", head_type="linear", backbone=None, **options):
    torch.manual_seed(0)
    backbone = WITH_CLASS_TOKEN[name](**(backbone or {})) if name in WITH_CLASS_TOKEN else WITHOUT_CLASS_TOKEN[name]
    return DensePredictorForDepthEstimation(
        DensePredictorConfig(backbone_config=backbone.to_dict(), head_type=head_type, **options)
    )


def batch(size=(32, 48), batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = 1 + 8 * torch.rand(batch_size, *size, generator=generator)
    labels[:, :4] = 0
    return {"pixel_values": torch.randn(batch_size, 3, *size, generator=generator), "labels": labels}


# --- class tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_layernorm", [True, False])
@pytest.mark.parametrize("name", sorted(WITH_CLASS_TOKEN))
def test_class_tokens_are_normalised_as_the_maps_are(name, apply_layernorm):
    torch.manual_seed(0)
    options = {} if name == "beit" else {"apply_layernorm": apply_layernorm}
    backbone = build_backbone(WITH_CLASS_TOKEN[name](**options)).eval()
    for parameter in backbone.parameters():  # norms that are the identity would not show
        parameter.data += 0.1 * torch.randn(parameter.shape)
    images = batch()["pixel_values"]
    tokens = class_tokens_of(backbone, backbone(images, **class_token_request(backbone)))
    assert [tuple(token.shape) for token in tokens] == [(2, 32)] * 2
    if name in ("beit", "dinov3_vit"):  # these show no class token when asked for sequences
        states = backbone(images, output_hidden_states=True).hidden_states
        norm = getattr(backbone, "norm", None)
        expected = [states[2][:, 0], states[3][:, 0]]
        if norm is not None:
            expected = [norm(state) if apply_layernorm or last else state for last, state in enumerate(expected)]
    else:
        backbone.config.reshape_hidden_states = False
        expected = [sequence[:, 0] for sequence in backbone(images).feature_maps]
    for token, wanted in zip(tokens, expected, strict=True):
        torch.testing.assert_close(token, wanted, atol=1e-5, rtol=1e-5)


def test_the_backbone_hands_out_class_tokens_on_request_alone():
    backbone = SpecializedViTBackbone(WITH_CLASS_TOKEN["specialized_vit"]()).eval()
    images = batch()["pixel_values"]
    assert "class_tokens" not in backbone(images)
    asked = backbone(images, output_class_tokens=True)
    assert "hidden_states" not in asked and len(asked.class_tokens) == 2
    assert all(map(torch.equal, asked.feature_maps, backbone(images).feature_maps))


def test_the_class_token_behind_class_attention_is_the_last_layers():
    config = WITH_CLASS_TOKEN["specialized_vit"](class_attention_layers=1)
    backbone = SpecializedViTBackbone(config).eval()
    images = torch.cat([torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)])
    first, last = backbone(images, output_class_tokens=True).class_tokens
    assert torch.equal(first[0], first[1]) and not torch.equal(last[0], last[1])


@pytest.mark.parametrize(("head_type", "remedy"), [("linear", "use_cls_token=False"), ("dpt", "readout='ignore'")])
def test_backbones_without_class_tokens_say_what_helps(head_type, remedy):
    with pytest.raises(ValueError, match=f"not of SwinBackbone .model_type 'swin'.; pass {remedy}"):
        build("swin", head_type)


@pytest.mark.parametrize("head_type", sorted(CLASSLESS))
@pytest.mark.parametrize("name", sorted(WITHOUT_CLASS_TOKEN))
def test_hierarchical_backbones(name, head_type):
    model = build(name, head_type, head_options=CLASSLESS[head_type], freeze_backbone=True).train()
    output = model(**batch(size=(40, 56)))
    assert output.predicted_depth.shape == (2, 40, 56)
    output.loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.head.parameters())


def test_hidden_states_come_when_asked_for():
    model, images = build("dinov2").eval(), batch()["pixel_values"]
    assert set(model(images)) == {"predicted_depth"}
    assert len(model(images, output_hidden_states=True).hidden_states) == 4
    some = model(images, output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, True, True, False]


# --- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_type", sorted(CLASSLESS))
@pytest.mark.parametrize("name", ["dinov2", "specialized_vit"])
def test_kept_features_give_the_same_bits(name, head_type):
    model, inputs = build(name, head_type).eval(), batch()
    with torch.no_grad():
        kept = model.encode(inputs["pixel_values"])
        online, offline = model(**inputs), model(encoder_outputs=kept, labels=inputs["labels"])
    assert set(kept) == ({"feature_maps"} if head_type == "regression" else {"feature_maps", "class_tokens"})
    assert [tuple(feature_map.shape) for feature_map in kept["feature_maps"]] == [(2, 32, 4, 6)] * 2
    assert torch.equal(online.loss, offline.loss) and torch.equal(online.predicted_depth, offline.predicted_depth)


def test_kept_features_train_the_same_head():
    online, offline = (build(head_type="dpt", freeze_backbone=True).train() for _ in range(2))
    optimisers = [torch.optim.AdamW(model.head.parameters(), lr=1e-2) for model in (online, offline)]
    for seed in range(3):
        inputs = batch(seed=seed)
        with torch.no_grad():
            kept = offline.encode(inputs["pixel_values"])
        for model, given, optimiser in zip((online, offline), (inputs, None), optimisers, strict=True):
            optimiser.zero_grad()
            model(**(given or {"encoder_outputs": kept, "labels": inputs["labels"]})).loss.backward()
            optimiser.step()
    assert all(torch.equal(tensor, offline.state_dict()[name]) for name, tensor in online.state_dict().items())


def test_segmentation_from_kept_features_gives_the_same_bits():
    torch.manual_seed(0)
    config = DensePredictorConfig(backbone_config=WITH_CLASS_TOKEN["dinov2"](), head_type="mlp", num_labels=3)
    model = DensePredictorForSemanticSegmentation(config).eval()
    images, labels = batch()["pixel_values"], torch.randint(0, 3, (2, 32, 48))
    kept = model.encode(images)
    online, offline = model(images, labels), model(encoder_outputs=kept, labels=labels)
    assert set(kept) == {"feature_maps"}
    assert torch.equal(online.loss, offline.loss) and torch.equal(online.logits, offline.logits)
    assert model(encoder_outputs=kept).logits.shape == (2, 3, 4, 6)  # without labels the head's own size


def test_features_kept_in_half_precision_are_taken():
    model, inputs = build().eval(), batch()
    kept = {name: [part.half() for part in parts] for name, parts in model.encode(inputs["pixel_values"]).items()}
    depth = model(encoder_outputs=kept, labels=inputs["labels"]).predicted_depth
    assert depth.dtype == torch.float32
    torch.testing.assert_close(depth, model(**inputs).predicted_depth, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: {"encoder_outputs": kept, "pixel_values": torch.zeros(2, 3, 32, 48)}, "got both"),
        (lambda kept: {}, "got neither"),
        (lambda kept: {"encoder_outputs": {"feature_maps": kept["feature_maps"]}}, r"got \['feature_maps'\]"),
        (
            lambda kept: {"encoder_outputs": kept | {"feature_maps": kept["feature_maps"][:1]}},
            r"feature_maps of \[32, 32\] channels in encoder_outputs, got \[32\]",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    model = build().eval()
    with pytest.raises(ValueError, match=message):
        model(**change(model.encode(batch()["pixel_values"])))


# --- depth and loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_type", sorted(CLASSLESS))
def test_metres_lie_in_the_declared_range(head_type):
    model = build(head_type=head_type, min_depth=2, max_depth=3.0).eval()
    for parameter in model.head.parameters():
        parameter.data += torch.randn(parameter.shape)
    depth = model(20 * batch()["pixel_values"]).predicted_depth
    assert 2 <= depth.min() < depth.max() <= 3


def test_bins_are_convex_so_that_the_input_size_adds_nothing():
    model = build().eval()
    kept = model.encode(batch()["pixel_values"])
    own = model(encoder_outputs=kept).predicted_depth  # (2, 16, 24)
    expected = torch.nn.functional.interpolate(own[:, None], size=(32, 48), mode="bilinear")[:, 0]
    torch.testing.assert_close(model(batch()["pixel_values"]).predicted_depth, expected)


def test_labels_of_another_size_are_met_by_the_prediction():
    model, inputs = build().eval(), batch()
    labels = batch(size=(60, 90))["labels"]
    output = model(inputs["pixel_values"], labels=labels)
    assert output.predicted_depth.shape == (2, 32, 48)
    kept = model(encoder_outputs=model.encode(inputs["pixel_values"]), labels=labels)
    assert kept.predicted_depth.shape == (2, 60, 90)
    assert torch.equal(kept.loss, output.loss)
    torch.testing.assert_close(output.loss, model.criterion(kept.predicted_depth[:, None], labels))


def test_the_default_loss_is_the_targets():
    assert set(build().criterion.terms) == {"sig"}
    assert set(build(depth_target="disparity").criterion.terms) == {"scale_shift_invariant"}
    assert set(build(losses={"l1": 1.0}).criterion.terms) == {"l1"}


@pytest.mark.parametrize("depth_target", ["metres", "disparity"])
def test_a_batch_without_any_depth_trains_nothing(depth_target):
    model, inputs = build(depth_target=depth_target).train(), batch()
    output = model(inputs["pixel_values"], labels=torch.full_like(inputs["labels"], float("nan")))
    output.loss.backward()
    assert output.loss == 0 and not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)
    assert model.criterion.images_without_depth == 2


def test_what_was_counted_is_saved(tmp_path):
    model, inputs = build(loss_options={"sig": {"warm_up_steps": 2}}).train(), batch()
    inputs["labels"][0] = 0
    for _ in range(2):
        model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = DensePredictorForDepthEstimation.from_pretrained(tmp_path).train()
    assert loaded.criterion.images_without_depth == 2 and loaded.criterion.terms["sig"].training_steps == 2
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)


class Rooms(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: part[0] for name, part in batch(size=(32, 32), batch_size=1, seed=index).items()}


def train_steps(model, folder, **resume):
    arguments = TrainingArguments(
        folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rooms())
    assert not trainer.model_accepts_loss_kwargs and trainer.label_names == ["labels"]
    trainer.train(**resume)
    return model.state_dict()


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_resumed_in_its_warm_up_is_exact(adapted, tmp_path):
    def start():
        model = build(loss_options={"sig": {"warm_up_steps": 6}}, freeze_backbone=True)
        return get_peft_model(model, lora_config(model, "cls", rank=2)) if adapted else model

    whole = train_steps(start(), tmp_path / "whole")
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = train_steps(start(), tmp_path / "resumed", resume_from_checkpoint=checkpoint)
    steps = [name for name in whole if name.endswith("training_steps") and "original_module" not in name]
    assert [whole[name] for name in steps] == [8]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("head_type", sorted(CLASSLESS))
def test_a_few_steps_learn_a_scene(head_type):
    torch.manual_seed(0)
    model = build(head_type=head_type).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    inputs = batch(size=(32, 32))
    inputs["labels"] = torch.linspace(1, 6, 32)[:, None].expand(2, 32, 32).clone()
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# --- loading and serving ---------------------------------------------------------------------------------------------


def test_from_backbone_keeps_the_weights_and_takes_the_range(tmp_path):
    backbone = build_backbone(WITH_CLASS_TOKEN["specialized_vit"](apply_layernorm=False)).eval()
    model = DensePredictorForDepthEstimation.from_backbone(backbone, head_type="dpt", max_depth=80, fusion_size=16)
    assert model.backbone is backbone and model.head.neck.fusion_size == 16
    assert model.config.max_depth == 80 and model.head.max_depth == 80
    model.save_pretrained(tmp_path)
    loaded = AutoModelForDepthEstimation.from_pretrained(tmp_path)
    assert type(loaded) is DensePredictorForDepthEstimation
    images = batch()["pixel_values"]
    assert torch.equal(loaded(images).predicted_depth, model.eval()(images).predicted_depth)


@pytest.mark.parametrize("depth_target", ["metres", "disparity"])
def test_depth_estimation_pipeline(depth_target):
    processor = DPTImageProcessorPil(size={"height": 32, "width": 32})
    estimate = pipeline("depth-estimation", model=build(depth_target=depth_target).eval(), image_processor=processor)
    found = estimate([Image.new("RGB", (50, 40), "teal")] * 2)
    assert [result["depth"].size for result in found] == [(50, 40)] * 2
    assert torch.equal(found[0]["predicted_depth"], found[1]["predicted_depth"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_type": "mlp"}, "unknown head_type of a depth model 'mlp'; known: .'dpt'"),
        ({"depth_target": "meters"}, "unknown depth_target 'meters'"),
        ({"max_depth": 0.0}, "0 < min_depth < max_depth"),
        ({"losses": {"cross_entropy": 1.0}}, "unknown depth loss 'cross_entropy'"),
        ({"head_options": {"min_depth": 0.1}}, "the head 'linear' has no option 'min_depth'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_labels_that_do_not_fit_are_refused():
    model, inputs = build(), batch()
    with pytest.raises(ValueError, match=r"for 2 images, got \(1, 32, 48\)"):
        model(inputs["pixel_values"], labels=inputs["labels"][:1])
    with pytest.raises(ValueError, match=r"metres as floating-point labels, got torch\.int64"):
        model(inputs["pixel_values"], labels=inputs["labels"].long())
