"""Damaged and hostile weights end in an error that names the file, within 1 s and 200 MiB, or load as they are."""

import json
import time
from pathlib import Path

import pytest
import torch
from hostile_weights import ACCEPTED, REFUSED
from memory_use import reset_peak, resident
from transformers import AutoModelForImageClassification

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.conversion.stored_tensors import StoredTensors
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification

PLAIN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    SpecializedViTForImageClassification(SpecializedViTConfig(**PLAIN)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("trick", REFUSED)
def test_hostile_weights_are_refused(folder, trick):
    REFUSED[trick](folder)
    reset_peak()
    before, start = resident("VmRSS"), time.process_time()
    with pytest.raises((ValueError, OSError), match=r"expected .*(got |missing)|No such file") as refused:
        SpecializedViTForImageClassification.from_pretrained(folder)
    seconds, grown = time.process_time() - start, resident("VmHWM") - before
    assert seconds < 1 and grown < 200
    assert not isinstance(refused.value, json.JSONDecodeError | UnicodeDecodeError)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("trick", [name for name in REFUSED if name != "other names"])
def test_conversion_refuses_them_too(folder, trick):
    REFUSED[trick](folder)
    with pytest.raises((ValueError, OSError)) as refused:
        list(StoredTensors(folder).read())
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("trick", ACCEPTED)
def test_odd_weights_load(folder, trick):
    ACCEPTED[trick](folder)
    model = SpecializedViTForImageClassification.from_pretrained(folder)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_pickle_named_by_the_index_is_not_opened(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    REFUSED["shard is a pickle"](folder)
    with pytest.raises(ValueError, match=r"name safetensors beside it, got 'pytorch_model.bin'"):
        AutoModelForImageClassification.from_pretrained(folder)


def test_a_config_nested_too_deep_is_told(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        SpecializedViTForImageClassification.from_pretrained(folder)
