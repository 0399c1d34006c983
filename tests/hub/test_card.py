"""A card says what the model is, and only numbers that can be measured again."""

import pytest
from huggingface_hub import ModelCard
from transformers import SegformerConfig

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.card import CardInfo, CardMetric, architecture_facts, config_facts, model_card
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification

COMMAND = "python examples/train.py --eval | tee log"


def tiny(**options):
    config = SpecializedViTConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=4, image_size=28, **options)
    return SpecializedViTForImageClassification(config)


def info():
    metric = CardMetric("accuracy", 0.87654321, COMMAND, dataset="someone/cells", name="top-1", split="test")
    return CardInfo(
        model_name="ViT for cells",
        license="apache-2.0",
        base_model="facebook/dinov2-small",
        datasets=["someone/cells"],
        training_command="python examples/train.py",
        metrics=[metric],
        limitations="One microscope.",
    )


def card(tmp_path, info):
    model_card(tiny(), "AutoModelForImageClassification", info, "someone/vit-cells", True).save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_the_metadata_come_back_from_the_file(tmp_path):
    data = card(tmp_path, info()).data
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_name) == ("accuracy", 0.87654321, "top-1")
    assert (result.dataset_type, result.dataset_split, result.task_type) == (
        "someone/cells",
        "test",
        "image-classification",
    )
    assert data.model_name == "ViT for cells"
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == "image-classification"
    assert data.base_model == "facebook/dinov2-small"
    assert data.tags == ["vitweave", "specialized_vit"]
    assert (data.datasets, data.metrics) == (["someone/cells"], ["accuracy"])


def test_every_number_stands_beside_the_command_that_recomputes_it(tmp_path):
    (row,) = (line for line in card(tmp_path, info()).text.splitlines() if line.startswith("| top-1"))
    assert row == r"| top-1 | someone/cells | test | 0.8765 | `python examples/train.py --eval \| tee log` |"
    with pytest.raises(ValueError, match="needs the command"):
        CardMetric("accuracy", 0.9, " ", dataset="cells")


def test_what_was_not_done_is_said(tmp_path):
    empty = card(tmp_path, CardInfo())
    assert "Not evaluated." in empty.text
    assert "Data sets: not stated." in empty.text
    assert "The licence of the weights is not stated." in empty.text
    assert empty.data.eval_results is None
    assert empty.data.license is None


def test_the_loading_lines_run(tmp_path):
    text = card(tmp_path, info()).text
    lines = text.partition("```python\n")[2].partition("```")[0].splitlines()
    assert lines == [
        "from transformers import AutoImageProcessor, AutoModelForImageClassification",
        'processor = AutoImageProcessor.from_pretrained("someone/vit-cells", trust_remote_code=True)',
        'model = AutoModelForImageClassification.from_pretrained("someone/vit-cells", trust_remote_code=True)',
    ]


def test_the_specialised_blocks_and_the_added_parameters_are_listed():
    model = tiny(qkv_blocks=[0, 1, 4], norm_blocks="none", specialize_layer_scale=False, mlp_blocks=[5], num_labels=7)
    facts = dict(architecture_facts(model))
    assert facts["q/k/v owned by [CLS]"] == "blocks 0-1, 4 (3 of 6)"
    assert facts["MLP owned by [CLS]"] == "blocks 5 (1 of 6)"
    assert "norms owned by [CLS]" not in facts
    assert facts["labels"] == "7"
    total = sum(parameter.numel() for parameter in model.parameters())
    own = 3 * 3 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32
    assert facts["parameters"] == f"{total:,}"
    assert facts["of these added for [CLS]"].startswith(f"{own:,} ")


def test_an_unspecialised_model_adds_nothing():
    facts = dict(architecture_facts(tiny(norm_blocks="none", qkv_blocks="none")))
    assert not [name for name in facts if "CLS" in name]


def test_card_facts_are_kept_beside_the_model(tmp_path):
    info().save(tmp_path)
    assert CardInfo.load(tmp_path) == info()
    assert CardInfo.load(tmp_path / "vitweave_card.json") == info()
    (tmp_path / "vitweave_card.json").unlink()
    assert CardInfo.load(tmp_path) == CardInfo()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"licence": "mit"}', r"unknown keys \['licence'\]"),
        ('{"metrics": [{"type": "accuracy", "value": 1}]}', r"metric: .* missing \['command', 'dataset'\]"),
        ('{"metrics": [0.5]}', "expected a mapping, got float"),
        ("[1]", "expected a mapping, got list"),
        ("{", "is not JSON"),
    ],
)
def test_a_bad_card_file_is_refused(tmp_path, text, reason):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        CardInfo.load(tmp_path / "card.json")


def test_a_tower_names_its_encoders():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    encoders = [SpecializedViTConfig(**small), {"model_type": "mobilenet_v2", "image_size": 64}]
    config = MultiEncoderConfig(encoder_configs=encoders, image_size=32, fusion_type="add")
    facts = dict(config_facts(config))
    assert facts["fusion type"] == "add" and facts["encoder 0: hidden size"] == "32"
    assert facts["encoder 1: type"] == "`mobilenet_v2`" and facts["encoder 1: image size"] == "64"


def test_a_model_of_several_sensors_tells_its_streams():
    sizes = {"num_encoder_blocks": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2]}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [4, 2], "mlp_ratios": [2, 2]}
    stream = SegformerConfig(**sizes)
    facts = dict(config_facts(ModalityFusionConfig(modalities=["rgb", "depth"], stream_config=stream)))
    assert facts["modalities"] == "['rgb', 'depth']" and facts["fusion type"] == "gemini"
    assert facts["stream: type"] == "`segformer`" and facts["stream: hidden sizes"] == "[16, 32]"
