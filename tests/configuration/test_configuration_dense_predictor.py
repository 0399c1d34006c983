"""The config of the dense predictors."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Dinov2Config

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig

BACKBONE = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 3, "out_indices": [1, 3]}


def test_round_trip(tmp_path):
    config = DensePredictorConfig(
        backbone_config=BACKBONE,
        head_type="mlp",
        head_options={"hidden_size": 24},
        losses={"dice": 1, "focal": 0.5},
        loss_options={"focal": {"gamma": 1.5}},
        class_weights=[1.0, 2, 0.5],
        ignore_index=-100,
        freeze_backbone=True,
        num_labels=3,
        depth_target="disparity",
        min_depth=1,
        max_depth=80.0,
    )
    config.save_pretrained(tmp_path)
    loaded = DensePredictorConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.backbone_config, Dinov2Config)
    saved, reloaded = json.loads(config.to_json_string()), json.loads(loaded.to_json_string())
    assert {**saved, "_name_or_path": None} == {**reloaded, "_name_or_path": None}
    assert loaded.backbone_config.out_features == ["stage1", "stage3"]


def test_the_backbone_can_be_overridden_on_loading(tmp_path):
    DensePredictorConfig(backbone_config=BACKBONE).save_pretrained(tmp_path)
    loaded = DensePredictorConfig.from_pretrained(tmp_path, backbone_config={**BACKBONE, "hidden_size": 48})
    assert loaded.backbone_config.hidden_size == 48


def test_defaults():
    config = DensePredictorConfig()
    assert config.backbone_config.model_type == "specialized_vit"
    assert config.losses is None  # each task has its own default
    assert (config.depth_target, config.min_depth, config.max_depth) == ("metres", 0.001, 10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": [1.0]}, "did you mean 'class_weights'|did you mean class_weights"),
        ({"backbone_config": {"hidden_size": 32}}, "needs a 'model_type'"),
        ({"backbone_config": {"model_type": "dinov22"}}, "unknown model_type 'dinov22'"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DensePredictorConfig(**options)


@pytest.mark.parametrize(
    "options", [{"head_type": 3}, {"losses": {"dice": "1"}}, {"ignore_index": 0.5}, {"max_depth": "80"}]
)
def test_wrong_types_are_refused(options):
    with pytest.raises(StrictDataclassFieldValidationError):
        DensePredictorConfig(**options)
