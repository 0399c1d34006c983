"""Checks that hold for every vitweave model, to be called from that model's tests."""

import torch
from torch import nn
from transformers import PreTrainedModel


def check_saved_and_loaded_equal(model: PreTrainedModel, folder):
    """Weights, persistent and non-persistent buffers come back bit-equal; returns the loaded model."""
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    check_equal_state(loaded, model)
    return loaded


def check_equal_state(one: nn.Module, other: nn.Module):
    """All parameters and all buffers, also those that no file holds, are bit-equal."""
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert left.keys() == right.keys()
        unequal = [name for name in left if not torch.equal(left[name].cpu(), right[name].cpu())]
        assert not unequal, unequal


def check_split_hints_arrive(model: PreTrainedModel):
    """What sub-models say about splitting and tied weights is known at the root."""
    for name, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and name:
            assert set(part._no_split_modules or []) <= set(model._no_split_modules), name
            assert {f"{name}.{key}" for key in part.all_tied_weights_keys} <= set(model.all_tied_weights_keys), name
