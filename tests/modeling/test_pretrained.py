"""The safe base class over a composite of native ViT, DINOv2, Swin and SegFormer encoders."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_checks import check_equal_state, check_saved_and_loaded_equal, check_split_hints_arrive
from safetensors.torch import load_file, save_file
from torch import nn
from toy_composite import ENCODERS, ToyConfig, ToyForImageClassification, ToyModel, ToyPreTrainedModel, toy_config
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    Trainer,
    TrainingArguments,
)
from transformers import initialization as init

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EXCHANGED = sorted((Path(__file__).parents[1] / "fixtures" / "exchange").iterdir())


def toy_head(seed: int = 0, **options) -> ToyForImageClassification:
    torch.manual_seed(seed)
    return ToyForImageClassification(toy_config(**options)).eval()


def images(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2} for i in range(count)]


def trainer_for(model: nn.Module, folder: Path, **options) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    data = images(8)
    return Trainer(model, TrainingArguments(**arguments | options), train_dataset=data, eval_dataset=data[:2])


# Names in files and in memory -----------------------------------------------------------------------------------------


def test_saved_and_loaded_bit_equal(tmp_path):
    check_saved_and_loaded_equal(toy_head(), tmp_path)


def test_load_state_dict_understands_the_names_of_files_and_of_memory(tmp_path):
    model = toy_head()
    model.save_pretrained(tmp_path)
    in_file = load_file(tmp_path / "model.safetensors")
    assert in_file.keys() != model.state_dict().keys(), "native encoders are no longer renamed"
    for tensors in (in_file, model.state_dict()):
        for strict in (True, False):
            restored = toy_head(seed=1)
            result = restored.load_state_dict(tensors, strict=strict)
            assert not result.missing_keys and not result.unexpected_keys
            check_equal_state(restored, model)


def test_names_are_translated_inside_any_module(tmp_path):
    model = toy_head()
    model.save_pretrained(tmp_path)
    around = nn.ModuleDict({"module": toy_head(seed=1)})  # as in a data-parallel wrapper or a native host
    in_file = {f"module.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    around.load_state_dict(in_file)
    check_equal_state(around["module"], model)


def test_shards_are_translated_one_by_one(tmp_path):
    from transformers.trainer_utils import load_sharded_checkpoint

    model = toy_head()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    restored = toy_head(seed=1)
    load_sharded_checkpoint(restored, str(tmp_path), strict=False)
    check_equal_state(restored, model)


def test_fused_tensors_are_split(tmp_path):
    """RADIO's files hold one qkv tensor per block, its model three."""
    from transformers import RadioConfig

    class AroundRadio(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
            self.radio = AutoModel.from_config(RadioConfig(**sizes))
            self.post_init()

    torch.manual_seed(0)
    model, restored = AroundRadio(ToyConfig()), AroundRadio(ToyConfig())
    model.save_pretrained(tmp_path)
    in_file = load_file(tmp_path / "model.safetensors")
    assert any("qkv" in name for name in in_file)
    restored.load_state_dict(in_file)
    check_equal_state(restored, model)


def test_unknown_names_of_a_native_encoder_are_refused():
    model = toy_head()
    known, unknown = "segformer_encoder.", "segformer_encoder.mystery."
    tensors = {name.replace(known, unknown): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"segformer_encoder in an unknown way: .*mystery"):
        model.load_state_dict(tensors, strict=False)


def test_strict_false_still_allows_parts():
    model, base = toy_head(), ToyModel(toy_config())
    result = model.toy.load_state_dict(base.state_dict())
    assert not result.missing_keys
    part = {name: tensor for name, tensor in model.state_dict().items() if "swin" in name}
    result = model.load_state_dict(part, strict=False)
    assert "classifier.weight" in result.missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(part)


@pytest.mark.parametrize("folder", EXCHANGED, ids=lambda folder: folder.name)
def test_checkpoints_of_other_versions(folder, tmp_path):
    """Both fixtures were written by `tests/fixtures/write_exchange.py`, one under 5.13 and one under 5.23."""
    model, info = ToyForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(model(expected["pixel_values"]).logits, expected["logits"], atol=1e-5, rtol=1e-5)
    resumed = toy_head(seed=1, num_labels=3)
    resumed.load_state_dict(load_file(folder / "model.safetensors"))
    check_equal_state(resumed, model)
    model.save_pretrained(tmp_path)
    was, now = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)


