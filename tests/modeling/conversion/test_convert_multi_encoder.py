"""Released multi-encoder checkpoints, generated with their official names, become ours: strictly, whole, reloadable."""

import json
from pathlib import Path

import pytest
import torch
from official_checkpoints import OFFICIAL, TEXT, llava_hr, official_checkpoint, random_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText, LlamaConfig, PreTrainedModel

from vitweave.configuration.multi_encoder_presets import PRESETS, multi_encoder_preset
from vitweave.modeling.conversion.release_registry import RELEASES
from vitweave.modeling.convert_multi_encoder import convert_multi_encoder
from vitweave.modeling.own_models import build_model

# what a release leaves to us: the second half of SAM's neck where it is not read, the norm of ConvNeXt's pooled output
NEW = {
    "eagle-x4": {"encoder_1.model.layernorm"},
    "eagle-x5": {
        "encoder_1.model.layernorm",
        "encoder_2.model.vision_encoder.neck.conv2",
        "encoder_2.model.vision_encoder.neck.layer_norm2",
    },
    "mgm": {"encoder_1.model.layernorm"},
    "mgm-hd": {"encoder_1.model.layernorm"},
}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


MORE = [slow(name) for name in ("eagle-x4", "internvl", "mgm-hd")]


def frozen_encoders(preset: str) -> dict[int, PreTrainedModel]:
    """Models with weights of their own, for the release that holds none."""
    torch.manual_seed(5)
    members = multi_encoder_preset(preset, tiny=True).encoder_configs if preset == "cambrian" else []
    return {index: build_model(member) for index, member in enumerate(members)}


def converted(preset: str, state: dict[str, Tensor] | None = None, **options):
    options = {"text_config": TEXT, "encoders": frozen_encoders(preset)} | options
    state = official_checkpoint(preset) if state is None else state
    return convert_multi_encoder(state, preset, multi_encoder_preset(preset, tiny=True), **options)


def image(model: PreTrainedModel, batch: int = 1) -> Tensor:
    config = getattr(model.config, "vision_config", model.config)
    side = config.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def see(model: PreTrainedModel) -> Tensor:
    """Logits of a prompt with an image, or the tokens of a tower."""
    with torch.no_grad():
        if not hasattr(model, "lm_head"):
            return model(image(model)).last_hidden_state
        sizes = torch.tensor([[30, 40]])
        vision = {"pixel_values": image(model), "image_sizes": sizes}
        count = len(model.model.get_image_features(**vision).pooler_output[0])
        ids = torch.tensor([[3, *[0] * count, 7, 9]])
        return model(input_ids=ids, **vision).logits


def test_every_preset_has_a_release():
    assert sorted(RELEASES) == sorted(PRESETS)
    assert set(OFFICIAL) == set(RELEASES) - {"llava-hr-x"}  # that one wants timm: tests/modeling/conversion/test_timm


@pytest.mark.parametrize("preset", ["cambrian", "eagle-x5", "leo", "llava-hr", "mgm", *MORE])
def test_every_tensor_is_accounted_for(preset, tmp_path: Path):
    state = official_checkpoint(preset)
    model, report = converted(preset, state)
    used = set(report.copied.values()) - {"given encoder"}
    assert not used & set(report.dropped)
    assert used | set(report.dropped) == set(state)
    assert {name.rpartition(".")[0].removeprefix("model.vision_tower.") for name in report.new} == NEW.get(
        preset, set()
    )
    assert set(report.copied) | set(report.new) == set(model.state_dict())
    assert all(reason for reason in report.dropped.values())
    assert report.counts["dropped"] == sum(state[name].numel() for name in report.dropped)

    logits = see(model)
    assert logits.isfinite().all() and logits.shape[-1] == TEXT.vocab_size
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(see(again), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["llava-hr", slow("cambrian"), slow("leo")])
def test_a_tower_without_its_language_model(preset, tmp_path: Path):
    whole, _ = converted(preset)
    state = official_checkpoint(preset)
    tower, report = converted(preset, state, tower_only=True, text_config=None)
    assert {"lm_head.weight", "language_model.output.weight"} & set(report.dropped)
    assert set(report.copied.values()) - {"given encoder"} | set(report.dropped) == set(state)
    for name, tensor in whole.model.vision_tower.state_dict().items():
        assert torch.equal(tower.state_dict()[name], tensor)
    tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is type(tower)
    torch.testing.assert_close(see(again), see(tower), atol=1e-5, rtol=1e-5)
    alone = {name: tensor for name, tensor in state.items() if name not in report.dropped}
    torch.testing.assert_close(see(converted(preset, alone, text_config=None)[0]), see(tower), atol=1e-5, rtol=1e-5)


