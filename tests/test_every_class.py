"""What "works" means, for every model class: one table of classes, one test per demand."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from retrieval_models import text_config
from tiny_modality_models import mit_fusion
from torch.export import Dim
from transformers import Dinov2Config, Trainer, TrainingArguments, pipeline

from vitweave.auto import FAMILIES
from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_eva02_det import Eva02DetBackbone, Eva02DetModel
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import (
    LayerFusionBackbone,
    LayerFusionForImageClassification,
    LayerFusionModel,
)
from vitweave.modeling.modeling_modality_fusion import (
    ModalityFusionBackbone,
    ModalityFusionForSemanticSegmentation,
    ModalityFusionModel,
)
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage
from vitweave.modeling.modeling_multi_encoder import (
    MultiEncoderBackbone,
    MultiEncoderForImageClassification,
    MultiEncoderModel,
)
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration, MultiEncoderVlmModel
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "use_mask_token": False,  # gets no gradient without masked images
}
EVERYTHING = {
    "specialize_final_norm": True,
    "proj_blocks": 1,
    "mlp_blocks": 1,
    "num_register_tokens": 2,
    "attention_bias": "kv",
}


@dataclass
class Subject:
    """A model class, its tiny config and what it learns from."""

    model_class: type
    config: Callable
    task: str | None = None  # the pipeline that serves it
    unread: tuple[str, ...] = ()  # weights that cannot reach the output: the deepest class token, where maps are read

    def build(self, seed: int = 0, **changes):
        torch.manual_seed(seed)
        model = self.model_class(self.config(**changes))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():  # zero-initialised parameters would hide mistakes
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    def labels(self, pixels: torch.Tensor) -> dict:
        generator = torch.Generator().manual_seed(5)
        classifiers = (
            SpecializedViTForImageClassification,
            LayerFusionForImageClassification,
            MultiEncoderForImageClassification,
        )
        if self.model_class in classifiers:
            return {"labels": torch.randint(0, 3, pixels.shape[:1], generator=generator)}
        if self.model_class in (DensePredictorForSemanticSegmentation, ModalityFusionForSemanticSegmentation):
            return {"labels": torch.randint(0, 3, (pixels.shape[0], *pixels.shape[2:]), generator=generator)}
        if self.model_class is ModalityFusionForImageToImage:
            return {"labels": 2 * torch.rand(pixels.shape, generator=generator) - 1}
        if self.model_class is DensePredictorForDepthEstimation:
            return {"labels": 12 * torch.rand(pixels.shape[0], *pixels.shape[2:], generator=generator) - 3}
        if self.model_class is ImageTextRetrieverModel:
            ids = torch.randint(1, 40, (len(pixels), 9), generator=generator)
            return {"input_ids": ids, "sentence_ids": (torch.arange(9) // 3).expand_as(ids)}
        return {}


def vit(**changes) -> SpecializedViTConfig:
    return SpecializedViTConfig(**TINY | {"num_labels": 3} | changes)


def eva(**changes) -> Eva02DetConfig:
    """Every second block in windows, which the test images do not fill."""
    options = {name: TINY[name] for name in TINY if name not in ("mlp_ratio", "use_mask_token")}
    windows = {"window_size": 3, "window_blocks": [0, 2], "pretrain_image_size": 24}
    return Eva02DetConfig(**options | windows | changes)


def dense(backbone: Callable, head_type: str, **changes) -> Callable:
    return lambda **more: DensePredictorConfig(
        backbone_config=backbone(out_indices=[1, 3]), head_type=head_type, num_labels=3, **changes | more
    )


def dinov2(**changes) -> Dinov2Config:
    return Dinov2Config(**TINY | changes)


def fused(fusion_type: str, encoder: Callable = vit, **fields) -> Callable:
    def config(**changes) -> LayerFusionConfig:
        facts = {"fusion_type": fusion_type, "layers": [1, 3], "num_labels": 3} | fields | changes
        return LayerFusionConfig(encoder_config=encoder(), **facts)

    return config


def tower(**changes) -> MultiEncoderConfig:
    facts = {"num_labels": 3, "encoder_options": [{}, {"image_size": 48}]} | changes
    return MultiEncoderConfig(encoder_configs=[vit(), dinov2()], image_size=32, **facts)


def retriever(vision: Callable, **fields) -> Callable:
    def config(**changes) -> ImageTextRetrieverConfig:
        facts = {"projection_dim": 16, "text_config": text_config()} | fields | changes
        return ImageTextRetrieverConfig(vision_config=vision(), **facts)

    return config


DEEPEST_CLS = tuple(
    f"layer.2.{name}"
    for name in (
        *("norm2_cls.weight", "norm2_cls.bias"),
        *("layer_scale1_cls.lambda1", "layer_scale2_cls.lambda1"),
    )
)
DEEPEST_PATCHES = tuple(name.replace("_cls", "") for name in DEEPEST_CLS)  # where the class token alone is read
SUBJECTS = {
    "model": Subject(SpecializedViTModel, vit, "image-feature-extraction"),
    "model-everything": Subject(SpecializedViTModel, lambda **changes: vit(**EVERYTHING | changes)),
    "model-rotary-low-rank": Subject(
        SpecializedViTModel, lambda **changes: vit(position_embedding_type="rotary", cls_rank=2, **changes)
    ),
    "model-swiglu-plain": Subject(
        SpecializedViTModel, lambda **changes: vit(use_swiglu_ffn=True, layerscale_value=None, **changes)
    ),
    "model-relative": Subject(
        SpecializedViTModel, lambda **changes: vit(relative_position_bias="per_layer", **changes)
    ),
    "model-class-attention": Subject(SpecializedViTModel, lambda **changes: vit(class_attention_layers=2, **changes)),
    "backbone": Subject(
        SpecializedViTBackbone, lambda **changes: vit(out_indices=[1, 3], **changes), unread=DEEPEST_CLS
    ),
    "classifier": Subject(
        SpecializedViTForImageClassification,
        lambda **changes: vit(classifier_input="cls_mean", **changes),
        "image-classification",
    ),
    "eva": Subject(Eva02DetModel, eva, "image-feature-extraction"),
    "eva-backbone": Subject(Eva02DetBackbone, lambda **changes: eva(out_indices=[1, 3], **changes)),
    "fused": Subject(LayerFusionModel, fused("attentive_probe"), "image-feature-extraction"),
    "fused-dense": Subject(
        LayerFusionModel, fused("cross_layer_attention", fusion_options={"num_heads": 4, "dense": True})
    ),
    "fused-backbone": Subject(
        LayerFusionBackbone, fused("film"), unread=("fusion.gamma_global", "fusion.proj.weight", "fusion.proj.bias")
    ),
    "fused-pyramid": Subject(
        LayerFusionBackbone,
        # no halved level: torch.export would tie the image size to halves above 1
        fused("fpn", fusion_options={"out_channels": 8, "scales": [2, 1]}),
        unread=(
            *("fusion.gamma_global", "fusion.proj.weight", "fusion.proj.bias"),  # of the embedding
            *("model.layernorm.weight", "model.layernorm.bias", *DEEPEST_CLS),
        ),
    ),
    "fused-classifier": Subject(
        LayerFusionForImageClassification, fused("cross_layer_attention"), "image-classification"
    ),
    "tower": Subject(MultiEncoderModel, tower, "image-feature-extraction", unread=DEEPEST_CLS),
    "tower-backbone": Subject(MultiEncoderBackbone, tower, unread=DEEPEST_CLS),
    "tower-classifier": Subject(MultiEncoderForImageClassification, tower, "image-classification", unread=DEEPEST_CLS),
    "modalities": Subject(ModalityFusionModel, mit_fusion),
    "modalities-backbone": Subject(ModalityFusionBackbone, mit_fusion),
    "modalities-merged": Subject(
        ModalityFusionForSemanticSegmentation,
        lambda **changes: mit_fusion(**{"modalities": 3, "auxiliary": "max", "num_labels": 3} | changes),
    ),
    "translator": Subject(ModalityFusionForImageToImage, mit_fusion),
    "translator-vit": Subject(
        ModalityFusionForImageToImage,
        lambda **changes: ModalityFusionConfig(stream_config=dinov2(), **{"decoder_hidden_size": 16} | changes),
    ),
    "retriever": Subject(ImageTextRetrieverModel, retriever(vit), unread=DEEPEST_PATCHES),
    "retriever-local": Subject(
        ImageTextRetrieverModel,
        retriever(fused("film"), local_loss_weight=0.5, contrastive_loss="siglip"),
    ),
    "segmenter-linear": Subject(
        DensePredictorForSemanticSegmentation, dense(vit, "linear"), "image-segmentation", DEEPEST_CLS
    ),
    "segmenter-mlp": Subject(DensePredictorForSemanticSegmentation, dense(vit, "mlp"), unread=DEEPEST_CLS),
    "segmenter-dinov2": Subject(DensePredictorForSemanticSegmentation, dense(dinov2, "linear")),
    "segmenter-eva": Subject(DensePredictorForSemanticSegmentation, dense(eva, "linear")),
    "depth-linear": Subject(DensePredictorForDepthEstimation, dense(vit, "linear"), "depth-estimation"),
    "depth-dpt": Subject(
        DensePredictorForDepthEstimation,
        dense(vit, "dpt", losses={"sig": 1.0, "gradient": 0.5}, loss_options={"sig": {"warm_up_steps": 4}}),
    ),
    "depth-regression": Subject(
        DensePredictorForDepthEstimation, dense(vit, "regression", losses={"l1": 1.0}), unread=DEEPEST_CLS
    ),
    "depth-disparity": Subject(
        DensePredictorForDepthEstimation, dense(vit, "dpt", depth_target="disparity"), "depth-estimation"
    ),
    "depth-dinov2": Subject(DensePredictorForDepthEstimation, dense(dinov2, "linear")),
}
every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def pixels(batch: int = 2, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shown(model, images: torch.Tensor) -> torch.Tensor:
    """The images as a model takes them: one of several modalities gets one for each, its channels moved on."""
    config = getattr(model, "_orig_mod", model).config
    if config.model_type != "modality_fusion_vision":
        return images
    return torch.stack([images.roll(index, dims=1) for index in range(config.num_modalities)], dim=1)


def texts(model, batch: int) -> dict[str, torch.Tensor]:
    """What a model that compares images with texts needs beside them."""
    plain = getattr(model, "_orig_mod", model)  # torch.compile hides the signature
    if "input_ids" not in inspect.signature(plain.forward).parameters:
        return {}
    return {"input_ids": torch.arange(1, 10).repeat(batch, 1), "return_loss": False}


def tensors(outputs) -> list[torch.Tensor]:
    found = []
    for name, value in outputs.items():
        if name.startswith("logits_per"):
            continue  # compare all images with all texts
        found += [value] if isinstance(value, torch.Tensor) else list(value)
    return found


def run(model, images: torch.Tensor, **inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors(model(shown(model, images), **texts(model, len(images)) | inputs))


def assert_same(actual: list, expected: list, tolerance: float = 1e-6):
    """Equal up to rounding: for a few rows, matrix products depend on where in memory equal weights lie."""
    assert len(actual) == len(expected) > 0
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)


def test_the_table_names_every_class():
    registered = {model for _, models, _ in FAMILIES for model in models.values()}
    elsewhere = {MultiEncoderVlmForConditionalGeneration, MultiEncoderVlmModel}  # test_multi_encoder_vlm.py
    assert registered == {subject.model_class for subject in SUBJECTS.values()} | elsewhere


@every_subject
def test_saves_and_loads_bit_equal(subject, tmp_path):
    model = subject.build()
    model.save_pretrained(tmp_path)
    loaded, info = subject.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert_same(run(loaded.eval(), pixels()), run(model, pixels()))


@every_subject
def test_eager_equals_sdpa(subject):
    model = subject.build(attn_implementation="eager")
    expected = run(model, pixels())
    model.set_attn_implementation("sdpa")
    assert_same(run(model, pixels()), expected, 1e-5)


@every_subject
def test_one_image_equals_a_batch(subject):
    model = subject.build()
    one_by_one = [run(model, image[None]) for image in pixels(3)]
    assert_same([torch.cat(parts) for parts in zip(*one_by_one, strict=True)], run(model, pixels(3)), 1e-5)


@every_subject
def test_takes_other_and_oblong_sizes(subject):
    model = subject.build()
    for output in run(model, pixels(2, 48, 24)):
        assert torch.isfinite(output).all()


@every_subject
def test_bfloat16_is_close_and_keeps_its_type(subject, tmp_path):
    model = subject.build()
    expected = run(model, pixels())
    model.save_pretrained(tmp_path)
    half = subject.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    actual = run(half, pixels().bfloat16())
    assert {output.dtype for output in actual} == {torch.bfloat16}
    assert_same([output.float() for output in actual], expected, 0.15)


def gradients(model, subject) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    outputs = model(shown(model, pixels(4)), **subject.labels(pixels(4)))
    loss = (
        outputs.loss if getattr(outputs, "loss", None) is not None else sum(t.square().sum() for t in tensors(outputs))
    )
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@every_subject
def test_every_weight_gets_a_finite_gradient_also_with_checkpointing(subject):
    model = subject.build().train()
    expected = gradients(model, subject)
    idle = [name for name, grad in expected.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    assert set(idle) == {name for name in expected if name.endswith(subject.unread)}
    checkpointed = subject.build().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(checkpointed, subject)
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(actual[name], grad, atol=1e-6, rtol=1e-5)


QUICK = ("model", "segmenter-linear", "depth-dpt")  # the others take their turn in the slow tier


@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, s in SUBJECTS.items()],
)
def test_compiles_in_one_graph(subject):
    model = subject.build()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(run(compiled, pixels()), run(model, pixels()), 1e-5)


# transformers' own Dinov2 asks whether the grid is the stored one, which ties its graph to the traced size
EXPORTABLE = {name: subject for name, subject in SUBJECTS.items() if not name.endswith("dinov2")}


@pytest.mark.slow
@pytest.mark.parametrize("subject", EXPORTABLE.values(), ids=EXPORTABLE)
def test_exports_with_dynamic_batch_and_size(subject):
    model = subject.build()
    height, width = 8 * Dim("rows", min=2, max=16), 8 * Dim("columns", min=2, max=16)
    inputs = {"pixel_values": shown(model, pixels())} | texts(model, 2)
    axes = inputs["pixel_values"].ndim
    shapes = {"pixel_values": {0: Dim("batch", min=1, max=8), axes - 2: height, axes - 1: width}}
    shapes |= {name: {0: Dim("texts", min=1, max=8)} for name in inputs if name == "input_ids"}
    shapes |= {name: None for name in inputs if name not in shapes}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes)
    images = pixels(3, 24, 40)
    other = inputs | {"pixel_values": shown(model, images)} | texts(model, 3)
    with torch.no_grad():
        assert_same(tensors(program.module()(**other)), run(model, images), 1e-5)


@every_subject
def test_lora_attaches_saves_loads_and_merges(subject, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = subject.build()
    expected = run(base, pixels())
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "query"])).eval()
    assert_same(run(adapted.base_model.model, pixels()), expected)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    changed = run(adapted.base_model.model, pixels())
    assert not torch.equal(changed[0], expected[0])
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_same(run(reloaded.base_model.model, pixels()), changed)
    assert_same(run(reloaded.merge_and_unload(), pixels()), changed, 1e-4)


class Images(torch.utils.data.Dataset):
    """Eight fixed pictures with labels for a subject."""

    def __init__(self, subject: Subject):
        self.images = pixels(8, seed=3)
        self.labels = subject.labels(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.images[index], "labels": self.labels["labels"][index]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in SUBJECTS if n.startswith(("classifier", "fused-classifier", "segmenter", "depth"))]
)
def test_trainer_resumes_exactly(name, tmp_path):
    subject = SUBJECTS[name]
    options = {
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    whole = Trainer(
        subject.build().train(),
        TrainingArguments(tmp_path / "whole", max_steps=6, **options),
        train_dataset=Images(subject),
    )
    whole.train()
    resumed = Trainer(
        subject.build(seed=9).train(),
        TrainingArguments(tmp_path / "resumed", max_steps=6, **options),
        train_dataset=Images(subject),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = whole.model.state_dict()
    moved = [name for name, tensor in resumed.model.state_dict().items() if not torch.equal(tensor, expected[name])]
    assert not moved
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in subject.build().state_dict().items())


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.task])
def test_serves_its_pipeline(name, tmp_path):
    from PIL import Image
    from transformers import BitImageProcessorPil, DPTImageProcessorPil

    subject, size = SUBJECTS[name], {"height": 32, "width": 32}
    subject.build().save_pretrained(tmp_path)
    if subject.task == "image-segmentation":
        from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil

        SegmentationImageProcessorPil(size=size).save_pretrained(tmp_path)
    elif subject.task == "depth-estimation":
        DPTImageProcessorPil(size=size).save_pretrained(tmp_path)
    else:
        BitImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path)
    result = pipeline(subject.task, model=str(tmp_path))(Image.new("RGB", (50, 40), "teal"))
    if subject.task == "image-segmentation":
        assert {segment["label"] for segment in result} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
        assert result[0]["mask"].size == (50, 40)
    elif subject.task == "depth-estimation":
        assert result["predicted_depth"].shape == (40, 50) and result["depth"].size == (50, 40)
    elif subject.task == "image-classification":
        assert len(result) == 3 and abs(sum(row["score"] for row in result) - 1) < 1e-5
    else:
        tokens, channels = {"eva": (16, 32), "tower": (16, 64)}.get(name, (17, 32))
        assert len(result[0]) == tokens and len(result[0][0]) == channels