def test_files_have_the_same_names_however_the_model_was_loaded(tmp_path):
    model = toy_head()
    model.save_pretrained(tmp_path / "live", save_original_format=False)
    model.save_pretrained(tmp_path / "release")
    loaded = ToyForImageClassification.from_pretrained(tmp_path / "live")
    check_equal_state(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    release, again = (load_file(tmp_path / name / "model.safetensors") for name in ("release", "again"))
    assert release.keys() == again.keys()


# Trainer and PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["50GB", "40KB"])
def test_trainer_resumes_bit_equal(tmp_path, shard_size):
    model = toy_head()
    model.save_pretrained = partial(model.save_pretrained, max_shard_size=shard_size)
    trainer_for(model, tmp_path).train()
    resumed = toy_head(seed=1)
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_equal_state(resumed, model)


def test_trainer_loads_the_best_model(tmp_path):
    model = toy_head()
    trainer = trainer_for(
        model,
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first checkpoint is the worst, so the last state must not survive
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    check_equal_state(model, ToyForImageClassification.from_pretrained(best))


def test_lora_trains_resumes_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted():
        torch.manual_seed(2)
        return get_peft_model(toy_head(), LoraConfig(target_modules=["mix", "fc1"], modules_to_save=["classifier"]))

    model = adapted()
    trainer_for(model, tmp_path / "run").train()
    resumed = adapted()
    trainer_for(resumed, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    check_equal_state(resumed, model)

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(toy_head(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(PIXELS).logits, model(PIXELS).logits, atol=0, rtol=0)
    expected = model(PIXELS).logits
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = ToyForImageClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(PIXELS).logits, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_folder_opens_by_the_auto_class(tmp_path):
    from peft import LoraConfig

    toy_head().save_pretrained(tmp_path / "base")
    model = ToyForImageClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["mix"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(PIXELS).logits, model(PIXELS).logits)


# from_pretrained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
def test_auto_class_device_map_and_dtype(tmp_path, options):
    model = toy_head()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **options)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    check_equal_state(loaded, model.to(options.get("dtype", torch.float32)))


def test_base_to_head_and_head_to_base(tmp_path):
    torch.manual_seed(0)
    base = ToyModel(toy_config())
    base.save_pretrained(tmp_path / "base")
    head, info = ToyForImageClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    check_equal_state(head.toy, base)
    head.save_pretrained(tmp_path / "head")
    check_equal_state(AutoModel.from_pretrained(tmp_path / "head"), base)


def test_another_number_of_labels(tmp_path):
    model = toy_head()
    model.save_pretrained(tmp_path)
    other = ToyForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert other(PIXELS).logits.shape == (2, 5)
    check_equal_state(other.toy, model.toy)


def test_missing_base_weights_are_refused(tmp_path):
    toy_head().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "swin" in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing and would be random: toy.swin_encoder"):
        ToyForImageClassification.from_pretrained(tmp_path)
    _, info = ToyForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    Dinov2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'toy_composite', got 'dinov2' in .*use ToyModel.from_parts\('"):
        ToyModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'toy_composite', got 'dinov2'"):
        ToyModel.from_pretrained(tmp_path, config=toy_config())


def test_a_pickle_is_refused(tmp_path):
    model = toy_head()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"expected model.safetensors in .*, got pytorch_model.bin, a pickle.*save"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="opens safetensors only"):
        ToyForImageClassification.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("kept", [0, 4, 5000])
def test_truncated_weights_are_refused_by_name(tmp_path, kept):
    toy_head().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"damaged file: .*model.safetensors \({kept} bytes\).*again"):
        ToyForImageClassification.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    toy_head().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        ToyForImageClassification.from_pretrained(tmp_path)


def test_code_named_by_a_config_is_not_run(tmp_path):
    model = toy_head()
    model.save_pretrained(tmp_path)
    witness = tmp_path / "was_run"
    (tmp_path / "foreign.py").write_text(f"open({str(witness)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    foreign = {"AutoConfig": "foreign.Config", "AutoModel": "foreign.Model"}
    config["auto_map"] = foreign | {"AutoModelForImageClassification": "foreign.Model"}
    for name in ENCODERS:
        config[name]["auto_map"] = foreign
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_equal_state(ToyForImageClassification.from_pretrained(tmp_path), model)
    check_equal_state(AutoModelForImageClassification.from_pretrained(tmp_path), model)
    assert not witness.exists()


# Buffers, losses, sub-models ------------------------------------------------------------------------------------------


def test_non_persistent_buffers_come_back(tmp_path):
    toy_head().save_pretrained(tmp_path)
    loaded = ToyForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.toy.ramp.factors, 1 / torch.arange(1, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_forgotten_buffer_is_an_error(tmp_path, dtype):
    class Forgetful(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.mix = nn.Linear(2, 2)
            self.register_buffer("offsets", torch.ones(3, dtype=dtype), persistent=False)
            self.post_init()

    Forgetful(ToyConfig()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"left the non-persistent buffers \['offsets'\] without values"):
        Forgetful.from_pretrained(tmp_path)


def test_no_loss_is_guessed():
    model = toy_head()
    assert model.accepts_loss_kwargs is False
    with pytest.raises(NotImplementedError, match="computes its loss itself"):
        _ = model.loss_function
    model.loss_type = "ForImageClassification"
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    expected = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(model.loss_function(labels=labels, pooled_logits=logits, config=model.config), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_trainer_does_not_scale_a_mean_loss(tmp_path, steps):
    """Accumulating over two half batches gives the update of the whole batch."""
    model = toy_head(drop_path_rate=0.0)
    batch = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "save_strategy": "no"}
    trainer = trainer_for(model, tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **batch)
    trainer.train_dataset = data = images(4)
    reference = toy_head(drop_path_rate=0.0)
    pixel_values = torch.stack([sample["pixel_values"] for sample in data])
    reference(pixel_values, labels=torch.tensor([sample["labels"] for sample in data])).loss.backward()
    trainer.train()
    moved = toy_head().classifier.weight - model.classifier.weight
    torch.testing.assert_close(moved, reference.classifier.weight.grad, atol=1e-5, rtol=1e-4)


def test_sub_models_are_attributes():
    class InList(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.encoders = nn.ModuleList([AutoModel.from_config(config.vit)])
            self.post_init()

    with pytest.raises(TypeError, match=r"InList.encoders holds models in a ModuleList.*encoder_0"):
        InList(toy_config())

    class AlikeName(ToyPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.toy_0 = AutoModel.from_config(config.vit)
            self.post_init()

    with pytest.raises(TypeError, match=r"AlikeName.toy_0 begins with its base_model_prefix 'toy'"):
        AlikeName(toy_config())
    check_split_hints_arrive(toy_head())


# Saving ---------------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    model = toy_head()
    model.save_pretrained(tmp_path / "old", max_shard_size="40KB")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    written = []

    def fails_at_the_second_file(tensors, filename, metadata=None):
        written.append(filename)
        if len(written) == 2:
            raise OSError("No space left on device")
        save_file(tensors, filename, metadata=metadata)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails_at_the_second_file)
    for folder in ("old", "new/deep"):
        written.clear()
        with pytest.raises(OSError, match="No space left"):
            toy_head(seed=1, num_labels=3).save_pretrained(tmp_path / folder, max_shard_size="40KB")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new" / "deep").exists()


def test_saving_again_replaces_all_weight_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for seed, shard_size in enumerate(["50GB", "20KB", "40KB", "50GB"]):
        model = toy_head(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=shard_size)
        check_equal_state(ToyForImageClassification.from_pretrained(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    toy_head().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.fp16.safetensors").exists()
    check_equal_state(ToyForImageClassification.from_pretrained(tmp_path, variant="fp16"), toy_head())


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="got the file"):
        toy_head().save_pretrained(tmp_path / "taken")


def test_push_to_hub_uploads_the_whole_checkpoint(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        uploaded[repo_id] = sorted(
            path.name for path in Path(working_dir).iterdir() if path.name not in files_timestamps
        )

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            asked.append(repo_id)
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

    asked = []
    monkeypatch.setattr(ToyForImageClassification, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# Toy"))
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *args, **kwargs: card)
    toy_head().save_pretrained(tmp_path / "toy", push_to_hub=True)
    assert asked == ["toy"]
    assert uploaded == {"someone/toy": ["README.md", "config.json", "model.safetensors"]}


def test_modeling_files_keep_their_annotations():
    """Postponed annotations switch off the config checks of transformers (and its search for the config class)."""
    package = Path(__file__).parents[2] / "vitweave"
    files = [path for part in ("configuration", "modeling") for path in (package / part).rglob("*.py")]
    assert len(files) > 5
    assert not [path.name for path in files if "\nfrom __future__ import annotations" in path.read_text()]


def test_postponed_annotations_are_refused(tmp_path):
    with pytest.raises(TypeError, match="from __future__ import annotations"):
        type("Postponed", (ToyPreTrainedModel,), {"config_class": "ToyConfig"})


class Opening(nn.Module):
    """Has no tensor of its own, and starts its child at one."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.set_start_values()

    def set_start_values(self):
        init.ones_(self.linear.weight)


class WithOpening(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.opening, self.later = Opening(), Opening()
        self.post_init()


def test_modules_without_tensors_set_the_start_values_of_their_children(tmp_path):
    model = WithOpening(ToyConfig())
    assert model.opening.linear.weight.eq(1).all()
    nn.init.normal_(model.opening.linear.weight)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "later" not in name}, tmp_path / "model.safetensors")
    loaded, info = WithOpening.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and loaded.later.linear.weight.eq(1).all()
    assert torch.equal(loaded.opening.linear.weight, model.opening.linear.weight)
