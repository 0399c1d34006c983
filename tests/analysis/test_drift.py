import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from vitweave.analysis.drift import specialization_drift
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel

TINY = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4)


def specialized(**flags):
    """A specialised ViT whose twins are equal."""
    torch.manual_seed(0)
    model = SpecializedViTModel(SpecializedViTConfig(**TINY, **flags))
    state = model.state_dict()
    model.load_state_dict({name: state.get(name.replace("_cls.", "."), value) for name, value in state.items()})
    return model


def test_equal_twins_have_not_drifted():
    drifts = specialization_drift(specialized(specialize_final_norm=True))
    # 3 blocks of 2 norms (weight, bias) and 2 LayerScales, q, k, v of block 0, the final norm
    assert len(drifts) == 3 * (2 * 2 + 2) + 3 * 2 + 2
    assert {drift.relative for drift in drifts} == {0.0}
    assert {drift.block for drift in drifts} == {0, 1, 2, None}


def test_drift_is_the_relative_distance():
    model = specialized()
    with torch.no_grad():
        model.encoder.layer[1].norm2_cls.weight.mul_(1.25)
        model.encoder.layer[2].norm1_cls.bias.add_(1)  # the patch bias is 0
    found = {drift.name: drift for drift in specialization_drift(model) if drift.absolute}
    assert set(found) == {"encoder.layer.1.norm2.weight", "encoder.layer.2.norm1.bias"}
    assert found["encoder.layer.1.norm2.weight"].relative == pytest.approx(0.25)
    assert found["encoder.layer.2.norm1.bias"].absolute == pytest.approx(4)
    assert found["encoder.layer.2.norm1.bias"].relative == float("inf")


@pytest.mark.parametrize("fused", [False, True])
def test_low_rank_counts_as_the_weight_it_adds(fused):
    model = specialized(cls_rank=2, cls_alpha=6, cls_rank_fused=fused)
    attention = model.encoder.layer[0].attention
    with torch.no_grad():
        attention.v_proj_cls_up.weight.normal_()
    found = {drift.name: drift.relative for drift in specialization_drift(model)}
    down = attention.qkv_cls_down if fused else attention.v_proj_cls_down
    added = 3 * attention.v_proj_cls_up.weight @ down.weight
    name = "encoder.layer.0.attention.v_proj.weight"
    assert found[name] == pytest.approx((added.norm() / attention.v_proj.weight.norm()).item())


def test_vanilla_models_have_none():
    assert specialization_drift(Dinov2Model(Dinov2Config(**TINY))) == []


def test_adapters_must_be_merged_first():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(specialized(), peft.LoraConfig(r=2, target_modules=["q_proj_cls"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        specialization_drift(adapted)
