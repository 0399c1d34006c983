"""Segmentation over native backbones: every promise of the design on tiny models."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ConvNextConfig,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    Trainer,
    TrainingArguments,
    VitPoseBackboneConfig,
    pipeline,
)

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil

NUM_LABELS = 4
BACKBONES = {
    "dinov2": Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        use_mask_token=False,
        out_indices=[2, 3],
    ),
    "specialized_vit": SpecializedViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        use_mask_token=False,
        out_indices=[2, 3],
    ),
    "swin": SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4, out_indices=[1, 2]
    ),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, out_indices=[1, 2]),
}
UNUSED = {
    "swin": {"swin.layernorm.weight", "swin.layernorm.bias"},  # the native backbone skips this norm
    # after the last attention nothing but the final norm, which maps do not show, reads the [CLS] row
    "specialized_vit": {
        f"encoder.layer.2.{name}"
        for name in ("norm2_cls.weight", "norm2_cls.bias", "layer_scale1_cls.lambda1", "layer_scale2_cls.lambda1")
    },
}


def build(name="dinov2", head_type="linear", **options):
    torch.manual_seed(0)
    backbone_config = BACKBONES[name].to_dict()
    config = DensePredictorConfig(
        backbone_config=backbone_config, head_type=head_type, num_labels=NUM_LABELS, **options
    )
    model = DensePredictorForSemanticSegmentation(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that show when they are lost
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def batch(size=(32, 48), batch_size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, NUM_LABELS, (batch_size, *size), generator=generator)
    labels[:, :4] = 255
    return {"pixel_values": torch.randn(batch_size, 3, *size, generator=generator), "labels": labels}


class RandomScenes(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: tensor[0] for name, tensor in batch(size=(32, 32), batch_size=1, seed=index).items()}


def train(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=RandomScenes())
    trainer.train()
    return trainer


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_logits_at_input_size_and_a_gradient_everywhere(name, head_type):
    model = build(name, head_type, losses={"cross_entropy": 1.0, "dice": 0.5}, class_weights=[1, 2, 1, 0.5]).train()
    output = model(**batch())
    assert output.logits.shape == (2, NUM_LABELS, 32, 48)
    output.loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()}
    assert idle == {f"backbone.{n}" for n in UNUSED.get(name, ())}
    if name == "specialized_vit":  # zeros, not None: training on several devices does not take them for unused
        assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("head_type", ["linear", "mlp"])
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_save_load_gives_the_same_bits(name, head_type, tmp_path):
    model = build(name, head_type).eval()
    model.save_pretrained(tmp_path)
    loaded, info = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    images = batch()["pixel_values"]
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize(("head_type", "std"), [("linear", 0.01), ("mlp", 0.02)])
def test_a_new_head_starts_alike_whether_built_or_loaded(head_type, std, tmp_path):
    torch.manual_seed(0)
    config = DensePredictorConfig(backbone_config=BACKBONES["dinov2"].to_dict(), head_type=head_type, num_labels=50)
    model = DensePredictorForSemanticSegmentation(config)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "head." not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    for head in (model.head, DensePredictorForSemanticSegmentation.from_pretrained(tmp_path).head):
        assert head.classifier.weight.std().item() == pytest.approx(std, rel=0.1)
        assert not head.classifier.bias.any()
        assert not head.norm.running_mean.any()
        assert (head.norm.running_var == 1).all()


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_batch_gives_what_its_pictures_give(name):
    model = build(name).eval()
    images = batch(batch_size=3)["pixel_values"]
    alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(model(images).logits, alone, rtol=1e-4, atol=1e-5)


def test_the_maps_are_the_ones_asked_for():
    model = build().eval()
    images = batch()["pixel_values"]
    maps = model.backbone(images).feature_maps
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 6)] * 2
    expected = torch.nn.functional.interpolate(model.head(list(maps)), size=(32, 48), mode="bilinear")
    torch.testing.assert_close(model(images).logits, expected)


def test_reloaded_settings_give_the_same_loss(tmp_path):
    options = {
        "losses": {"focal": 1.0, "ohem": 0.5, "dice": 1.0},
        "loss_options": {"focal": {"gamma": 1.0}, "ohem": {"min_kept": 10}},
        "class_weights": [1.0, 0.0, 2.0, 1.0],
    }
    model = build(**options).eval()
    model.save_pretrained(tmp_path)
    loaded = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch()).loss, model(**batch()).loss)
    assert not torch.equal(model(**batch()).loss, build().eval()(**batch()).loss)


def test_the_ignore_index_is_an_option():
    inputs = batch()
    expected = build().eval()(**inputs).loss
    inputs["labels"][inputs["labels"] == 255] = -100
    assert torch.equal(build(ignore_index=-100).eval()(**inputs).loss, expected)


def test_bfloat16():
    model, inputs = build().eval(), batch()
    half = build().eval().bfloat16()
    output = half(inputs["pixel_values"].bfloat16(), labels=inputs["labels"])
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(model(**inputs).loss.item(), rel=0.05)


def test_attention_implementations_agree_and_reach_the_backbone():
    model, images = build().eval(), batch()["pixel_values"]
    expected = model(images).logits
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    torch.testing.assert_close(model(images).logits, expected)
    output = model(images, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3
    assert len(output.hidden_states) == 4


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for model in (plain, checkpointed):
        model(**batch()).loss.backward()
    for (name, expected), (_, weight) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(weight.grad, expected.grad, msg=name)


def test_properties_of_the_backbone_reach_the_model():
    model = build()
    assert {"Dinov2Layer", "LinearHead"} <= set(model._no_split_modules)
    assert model.get_input_embeddings() is model.backbone.embeddings.patch_embeddings
    assert model.base_model is model.backbone


@pytest.mark.slow
@pytest.mark.parametrize("head_type", ["linear", "mlp"])
def test_compiles_to_one_graph(head_type):
    torch._dynamo.reset()
    model, inputs = build(head_type=head_type).eval(), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(compiled.logits, model(**inputs).logits)
    torch.testing.assert_close(compiled.loss, model(**inputs).loss)


@pytest.mark.slow
def test_exports_with_any_size():
    model, images = build().eval(), batch()["pixel_values"]
    free = {0: torch.export.Dim("batch"), 2: 8 * torch.export.Dim("rows"), 3: 8 * torch.export.Dim("columns")}
    exported = torch.export.export(model, (images,), dynamic_shapes={"pixel_values": free}).module()
    other = batch(size=(64, 40), batch_size=3)["pixel_values"]
    torch.testing.assert_close(exported(other).logits, model(other).logits)


def test_from_backbone_keeps_the_weights(tmp_path):
    torch.manual_seed(1)
    backbone = Dinov2Backbone(BACKBONES["dinov2"]).eval()
    images = batch()["pixel_values"]
    expected = backbone(images).feature_maps
    names = {0: "sky", 1: "road", 2: "tree"}
    model = DensePredictorForSemanticSegmentation.from_backbone(
        backbone, id2label=names, head_type="mlp", hidden_size=24, losses={"dice": 1.0}
    )
    assert model.backbone is backbone
    assert all(map(torch.equal, model.backbone(images).feature_maps, expected))
    assert model.config.id2label == names
    assert model.config.head_options == {"hidden_size": 24}
    assert model.config.losses == {"dice": 1.0}
    model.save_pretrained(tmp_path)
    loaded = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model.eval()(images).logits)


def test_from_backbone_keeps_dtype_and_attention():
    backbone = Dinov2Backbone._from_config(BACKBONES["dinov2"], attn_implementation="eager").bfloat16()
    model = DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3)
    assert model.backbone.config._attn_implementation == "eager"
    assert model(batch()["pixel_values"].bfloat16()).logits.dtype == torch.bfloat16


def test_trainer_moves_every_weight(tmp_path):
    model = build()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = train(model, tmp_path)
    assert not trainer.model_accepts_loss_kwargs
    assert not [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_frozen_backbone_stands_still(tmp_path):
    dropout = {**BACKBONES["dinov2"].to_dict(), "hidden_dropout_prob": 0.5, "drop_path_rate": 0.5}
    config = DensePredictorConfig(backbone_config=dropout, num_labels=NUM_LABELS, freeze_backbone=True)
    model = DensePredictorForSemanticSegmentation(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, tmp_path / "run")
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("backbone."))
    assert not any(torch.equal(after[name], before[name]) for name in after if name.startswith("head."))
    assert model.train().head.training
    assert not any(module.training for module in model.backbone.modules())
    model.save_pretrained(tmp_path / "saved")
    loaded = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path / "saved").train()
    assert not any(weight.requires_grad for weight in loaded.backbone.parameters())
    assert not loaded.backbone.training
    thawed = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path / "saved", freeze_backbone=False).train()
    assert all(weight.requires_grad for weight in thawed.parameters())
    assert thawed.backbone.training


def test_lora_attaches_trains_and_reloads(tmp_path):
    model = build(freeze_backbone=True)
    config = LoraConfig(r=2, target_modules=r".*\.(query|q_proj)", lora_dropout=0.5, modules_to_save=["head"])
    adapted = get_peft_model(model, config)
    train(adapted, tmp_path / "run")
    moved = [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_B" in n and p.any()]
    assert len(moved) == 3
    assert adapted.train().base_model.model.backbone.training  # the adapters' dropout is on
    adapted.eval().save_pretrained(tmp_path / "adapter")
    images = batch()["pixel_values"]
    expected = adapted(pixel_values=images).logits
    reloaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    assert torch.equal(reloaded(pixel_values=images).logits, expected)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_image_segmentation_pipeline():
    processor = SegmentationImageProcessorPil(size={"height": 32, "width": 32})
    segment = pipeline("image-segmentation", model=build().eval(), image_processor=processor)
    found = segment(Image.new("RGB", (50, 40), (120, 40, 200)))
    assert {part["label"] for part in found} <= {f"LABEL_{i}" for i in range(NUM_LABELS)}
    assert all(part["mask"].size == (50, 40) for part in found)
    assert sum(sum(part["mask"].histogram()[1:]) for part in found) == 50 * 40  # every pixel has exactly one class


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 32, 32), "expected 3 image channels, got 4"),
        (torch.zeros(2, 3, 32, 7), "32x7 pixels is smaller than one patch of 8x8"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\); a single image needs"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build()(images)


def test_labels_that_do_not_fit_are_refused():
    inputs = batch()
    with pytest.raises(ValueError, match=r"\(2, 32, 48\), got \(2, 16, 48\)"):
        build()(inputs["pixel_values"], labels=inputs["labels"][:, :16])
    with pytest.raises(ValueError, match=r"class ids 0 to 3 .* got \[4, 256\]"):
        build()(inputs["pixel_values"], labels=inputs["labels"] + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_type": "conv"}, "known: .'linear', 'mlp'"),
        ({"head_options": {"hidden_size": 3}}, "the head 'linear' has no option 'hidden_size'"),
        ({"losses": {"lovasz": 1.0}}, "unknown loss 'lovasz'"),
        ({"class_weights": [1.0]}, "4 in all, got 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_backbones_without_maps_are_refused():
    flat = {**BACKBONES["dinov2"].to_dict(), "reshape_hidden_states": False}
    with pytest.raises(ValueError, match="got reshape_hidden_states=False"):
        DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=flat))
    sequences = VitPoseBackboneConfig(
        image_size=[32, 32], patch_size=[8, 8], hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"got \(2, 16, 32\) from VitPoseBackbone"):
        DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=sequences))(
            torch.zeros(2, 3, 32, 32)
        )
    with pytest.raises(ValueError, match="got Dinov2Model; load it with AutoBackbone"):
        DensePredictorForSemanticSegmentation.from_backbone(Dinov2Model(BACKBONES["dinov2"]))
    backbone = Dinov2Backbone(BACKBONES["dinov2"])
    with pytest.raises(ValueError, match="num_labels=3, but id2label names 2"):
        DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="no option 'droput'"):
        DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3, droput=0.1)


def test_frozen_encoder_below_a_fusion_that_trains(tmp_path):
    """freeze_backbone freezes what lies below the fusion; what is kept of the encoder gives the same logits."""
    fusion = LayerFusionConfig(
        encoder_config=BACKBONES["dinov2"], layers=[2, 3], fusion_type="concat", fusion_options={"dense": True}
    )
    config = DensePredictorConfig(backbone_config=fusion, num_labels=NUM_LABELS, freeze_backbone=True)
    torch.manual_seed(0)
    model = DensePredictorForSemanticSegmentation(config).train()
    trained = {name.split(".")[1] for name, weight in model.named_parameters() if weight.requires_grad}
    assert "encoder" not in trained and "fusion" in trained
    assert not model.backbone.encoder.model.training and model.backbone.fusion.training
    torch.nn.init.normal_(model.backbone.fusion.gamma_patch)
    pixel_values, labels = torch.rand(2, 3, 48, 32), torch.randint(0, NUM_LABELS, (2, 48, 32))
    kept = model.eval().encode(pixel_values)
    online, cached = model(pixel_values, labels), model(encoder_outputs=kept, labels=labels)
    assert torch.equal(online.logits, cached.logits)
    cached.loss.backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "fusion.gamma_patch" in name)
    model.save_pretrained(tmp_path)
    loaded = DensePredictorForSemanticSegmentation.from_pretrained(tmp_path)
    assert not any(weight.requires_grad for weight in loaded.backbone.encoder.parameters())
    assert torch.equal(loaded(encoder_outputs=loaded.encode(pixel_values), labels=labels).logits, cached.logits)
