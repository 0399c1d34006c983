"""Which parts of a vision-language model learn in which stage."""

import pytest
import torch
from tiny_vlm import CONVNEXT, VIT, tiny_images, tiny_vlm_config, tiny_vlm_processor

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.vlm_stages import STAGES, apply_stage, stage_table

LEO = {"fusion_type": "sequence_concat", "hidden_size": 32}
FAST_SLOW = {
    "encoder_configs": [VIT, CONVNEXT],
    "encoder_options": [{}, {"image_size": 128}],
    "fusion_type": "mixture_of_resolution",
    "fusion_options": {"adapter_layers": [1]},
}


def build(tower=None, **options):
    torch.manual_seed(0)
    return MultiEncoderVlmForConditionalGeneration(tiny_vlm_config(tower, **options))


def trained(model):
    """First parts of the names of what learns."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {".".join(name.split(".")[: 3 if "vision_tower" in name else 2]).removeprefix("model.") for name in names}


ENCODERS = {"vision_tower.encoder_0", "vision_tower.encoder_1"}
LANGUAGE = {"language_model", "lm_head.weight"}
FUSED = {"multi_modal_projector", "vision_tower.fusion"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("projector", {"multi_modal_projector"}),
        ("leo-1", FUSED),
        ("leo-2", FUSED | LANGUAGE),
        ("projector_and_fusion+language_model", FUSED | LANGUAGE),
        ("cambrian-2", FUSED | LANGUAGE),
        ("eagle-2", FUSED | LANGUAGE | ENCODERS),
        ("all", FUSED | LANGUAGE | ENCODERS),
    ],
)
def test_a_stage_trains_its_parts(stage, expected):
    model = build(LEO)
    apply_stage(model, "all")
    apply_stage(model, stage)
    assert trained(model) == expected


def test_the_first_stage_of_llava_hr_leaves_the_adapters_alone():
    model = build(FAST_SLOW)
    apply_stage(model, "llava-hr-1")
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fusion = {name.split("fusion.")[1].split(".")[0] for name in learns if "fusion." in name}
    assert fusion == {"fast_proj", "slow_proj"}
    assert any("adapters" in name for name, _ in model.named_parameters())
    apply_stage(model, "llava-hr-2")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_count_every_weight_once():
    model = build(LEO, tie_word_embeddings=True)
    rows = apply_stage(model, "leo-1")
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.trained for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [row.part for row in rows] == [
        "encoder 0 (vit)",
        "encoder 1 (convnext)",
        "fusion",
        "projector",
        "language model",
    ]
    lines = stage_table(rows).splitlines()
    assert len(lines) == 7 and lines[0].split() == ["part", "parameters", "trained"]
    assert lines[1].endswith("-") and lines[-1].split()[-1] == f"{sum(row.trained for row in rows):,}"
    assert len({len(line) for line in lines}) == 1


def test_parts_that_learn_nothing_stay_in_evaluation_mode():
    model = build(LEO).train()
    apply_stage(model, "leo-1")
    model.train()
    assert not model.model.vision_tower.encoder_0.training and not model.model.language_model.training
    assert model.model.vision_tower.fusion.training and model.model.multi_modal_projector.training


def test_what_the_config_freezes_stays_frozen():
    model = build({**LEO, "encoder_options": [{"frozen": True}, {"image_size": 64, "layer": 3}]})
    apply_stage(model, "all")
    assert trained(model) == FUSED | LANGUAGE | ENCODERS - {"vision_tower.encoder_0"}
    frozen = build(LEO, freeze_language_model=True)
    apply_stage(frozen, "leo-2")
    assert trained(frozen) == FUSED


def test_a_step_changes_what_learns_and_nothing_else():
    model = build(LEO).train()
    apply_stage(model, "leo-1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tiny_vlm_processor(num_image_tokens=32)(
        images=[tiny_images(1)], text=["a <image> cat"], return_tensors="pt"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown stage 'leo-3' .did you mean"):
        apply_stage(build(LEO), "leo-3")
    with pytest.raises(ValueError, match=r"'projector' trains .* no parameters here"):
        apply_stage(build(LEO, projector_type="identity"), "projector")
    assert all(
        set(parts) <= {"projector", "fusion", "alignment", "language_model", "encoders"} for parts in STAGES.values()
    )
