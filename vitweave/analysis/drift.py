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
        *path, leaf = name.split(".")
        twin = path[-1] if path else ""
        if twin.endswith("_cls"):
            patch_name = ".".join([*path[:-1], twin.removesuffix("_cls"), leaf])
            drifts.append(_drift(patch_name, parameters[patch_name], parameter - parameters[patch_name]))
        elif twin.endswith("_cls_down"):
            up = parameters[".".join([*path[:-1], twin.removesuffix("_down") + "_up", leaf])]
            patch_name = ".".join([*path[:-1], twin.removesuffix("_cls_down"), leaf])
            drifts.append(_drift(patch_name, parameters[patch_name], _low_rank_scale(model) * (up @ parameter)))
    return drifts


def _low_rank_scale(model: nn.Module) -> float:
    rank, alpha = model.config.cls_rank, model.config.cls_alpha
    return 1.0 if alpha is None else alpha / rank


def _drift(name: str, patch: Tensor, difference: Tensor) -> ParameterDrift:
    block = re.search(r"\.(\d+)\.", name)
    absolute = float(torch.linalg.vector_norm(difference.detach().double()))
    size = float(torch.linalg.vector_norm(patch.detach().double()))
    relative = 0.0 if absolute == 0 else absolute / size if size else float("inf")
    return ParameterDrift(name, int(block.group(1)) if block else None, absolute, relative)
