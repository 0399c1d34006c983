"""LoRA on the [CLS] path and its presets, with the real Trainer."""

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from vanilla_hosts import BASE_HOSTS, CLASSIFIER_HOSTS, randomized

from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)
from vitweave.modeling.tokens import by_role
from vitweave.training.lora import load_adapter, lora_config, save_adapter

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def classifier() -> SpecializedViTForImageClassification:
    """A specialised DINOv2 classifier, the same every time; all kinds of twins."""
    torch.manual_seed(0)
    host = randomized(CLASSIFIER_HOSTS["dinov2"](), torch.float32)
    flags = {"proj_blocks": [0], "mlp_blocks": [1], "specialize_final_norm": True}
    return SpecializedViTForImageClassification.from_vit(host, **flags)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(PIXELS).logits


def train(model: nn.Module, folder: Path, steps: int = 4):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        label_names=["labels"],
    )
    Trainer(model, arguments, train_dataset=data).train()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> PeftModel:
    model = get_peft_model(classifier(), lora_config(classifier(), "cls", rank=4))
    train(model, tmp_path_factory.mktemp("trainer"))
    return model.eval()


def test_attaching_changes_nothing():
    model = get_peft_model(classifier(), lora_config(classifier(), "cls", rank=4))
    assert torch.equal(logits(model), logits(classifier()))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("_cls." in name or ".classifier." in name for name in trainable)


def test_only_the_cls_rows_are_projected_differently(trained: PeftModel):
    hidden = torch.randn(2, 17, 32)
    before, after = (m.specialized_vit.encoder.layer[0].attention for m in (classifier(), trained.get_base_model()))
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old, new = (by_role(attention, name, 1, hidden) for attention in (before, after))
            assert torch.equal(old[:, 1:], new[:, 1:])
            assert not torch.equal(old[:, :1], new[:, :1])


def test_disabling_gives_the_base_back(trained: PeftModel):
    assert not torch.equal(logits(trained), logits(classifier()))
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(classifier()))


def test_saved_and_attached_to_a_fresh_conversion(trained: PeftModel, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), str(tmp_path))
    assert torch.equal(logits(again), logits(trained))
    saved = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    loaded = {name: parameter for name, parameter in again.named_parameters() if name in saved}
    assert loaded.keys() == saved
    weights = dict(trained.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.items())


def test_merged_into_an_ordinary_checkpoint(trained: PeftModel, tmp_path: Path):
    expected = logits(trained)
    trained.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(classifier(), str(tmp_path / "adapter")).merge_and_unload()
    assert type(merged) is SpecializedViTForImageClassification
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=1e-6)
    before, after = classifier().state_dict(), merged.state_dict()
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("_cls." in name or name.startswith("classifier.") for name in changed)
    assert "specialized_vit.encoder.layer.0.attention.q_proj_cls.weight" in changed
    assert "specialized_vit.encoder.layer.2.norm2_cls.bias" in changed
    merged.save_pretrained(tmp_path / "merged")
    opened = SpecializedViTForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(opened), logits(merged))


def test_an_adapter_remembers_the_vanilla_model(tmp_path: Path):
    randomized(CLASSIFIER_HOSTS["vit"](), torch.float32).save_pretrained(tmp_path / "vanilla")
    base = SpecializedViTForImageClassification.from_vit(tmp_path / "vanilla", qkv_blocks=[1])
    model = get_peft_model(base, lora_config(base, "cls", rank=2, init_lora_weights=False))
    save_adapter(model, tmp_path / "adapter")
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(tmp_path / "vanilla")
    again = load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert again.get_base_model().config.id2label == base.config.id2label


def targets(model: nn.Module, preset: str, **options) -> tuple[set[str], set[str]]:
    """Modules with low-rank factors, and modules trained in full, after attaching."""
    peft_model = get_peft_model(model, lora_config(model, preset, rank=2, **options)).get_base_model()
    names = dict(peft_model.named_modules())
    low_rank = {name.rpartition(".lora_A")[0] for name in names if name.endswith(".lora_A")}
    return low_rank, {name.rpartition(".modules_to_save")[0] for name in names if name.endswith(".modules_to_save")}


@pytest.mark.parametrize("preset", ["patch", "qkv", "cls", "head"])
def test_presets_find_their_modules(preset: str):
    low_rank, whole = targets(classifier(), preset)
    layers = "specialized_vit.encoder.layer."
    patch = {f"{layers}{block}.attention.{part}_proj" for block in range(3) for part in "qkv"}
    cls = {f"{layers}0.attention.{part}_proj_cls" for part in "qkv"}
    deeper = {f"{layers}0.attention.o_proj_cls", f"{layers}1.mlp.fc1_cls", f"{layers}1.mlp.fc2_cls"}
    assert low_rank == {"patch": patch, "qkv": patch | cls, "cls": cls | deeper, "head": set()}[preset]
    norms = {f"{layers}{b}.{n}_cls" for b in range(3) for n in ("norm1", "norm2", "layer_scale1", "layer_scale2")}
    assert whole == {"classifier"} | (norms | {"specialized_vit.layernorm_cls"} if preset == "cls" else set())


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3_vit", "clip"])
def test_presets_on_encoders_without_a_head(family: str):
    host = randomized(BASE_HOSTS[family](), torch.float32)
    low_rank, whole = targets(SpecializedViTModel.from_vit(host), "cls")
    assert low_rank == {f"encoder.layer.0.attention.{part}_proj_cls" for part in "qkv"}
    assert all("norm" in name or "layer_scale" in name for name in whole)
    low_rank, whole = targets(host, "patch")  # the vanilla model, under its own names
    assert len(low_rank) == 9
    assert not whole


def test_a_dense_predictor_adapts_its_backbone_and_trains_its_head():
    backbone = SpecializedViTBackbone.from_vit(randomized(BASE_HOSTS["dinov2"](), torch.float32), out_indices=[2, 3])
    model = DensePredictorForSemanticSegmentation.from_backbone(backbone, num_labels=3).eval()
    expected = logits(model)
    low_rank, whole = targets(model, "cls")
    assert low_rank == {f"backbone.encoder.layer.0.attention.{part}_proj_cls" for part in "qkv"}
    assert "head" in whole
    assert torch.equal(logits(model), expected)


def test_presets_that_match_nothing_or_twice_are_refused():
    base = randomized(BASE_HOSTS["dinov2"](), torch.float32)
    with pytest.raises(ValueError, match="unknown LoRA preset 'csl'"):
        lora_config(classifier(), "csl")
    with pytest.raises(ValueError, match="preset 'cls' matches no linear layer of Dinov2Model"):
        lora_config(base, "cls")
    with pytest.raises(ValueError, match=r"preset 'cls' matches no linear layer.*cls_rank=0"):
        lora_config(SpecializedViTModel.from_vit(base, cls_rank=2), "cls")
    with pytest.raises(ValueError, match="preset 'head' matches nothing"):
        lora_config(base, "head")
    with pytest.raises(ValueError, match=r"matched twice.*q_proj_cls"):
        lora_config(classifier(), modules_to_save=["specialized_vit.encoder.layer.0.attention.q_proj_cls"])
    with pytest.raises(ValueError, match=r"matched twice.*inside of specialized_vit.encoder.layer.0"):
        lora_config(classifier(), modules_to_save=["specialized_vit.encoder.layer.0"])
    with pytest.raises(ValueError, match="do not exist"):
        lora_config(classifier(), modules_to_save=["embeddings"])
    with pytest.raises(ValueError, match="target_modules follows from the preset"):
        lora_config(classifier(), target_modules=["q_proj"])
