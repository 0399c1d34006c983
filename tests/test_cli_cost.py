"""`vitweave cost`: the figures against real models, what cannot be counted, and what it says about bad input."""

import json

import pytest
import torch
from tiny_vlm import tiny_tower, tiny_vlm_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, TimmWrapperConfig
from transformers.utils import is_timm_available

from vitweave.analysis.cost import cost_table, measure, model_cost
from vitweave.cli import main
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.multi_encoder_presets import PRESETS, multi_encoder_preset
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration

FAST, SLOW = ("llava-hr", "mgm-hd"), pytest.mark.slow


def by_kind(rows):
    return {row.part.split(" (")[0]: row for row in rows}


def count(model, **inputs):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=SLOW) for name in sorted(PRESETS)])
def test_tiny_presets_cost_what_their_models_do(name):
    config = multi_encoder_preset(name, tiny=True)
    rows = model_cost(config, dtype="float32")
    model = MultiEncoderModel(config).eval()
    assert sum(row.parameters for row in rows) == sum(weight.numel() for weight in model.parameters())
    assert sum(row.weight_bytes for row in rows) == 4 * sum(row.parameters for row in rows)
    assert rows[-1].tokens == config.num_tokens and all(row.activation_bytes >= 0 for row in rows)
    trained = {row.part.split(" (")[0] for row in rows if row.trained and row.parameters}
    frozen = {f"encoder {index}" for index, options in enumerate(config.options) if options.frozen}
    assert not trained & frozen and all(by_kind(rows)[part].activation_bytes == 0 for part in frozen)


def test_flops_and_tokens_of_a_vision_language_model():
    config = tiny_vlm_config()
    rows = by_kind(model_cost(config, tiles=2, text_tokens=7, dtype="float32"))
    model = MultiEncoderVlmForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((1, 32), 4), torch.full((1, 7), 8)], dim=1)
    images = {"pixel_values": torch.zeros(2, 3, 32, 32), "num_tiles": torch.tensor([2])}
    model.set_attn_implementation("eager")
    assert sum(row.flops for row in rows.values()) == count(model, input_ids=ids, **images)
    assert sum(row.parameters for row in rows.values()) == sum(weight.numel() for weight in model.parameters())
    assert (rows["projector"].tokens, rows["language model"].tokens) == (32, 39)
    assert rows["encoder 0"].flops == count(model.model.vision_tower.encoder_0, pixel_values=images["pixel_values"])


def test_what_autograd_keeps():
    kept = by_kind(model_cost(tiny_vlm_config(), dtype="float32"))
    small = by_kind(model_cost(tiny_vlm_config(), dtype="bfloat16"))
    assert 0.45 < small["language model"].activation_bytes / kept["language model"].activation_bytes < 0.7
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 2))
    found = measure(lambda: model(torch.zeros(5, 4)), list(model.parameters()))
    assert found.kept == 4 * (5 * 4 + 5 * 8) and found.flops == 2 * 5 * (4 * 8 + 8 * 2)  # sigmoid and linear share one
    frozen = by_kind(model_cost(tiny_vlm_config(freeze_vision_encoders=True, freeze_language_model=True)))
    assert frozen["encoder 0"].activation_bytes == frozen["encoder 1"].activation_bytes == 0
    assert frozen["language model"].activation_bytes > 0 and not frozen["language model"].trained  # on the way back


def test_other_image_sizes_are_counted():
    config = tiny_tower()
    small, large = (by_kind(model_cost(config, size)) for size in (32, (64, 32)))
    assert large["fusion"].tokens == 2 * small["fusion"].tokens
    assert large["encoder 0"].flops > 1.9 * small["encoder 0"].flops


@pytest.mark.slow
def test_a_full_size_tower_allocates_nothing():
    rows = by_kind(model_cost(multi_encoder_preset("internvl")))
    assert rows["encoder 0"].parameters > 3e8 and rows["encoder 0"].flops > 5e11
    assert rows["fusion"].tokens == 256


@pytest.mark.skipif(is_timm_available(), reason="timm is there")
def test_without_timm_the_part_is_named_and_the_rest_counted():
    timm = TimmWrapperConfig(architecture="resnet18")
    base = tiny_tower()
    config = MultiEncoderConfig(
        encoder_configs=[base.encoder_configs[0], timm],
        encoder_options=[{}, {"channels": 512, "stride": 8}],
        image_size=32,
    )
    rows = by_kind(model_cost(config))
    assert rows["encoder 1"].parameters is None and "timm" in rows["encoder 1"].note
    assert rows["encoder 0"].flops and rows["fusion"].tokens == 16
    table = cost_table([*rows.values()])
    assert "encoder 1 (resnet18)" in table and "without the parts that could not be counted" in table


def test_the_command_reads_presets_folders_and_a_language_model(tmp_path, capsys):
    assert main(["cost", "leo", "--tiny", "--json", str(tmp_path / "cost.json")]) == 0
    out = capsys.readouterr().out
    assert "encoder 1 (sam_vision_model)" in out and "fusion (sequence_concat)" in out
    assert len(json.loads((tmp_path / "cost.json").read_text())) == 3
    tiny_tower().save_pretrained(tmp_path / "tower")
    LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99).save_pretrained(tmp_path)
    command = ["cost", str(tmp_path / "tower" / "config.json"), "--language-model", str(tmp_path), "--image-size", "64"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "projector (mlp2x_gelu)" in out and "language model (llama)" in out
    tiny_tower().encoder_configs[0].save_pretrained(tmp_path / "vit")
    assert main(["cost", str(tmp_path / "vit")]) == 0
    assert "encoder 0 (vit)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model-anywhere/x"], "neither a preset"),
        (["leo", "--tiny", "--image-size", "1", "2", "3"], "side, or height and width"),
        (["leo", "--tiny", "--tiles", "0"], "tiles >= 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["cost", *arguments]) == 2
    assert message in capsys.readouterr().err
