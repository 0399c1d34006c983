"""A config can choose neither code nor kernels, nor have other files or the network opened."""

import json
import sys

import pytest
import torch
from transformers import AutoBackbone, AutoConfig, AutoModel, BertConfig

from vitweave.configuration.config_entries import check_stored
from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.own_models import build_backbone

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = {"model_type": "vit", "intermediate_size": 48, **PLAIN}
KERNELS = ("kernels-community/flash-attn", "evil/kernel@main:attention", "flash_attention_2", 5)


def saved_config(folder, **changes):
    """A config.json that says more than one of ours does."""
    SpecializedViTConfig(**PLAIN).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_cannot_choose_a_kernel(tmp_path, name, kernel):
    path = saved_config(tmp_path, **{name: kernel})
    for load in (AutoConfig.from_pretrained, SpecializedViTConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"expected {name} .*cannot choose kernels.*from_pretrained"):
            load(tmp_path)
    with pytest.raises(ValueError, match="cannot choose kernels"):
        SpecializedViTConfig.from_json_file(path)
    for config in ({**VIT, name: kernel}, {**VIT, name: {"": kernel}}):
        with pytest.raises(ValueError, match=r"encoder_config.*cannot choose kernels"):
            LayerFusionConfig(encoder_config=config, layers=[1])
        with pytest.raises(ValueError, match="cannot choose kernels"):
            MultiEncoderConfig(encoder_configs=[VIT, config])


def test_the_user_chooses_the_attention():
    config = SpecializedViTConfig.from_dict(dict(PLAIN), attn_implementation="someone/kernel")
    assert config._attn_implementation == "someone/kernel"
    assert SpecializedViTConfig.from_dict({**PLAIN, "attn_implementation": "eager"})._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["to_dict", "save_pretrained", "__dict__", "__class__", "__validators__"])
def test_a_file_replaces_no_part_of_the_class(tmp_path, name):
    saved_config(tmp_path, **{name: {}})
    with pytest.raises(ValueError, match=r"part of the class|change code"):
        AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"part of the class|change code"):
        resolve_config({**VIT, name: {}})


def test_a_file_switches_no_check_off():
    with pytest.raises(ValueError, match="'validate_sizes', a part of the class"):
        SpecializedViTConfig.from_dict({**PLAIN, "validate_sizes": None, "transformers_version": "5.23.0"})


ATTACKS = (
    ({"model_type": "dpt", "backbone": "evil/repo"}, "a name to be looked up|complete"),
    ({"model_type": "timm_backbone", "backbone": "hf_hub:evil/repo"}, "complete"),
    ({"model_type": "timm_wrapper", "architecture": "local-dir:evil"}, "complete"),
    ({"model_type": "timm_wrapper", "architecture": "vit", "model_args": {"checkpoint_path": "../x.bin"}}, "complete"),
    ({"model_type": "detr", "use_pretrained_backbone": True}, "complete"),
    ({**VIT, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}, "change code"),
    ({**VIT, "dtype": "load"}, "dtype .*such as 'float32'"),
    ({**VIT, "num_labels": 10**9}, "num_labels .*to 262144, got 1000000000"),
    ({**VIT, "num_hidden_layers": 10**9}, "num_hidden_layers .*to 512"),
    ({**VIT, "attribute_map": {}}, "part of the class"),
)


@pytest.mark.parametrize(("config", "message"), ATTACKS)
def test_a_config_inside_another_is_only_a_config(config, message):
    with pytest.raises(ValueError, match=message):
        DensePredictorConfig(backbone_config=config)


def test_code_of_a_config_inside_another_is_forgotten(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked whether to run foreign code"))
    foreign = {"auto_map": {"AutoModel": "evil/repo--evil.Evil", "AutoBackbone": "evil/repo--evil.Evil"}}
    config = DensePredictorConfig(backbone_config={**VIT, **foreign})
    assert not hasattr(config.backbone_config, "auto_map")
    assert "auto_map" not in json.dumps(config.to_dict())
    bert = BertConfig(hidden_size=32, num_attention_heads=2, **foreign)  # no backbone of transformers
    with pytest.raises(ValueError, match="AutoBackbone opens, got the model_type 'bert'"):
        build_backbone(bert)
    assert not [name for name in sys.modules if "evil" in name]
    with torch.device("meta"):
        assert type(AutoBackbone.from_config(SpecializedViTConfig(**PLAIN, **foreign))).__module__.startswith(
            "vitweave"
        )


def test_code_named_beside_weights_is_not_run_and_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked whether to run foreign code"))
    SpecializedViTModel(SpecializedViTConfig(**PLAIN)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    foreign = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "_name_or_path": "../../evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    assert type(AutoModel.from_pretrained(tmp_path)) is SpecializedViTModel
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is SpecializedViTModel  # ours is installed
    assert not (tmp_path / "was_run").exists()


def test_nesting_is_refused_before_anything_recurses():
    config = VIT
    for _ in range(5000):
        config = {"model_type": "layer_fusion_vision", "encoder_config": config}
    with pytest.raises(ValueError, match=r"nested at most 20 deep|64 configs"):
        check_stored(config, "encoder_config")
    with pytest.raises(ValueError, match=r"nested at most 20 deep|64 configs"):
        LayerFusionConfig(encoder_config=config)
