"""How far the class path of a specialised model has moved away from its patch path."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ParameterDrift:
    """The distance of one parameter from its twin."""

    name: str  # of the patch parameter, e.g. "encoder.layer.0.norm1.weight"
    block: int | None  # None outside the blocks (final norm)
    absolute: float  # |theta_cls - theta_patch|
    relative: float  # the same over |theta_patch|; infinite where only theta_patch is zero


def specialization_drift(model: nn.Module) -> list[ParameterDrift]:
    """|theta_cls - theta_patch| / |theta_patch| for every parameter with a twin; an empty list for a vanilla model.

    Built-in low rank (`cls_rank`) counts as the weight it adds, scale * up @ down.
    """
    parameters = dict(model.named_parameters())
    adapters = [name for name in parameters if ".lora_" in name or ".modules_to_save." in name]
    if adapters:
        raise ValueError(
            f"the model carries PEFT adapters (e.g. {adapters[0]}); call merge_and_unload() before measuring"
        )
    drifts = []
    for name, parameter in parameters.items():
        *path, layer, leaf = ["", *name.split(".")]
        parent = ".".join([*path[1:], ""])  # "encoder.layer.0.attention."
        patch_name = f"{parent}{layer.removesuffix('_up').removesuffix('_cls')}.{leaf}"
        if patch_name not in parameters:
            continue
        patch = parameters[patch_name]
        if layer.endswith("_cls"):
            drifts.append(_drift(patch_name, patch, parameter - patch))
        elif layer.endswith("_cls_up"):
            own_down = f"{parent}{layer.removesuffix('_up')}_down.{leaf}"
            down = parameters[own_down if own_down in parameters else f"{parent}qkv_cls_down.{leaf}"]
            scale = model.get_submodule(parent.removesuffix(".")).cls_scale
            drifts.append(_drift(patch_name, patch, scale * (parameter @ down)))
    return drifts


def _drift(name: str, patch: Tensor, difference: Tensor) -> ParameterDrift:
    block = re.search(r"\.(\d+)\.", name)
    absolute = float(torch.linalg.vector_norm(difference.detach().double()))
    size = float(torch.linalg.vector_norm(patch.detach().double()))
    relative = 0.0 if absolute == 0 else absolute / size if size else float("inf")
    return ParameterDrift(name, int(block.group(1)) if block else None, absolute, relative)
