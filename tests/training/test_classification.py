"""The classification recipe on the real Trainer: metrics, refusals, frozen and adapted encoders, exact resume."""

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    TrainerCallback,
    ViTImageProcessorPil,
)

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_layer_fusion import LayerFusionForImageClassification
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification
from vitweave.processing.crop_augmentation import ClassificationAugmentation
from vitweave.training.classification import train_classification
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.lora import lora_config
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
FEW_STEPS = {"per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True, "dataloader_num_workers": 0}


def tiny_model(**options):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    small |= {"qkv_blocks": "all", "hidden_dropout_prob": 0.1, "num_labels": 3}
    config = SpecializedViTConfig(**small | options)
    return SpecializedViTForImageClassification(config)


def stock_model():
    """A convolutional model with batch norms, outside vitweave."""
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32, num_labels=3)
    return MobileNetV2ForImageClassification(config)


def data(length=6, augmented=True, seed=0):
    augmentation = ClassificationAugmentation(32, scale=(0.5, 1.0), color_jitter=0.2) if augmented else None
    return ImageClassificationDataset(SyntheticClasses(length, seed=seed), PROCESSOR, augmentation)


def run(folder, model=None, train=None, **options):
    model, evaluation = model or tiny_model(), data(3, augmented=False, seed=1)
    return train_classification(model, train or data(), evaluation, PROCESSOR, folder, **FEW_STEPS | options)


class StopAt(TrainerCallback):
    """Breaks the run off the hard way, right after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def changed(model, start):
    """Names of the tensors, running statistics too, that training has moved."""
    state = start.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}


def test_the_best_checkpoint_is_kept_with_the_class_names_of_the_data(tmp_path):
    model = tiny_model()
    metrics = run(tmp_path, model, num_train_epochs=2)
    assert {"train_loss", "loss", "accuracy", "mean_class_accuracy", "accuracy_disc"} <= set(metrics)
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert fresh.config.id2label == SyntheticClasses.id2label and fresh.config.label2id["cross"] == 2
    assert not changed(fresh, model)
    logits = fresh.eval()(torch.stack([item["pixel_values"] for item in data(3, augmented=False, seed=1)])).logits
    assert metrics["accuracy"] == pytest.approx((logits.argmax(dim=1) == torch.arange(3)).float().mean().item())
    assert ViTImageProcessorPil.from_pretrained(tmp_path).size["height"] == 32


@pytest.mark.parametrize("build", [tiny_model, pytest.param(stock_model, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, build):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = build(), build()
    metrics = run(tmp_path / "whole", whole, **options)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", build(), callbacks=[StopAt(3)], **options)
    found = run(tmp_path / "broken", resumed, resume=True, **options)
    assert not changed(resumed, whole) and found["accuracy"] == metrics["accuracy"]


def test_a_frozen_encoder_stays_as_it_was_batch_norms_too(tmp_path):
    model = stock_model()
    model.mobilenet_v2.requires_grad_(False)
    run(tmp_path, model, max_steps=2)
    assert changed(model, stock_model()) == {"classifier.weight", "classifier.bias"}
    assert not model.mobilenet_v2._forward_pre_hooks
    free = stock_model()
    run(tmp_path / "free", free, max_steps=1)
    assert any("running_mean" in name for name in changed(free, stock_model()))


def test_adapters_train_their_part(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model = peft.get_peft_model(model, lora_config(model, preset="cls", rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = run(tmp_path, model, max_steps=3, encoder_lr_scale=0.5)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "accuracy" in metrics and (tmp_path / "adapter_model.safetensors").is_file()
    assert any("lora_B" in name for name in moved) and any("classifier" in name for name in moved)
    assert not any(name.endswith("q_proj.weight") for name in moved)


def test_the_encoder_learns_at_its_own_rate(tmp_path):
    slow, start = tiny_model(), tiny_model()
    run(tmp_path, slow, max_steps=2, encoder_lr_scale=0.0)
    assert changed(slow, start) == {"classifier.weight", "classifier.bias"}


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(TypeError, match="learning_rat"):
        run(tmp_path, learning_rat=1e-3)
    with pytest.raises(ValueError, match="one object"):
        train = data()
        train_classification(tiny_model(), train, train, PROCESSOR, tmp_path, **FEW_STEPS)
    with pytest.raises(ValueError, match="at least two classes"):
        run(tmp_path, tiny_model(num_labels=1))
    with pytest.raises(ValueError, match="tells 4 classes apart, the data has 3"):
        run(tmp_path, tiny_model(num_labels=4))
    with pytest.raises(ValueError, match=r"expected one id2label.*'round'.*'disc'"):
        run(tmp_path, tiny_model(id2label={0: "round", 1: "square", 2: "cross"}))
    nameless = ImageClassificationDataset([SyntheticClasses(6)[index] for index in range(6)], PROCESSOR)
    with pytest.raises(ValueError, match=r"sample \d: expected a class id from 0 to 1, got 2"):
        train_classification(tiny_model(num_labels=2), nameless, None, PROCESSOR, tmp_path, max_steps=3, **FEW_STEPS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_cached_features_train_the_same_classifier(tmp_path):
    models = []
    for name, folder in (("online", None), ("cached", tmp_path / "features")):
        # wide enough that torch multiplies matrices of any number of rows in one order; without dropout
        model = tiny_model(hidden_size=32, hidden_dropout_prob=0.0, classifier_input="cls_mean")
        model.specialized_vit.requires_grad_(False)
        run(tmp_path / name, model, train=data(augmented=False), cache_features=folder)
        models.append(model.state_dict())
    online, cached = models
    assert all(torch.equal(tensor, online[name]) for name, tensor in cached.items())
    assert any((tmp_path / "features").rglob("*.safetensors"))


def test_a_layer_fusion_trains_alike_on_cached_features_of_its_frozen_encoder(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    ends = {}
    for name, folder in {"online": None, "cached": tmp_path / "features"}.items():
        torch.manual_seed(0)
        encoder = SpecializedViTConfig(**small)
        config = LayerFusionConfig(encoder_config=encoder, layers=[1, 2], fusion_type="film", num_labels=3)
        model = LayerFusionForImageClassification(config)
        model.vision_encoder.requires_grad_(False)
        run(tmp_path / name, model, train=data(augmented=False), cache_features=folder)
        ends[name] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, ends["online"][key]) for key, tensor in ends["cached"].items())
    assert ends["cached"]["layer_fusion.fusion.gamma_global"].any()
