"""LoRA on the language model, with the fusion trained and saved in full."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_vlm import EightSamples, tiny_vlm_config

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.vlm_lora import vlm_lora_config
from vitweave.training.vlm_stages import apply_stage

SVA = {"fusion_type": "spatial_vision_aggregator", "fusion_options": {"vision_hidden_size": 32, "num_heads": 2}}
SIDES = {"image_size": 64, "layer": 3}


def build(**options) -> MultiEncoderVlmForConditionalGeneration:
    torch.manual_seed(0)
    tower = {**SVA, "encoder_options": [{"lora": True}, SIDES]}
    return MultiEncoderVlmForConditionalGeneration(tiny_vlm_config(tower, image_newline=True, **options)).eval()


@pytest.fixture(scope="module")
def batch():
    data = EightSamples()
    data.processor.image_newline = True
    return data.collate([data[0], data[1]])


@pytest.fixture(scope="module")
def trained(batch):
    model = get_peft_model(build(), vlm_lora_config(build(), rank=4, alpha=8)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_what_is_adapted_and_what_is_trained_in_full(trained):
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    low_rank = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in names if "lora_" in name}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    language = {name for name in low_rank if name.startswith("language_model.")}
    assert {name.split(".")[-1] for name in language} == set(linears) and len(language) == 2 * len(linears)
    assert {name.split(".")[1] for name in low_rank - language} == {"encoder_0"}
    whole = {name.split(".modules_to_save")[0] for name in names if "lora_" not in name}
    assert {name.removeprefix("base_model.model.model.") for name in whole} == {
        "vision_tower.fusion",
        "multi_modal_projector",
        "image_newline",
    }


def test_every_trained_weight_gets_a_gradient(trained, batch):
    trained.zero_grad()
    trained(**batch).loss.backward()
    idle = [name for name, p in trained.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    trained.zero_grad()
    assert not idle


def test_adapter_folder_holds_the_fusion(trained, batch, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch), logits(trained, batch))
    assert not torch.equal(logits(build(), batch), logits(trained, batch))


def test_merged_equals_adapted_and_generates(trained, batch, tmp_path):
    trained.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(build(), str(tmp_path)).merge_and_unload().eval()
    assert type(merged) is MultiEncoderVlmForConditionalGeneration
    torch.testing.assert_close(logits(merged, batch), logits(trained, batch), atol=1e-4, rtol=1e-4)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(merged.generate(**inputs, **options), trained.generate(**inputs, **options))
    merged.save_pretrained(tmp_path / "merged")
    again = MultiEncoderVlmForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, batch), logits(merged, batch))


def test_refusals(trained):
    with pytest.raises(ValueError, match="target_modules follows from the model"):
        vlm_lora_config(build(), target_modules="all-linear")
    with pytest.raises(ValueError, match="matched twice"):
        vlm_lora_config(build(), modules_to_save=["model.multi_modal_projector"])
    with pytest.raises(ValueError, match="without adapters"):
        apply_stage(trained, "all")
    assert "lm_head" in vlm_lora_config(build(), modules_to_save=["lm_head"]).modules_to_save
