"""What a host family tells about itself: the facts of its config and where its parameters go."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig

# Parameters that no encoder needs, with what the report says about them.
DROPPED = (
    (r"(cls_|distillation_)?classifier\.|head(_dist)?\.|.*\.head\.", "the classifier is not part of the new model"),
    (r"(vit\.|deit\.)?pooler\.", "the pooler is not part of the new model"),
    (r"decoder\.", "decoder of a pretraining task"),
    (r"lm_head\.|layernorm\.", "head of a pretraining task"),
    (r"fpn|decode_head|auxiliary_head", "dense head of the host"),
    (r"text_model\.|text_projection|visual_projection|logit_scale", "text side or joint space of the host"),
)


@dataclass(frozen=True)
class Place:
    """Where a host tensor lives in the specialised ViT.

    names: our parameters; several = the host holds their concatenation along its first axis (a fused qkv), none = it
        has no place.
    slot: index along the second axis of our parameter, when ours holds several host tensors (two class tokens).
    """

    names: tuple[str, ...]
    slot: int | None = None


@dataclass(frozen=True)
class HostFamily:
    """Translation of one host family; the rest of the conversion is the same for all.

    options: host model -> `SpecializedViTConfig` options; raises for variants that cannot be specialised.
    renames: regular expressions applied in order to the host's names. In the result `{a,b}` means "the concatenation of
        a and b", and `name[k]` "the k-th token of our parameter".
    prefixes: under which heads keep the base model; what stands outside of them is a head.
    base_class: name of the host's base model class in transformers.
    classifiers: its classification class for each `classifier_input`.
    backbones: its backbone classes.
    base_arguments: constructor arguments of the base class beside the config.
    """

    options: Callable[[PreTrainedModel], dict]
    renames: tuple[tuple[str, str], ...]
    prefixes: tuple[str, ...]
    base_class: str
    classifiers: dict[str, str] = field(default_factory=dict)
    backbones: tuple[str, ...] = ()
    base_arguments: Callable[[SpecializedViTConfig], dict] = lambda config: {}

    @property
    def class_names(self) -> set[str]:
        """Host classes whose every encoder weight is understood."""
        return {self.base_class, *self.classifiers.values(), *self.backbones}

    def translate(self, name: str, host_names: Iterable[str]) -> Place:
        """Place of one of the host's parameters in our base model or its `classifier`, whether or not ours has it."""
        inside = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        if inside:
            name = name.removeprefix(inside[0])
        elif any(other.startswith(self.prefixes) for other in host_names):
            module, _, leaf = name.rpartition(".")
            return Place((f"{HEADS[module]}.{leaf}",) if module in HEADS else ())
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        slot = re.fullmatch(r"(.+)\[(\d+)\]", name)
        if slot:
            return Place((slot[1],), int(slot[2]))
        braces = re.search(r"\{(.+)\}", name)
        if braces:
            return Place(tuple(name.replace(braces[0], part) for part in braces[1].split(",")))
        return Place((name,))


# Heads outside of the host's base model -> ours.
HEADS = {
    "classifier": "classifier",
    "cls_classifier": "classifier",
    "distillation_classifier": "classifier_distilled",
}


def dropped_reason(name: str) -> str | None:
    """Why a host parameter is left out, or None if nobody expected that."""
    return next((reason for pattern, reason in DROPPED if re.match(pattern, name)), None)


def gather(places: dict[str, Place], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Host tensors -> ours, by name; shapes are still the host's where only the number of axes differs."""
    found, slots = {}, {}
    for name, place in places.items():
        if not place.names:
            continue
        if place.slot is not None:
            slots.setdefault(place.names[0], {})[place.slot] = tensors[name]
        else:
            found.update(zip(place.names, tensors[name].chunk(len(place.names), dim=0), strict=True))
    for name, parts in slots.items():
        found[name] = torch.cat([parts[slot] for slot in sorted(parts)], dim=1)
    return found


def scatter(place: Place, tensors: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Ours -> the host tensor of `shape` at `place`."""
    if place.slot is not None:
        return tensors[place.names[0]][:, place.slot].reshape(shape)
    return torch.cat([tensors[name] for name in place.names], dim=0).reshape(shape)


def take(config: PreTrainedConfig, *names: str) -> dict:
    """The named facts of a host config, which ours calls alike."""
    return {name: getattr(config, name) for name in names}


# Facts that most hosts name as we do.
SHAPE_FACTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "initializer_range",
    "image_size",
    "patch_size",
    "num_channels",
)
DROPOUT_FACTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def qkv_biases(config: PreTrainedConfig) -> dict:
    """The host's one switch for the biases of q, k and v as our three."""
    return dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)


def has_parameter(model: PreTrainedModel, ending: str) -> bool:
    """Whether the host owns a parameter whose name ends so."""
    return any(name.endswith(ending) for name, _ in model.named_parameters())