def test_the_connector_takes_encoders_that_are_given():
    encoders = frozen_encoders("cambrian")
    model, report = converted("cambrian", encoders=encoders)
    for index, encoder in encoders.items():
        inside = model.model.vision_tower.encoders[index].model.state_dict()
        assert all(torch.equal(inside[name], tensor) for name, tensor in encoder.state_dict().items())
        assert inside.keys() == encoder.state_dict().keys()
    assert all("layers of the language model" in reason for name, reason in report.dropped.items() if "sampler" in name)
    with pytest.raises(ValueError, match=r"no tensor of encoder 2, a 'dinov2'"):
        converted("cambrian", encoders={k: v for k, v in encoders.items() if k != 2})
    with pytest.raises(ValueError, match=r"holds encoder 0; leave it out"):
        converted("llava-hr", encoders={0: build_model(multi_encoder_preset("llava-hr", tiny=True).encoder_configs[0])})


# Strictness ----------------------------------------------------------------------------------------------------------


def changed(preset: str, name: str, to: str | None = None, shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """An official checkpoint with one tensor called otherwise, taken out, or of another shape."""
    state = official_checkpoint(preset)
    tensor = state.pop(name) if shape is None else torch.zeros(shape)
    if to or shape:
        state[to or name] = tensor
    return state


FAST = "model.vision_tower.fast_vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"
SAM_NECK = "model.vision_tower.vision_towers.2.vision_tower.neck.conv1.weight"


@pytest.mark.parametrize(
    ("preset", "name", "ours"),
    [
        ("llava-hr", FAST, "encoder_0.model.encoder.layers.2.mlp.fc1.weight"),
        slow("llava-hr", "model.vision_tower.align_stages_latent.1.gate.2.bias", "fusion.adapters.1.gate.fc2.bias"),
        ("llava-hr", "model.layers.1.self_attn.o_proj.weight", "language_model.layers.1.self_attn.o_proj.weight"),
        ("mgm", "model.vlm_uni_val_projector.0.bias", "fusion.v_norm.bias"),
        slow("mgm", "model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
        slow("eagle-x5", SAM_NECK, "encoder_2.model.vision_encoder.neck.conv1.weight"),
        (
            "leo",
            "vision_model_1.encoder.layers.3.attn.qkv.bias",
            "encoder_0.model.encoder.layer.3.attention.k_proj.bias",
        ),
        slow("leo", "vision_model_2.neck.conv2.weight", "encoder_1.model.vision_encoder.neck.conv2.weight"),
        slow("leo", "language_model.output.weight", "lm_head.weight"),
        slow("cambrian", "model.image_newline", "model.image_newline.weight"),
        ("cambrian", "model.vision_sampler_0.layers.0.cross_attn.k_proj_3.1.weight", "readers.3.k_proj.weight"),
    ],
)
def test_a_missing_and_a_misspelt_tensor_are_refused_by_name(preset, name, ours):
    misspelt = name[:-1] + "_"
    with pytest.raises(ValueError, match=r"1 tensors of unknown name") as error:
        converted(preset, changed(preset, name, misspelt))
    assert misspelt in str(error.value)
    missing = str(error.value).split("tensors of ours that nothing in it is for")[1]
    assert ours in missing


def test_a_missing_tensor_and_one_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1 tensors of ours that nothing in it is for:\n *\S*fusion\.v_norm\.bias"):
        converted("mgm", changed("mgm", "model.vlm_uni_val_projector.0.bias"))
    with pytest.raises(ValueError, match=rf"1 tensors of another shape:\n *{FAST}: expected \[64, 32\], got \[9, 32\]"):
        converted("llava-hr", changed("llava-hr", FAST, shape=(9, 32)))
    qkv = "vision_model_1.encoder.layers.3.attn.qkv.bias"
    with pytest.raises(ValueError, match=rf"3 tensors of another shape:\n *{qkv}: expected \[32\], got \[40\]"):
        converted("leo", changed("leo", qkv, shape=(120,)))
    with pytest.raises(ValueError, match=r"8 key-value heads with 1 query heads each divide, got 128"):
        text = LlamaConfig(**{**TEXT.to_diff_dict(), "num_attention_heads": 8, "num_key_value_heads": 8})
        converted("leo", text_config=text)


@pytest.mark.parametrize("name", ["model.vision_towr.x.weight", "model.vlm_uni_query_projector.2.weight", "step"])
@pytest.mark.parametrize("tower_only", [False, True])
def test_an_extra_tensor_is_refused_by_name(name, tower_only):
    state = official_checkpoint("mgm") | {name: torch.zeros(3)}
    with pytest.raises(ValueError, match=r"unknown name") as error:
        converted("mgm", state, tower_only=tower_only, text_config=None if tower_only else TEXT)
    assert name in str(error.value)


def test_a_tensor_under_two_names_is_refused():
    state = official_checkpoint("mgm")
    state["model.vision_tower_aux.vision_stages.0.blocks.0.weight"] = torch.zeros(32)
    with pytest.raises(ValueError, match=r"vision_stages\.0\.blocks\.0\.weight and .*blocks\.0\.gamma are both"):
        converted("mgm", state)


def test_another_preset_is_refused():
    with pytest.raises(ValueError, match=r"no tensor of encoder 0, a 'clip_vision_model'"):
        converted("mgm", official_checkpoint("eagle-x5"))
    with pytest.raises(ValueError, match=r"unknown preset 'llava_hr'; known: .*'llava-hr'"):
        convert_multi_encoder(official_checkpoint("llava-hr"), "llava_hr")


# Details -------------------------------------------------------------------------------------------------------------


def test_both_names_of_the_layer_scale_are_the_same():
    first = official_checkpoint("mgm")
    second = {
        name.replace(".gamma", ".weight") if name.endswith(".gamma") else name: tensor for name, tensor in first.items()
    }
    assert first.keys() != second.keys()
    assert torch.equal(see(converted("mgm", first)[0]), see(converted("mgm", second)[0]))


def test_constants_are_left_out():
    state = official_checkpoint("eagle-x5")
    state["model.vision_tower.vision_towers.0.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[
        None
    ]
    _, report = converted("eagle-x5", state)
    kinds = {name.rpartition(".")[2] for name in report.dropped}
    assert kinds == {"freqs_cos", "freqs_sin", "inv_freq", "position_ids"}


def test_the_first_training_stage_has_no_adapters():
    config = multi_encoder_preset("llava-hr", tiny=True, fusion_options={"adapter_layers": []})
    with_adapters = official_checkpoint("llava-hr")
    model, report = convert_multi_encoder(with_adapters, "llava-hr", config, tower_only=True)
    left_out = {name for name in with_adapters if "align_stages_latent" in name}
    assert {name for name, reason in report.dropped.items() if "adapters" in reason} == left_out
    without = {name: tensor for name, tensor in with_adapters.items() if name not in left_out}
    again, _ = convert_multi_encoder(without, "llava-hr", config, tower_only=True)
    assert torch.equal(see(again), see(model))


def test_the_model_shares_no_memory_with_the_source_and_trains():
    state = official_checkpoint("leo")
    model, _ = converted("leo", state)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    storages = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert not pointers & set(storages) and len(set(storages)) == len(storages)
    assert not model.training
    frozen = {name.split(".")[2] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"encoder_0", "encoder_1"}  # as LEO trains


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_type_is_the_stored_one_unless_asked(dtype):
    state = random_tensors(llava_hr(), torch.bfloat16)
    model, _ = converted("llava-hr", state, dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype or torch.bfloat16}
    assert see(model.float()).isfinite().all()


def test_query_key_and_value_rows_of_intern_lm2():
    state = official_checkpoint("leo")
    model, _ = converted("leo", state)
    heads, kv_heads, size = TEXT.num_attention_heads, TEXT.num_key_value_heads, TEXT.head_dim
    layer = model.model.language_model.layers[1].self_attn
    rows = state["language_model.model.layers.1.attention.wqkv.weight"].split(size)  # blocks of one head each
    group = heads // kv_heads
    query = [rows[k * (group + 2) + q] for k in range(kv_heads) for q in range(group)]
    key, value = ([rows[k * (group + 2) + group + part] for k in range(kv_heads)] for part in (0, 1))
    for found, expected in ((layer.q_proj, query), (layer.k_proj, key), (layer.v_proj, value)):
        assert torch.equal(found.weight, torch.cat(expected))


def test_the_head_may_be_the_embeddings():
    state = official_checkpoint("llava-hr")
    tied = LlamaConfig(**{**TEXT.to_diff_dict(), "tie_word_embeddings": True})
    del state["lm_head.weight"]
    model, report = converted("llava-hr", state, text_config=tied)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"]) and not report.new
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        converted("llava-hr", state)


# Folders -------------------------------------------------------------------------------------------------------------


def write_release(folder: Path, preset: str, facts: dict) -> Path:
    """Two files, their index, and the release's config.json."""
    folder.mkdir()
    state = official_checkpoint(preset)
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: state[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def text_facts(**changes) -> dict:
    fields = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
    )
    return {name: getattr(TEXT, name) for name in fields} | {"vocab_size": 32, "rope_theta": 5e5} | changes


@pytest.mark.parametrize(
    ("preset", "facts"),
    [
        slow("llava-hr", text_facts(model_type="llava_llama", mm_vision_tower="x", torch_dtype="float16")),
        ("leo", {"model_type": "internvl_chat", "llm_config": text_facts(model_type="internlm2", bias=False)}),
    ],
)
def test_a_folder_in_several_files_with_its_config(preset, facts, tmp_path: Path):
    folder = write_release(tmp_path / "release", preset, facts)
    expected, _ = converted(
        preset,
        text_config=LlamaConfig(
            **{**TEXT.to_diff_dict(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
        ),
    )
    model, report = converted(preset, folder, text_config=None)
    assert torch.equal(see(model), see(expected)) and str(folder) in str(report)
    text = model.config.text_config
    assert text.vocab_size == TEXT.vocab_size and text.rms_norm_eps == 1e-5  # the vocabulary is that of the tensors
    assert text.rope_parameters["rope_theta"] == 5e5
    files = sorted(folder.glob("*.safetensors"))
    assert torch.equal(see(converted(preset, files)[0]), see(converted(preset)[0]))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds a language model, .*config\.json .*tower_only=True"):
        converted(preset, folder, text_config=None)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    folder = write_release(tmp_path / "release", "mgm", text_facts())
    first, second = sorted(folder.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"truncated or damaged one: .*{second.name}"):
        converted("mgm", folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names files that are not there: \['{second.name}'\]"):
        converted("mgm", folder)
    with pytest.raises(ValueError, match=r"is in both .* and "):
        converted("mgm", [first, first])
    with pytest.raises(FileNotFoundError, match=r"does not exist; download"):
        converted("mgm", "YanweiLi/MGM-2B")
    with pytest.raises(ValueError, match="got none"):
        converted("mgm", {})


def test_pickles_are_refused_with_advice(tmp_path: Path):
    pickle = tmp_path / "pytorch_model.bin"
    pickle.write_bytes(b"never opened")
    for source in (tmp_path, pickle, [pickle]):
        with pytest.raises(ValueError, match=r"a pickle, .*safetensors\.torch\.save_file"):
            converted("mgm", source)
