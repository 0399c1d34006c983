"""A pretrained vanilla ViT becomes a specialised one with the same outputs, and back.

Every specialised parameter starts as a clone of its patch twin, low-rank updates at zero. Everything happens in memory,
because transformers renames weights on loading and saving.
"""

import difflib
import re
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.conversion.host_family import HostFamily, dropped_reason, gather
from vitweave.modeling.conversion.open_vanilla import LOAD_OPTIONS, open_vanilla
from vitweave.modeling.conversion.registry import find_family, gated_family
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
    SpecializedViTPreTrainedModel,
)

SPECIALIZATION_FLAGS = (
    "specialize_norm",
    "specialize_layer_scale",
    "specialize_final_norm",
    "norm_blocks",
    "qkv_blocks",
    "qkv_parts",
    "proj_blocks",
    "mlp_blocks",
    "register_role",
    "attention_bias",
    "attention_bias_init",
    "cls_rank",
    "cls_alpha",
    "cls_rank_fused",
)
OTHER_FLAGS = (
    *("out_features", "out_indices", "apply_layernorm", "reshape_hidden_states"),
    *("num_labels", "id2label", "label2id", "problem_type", "classifier_input"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "drop_path_decay"),
)
LABEL_FACTS = ("id2label", "label2id", "problem_type")
# The only weights a conversion may leave to chance.
NEW_WEIGHTS = re.compile(r".*_cls_(down|up)\.weight|.*\.bias_[kv]|classifier.*|(.*\.)?layernorm(_cls)?\..*")


@dataclass
class ConversionReport:
    """What became of the host's weights; printed as a table.

    copied, cloned: our parameter -> the host's; cloned ones are the [CLS] twins.
    created: our parameters without a source. dropped: the host's parameter -> the reason.
    """

    source: str
    target: str
    copied: dict[str, str] = field(default_factory=dict)
    cloned: dict[str, str] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # scalars in each group

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}"]
        for group, names in (("copied", self.copied), ("cloned to CLS", self.cloned), ("newly created", self.created)):
            lines.append(f"  {group:14} {len(names):5} tensors {self.counts[group]:>13,} values")
        lines += [f"    {name}" for name in self.created]
        lines.append(f"  {'dropped':14} {len(self.dropped):5} tensors {self.counts['dropped']:>13,} values")
        reasons = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"    {reason}: {names[0]}{', ...' if len(names) > 1 else ''}" for reason, names in reasons.items()]
        return "\n".join(lines)


def specialize(
    model_or_id: PreTrainedModel | str | Path,
    model_class: type[SpecializedViTPreTrainedModel] = SpecializedViTModel,
    **flags,
) -> SpecializedViTPreTrainedModel:
    """Turn a vanilla ViT into a specialised one whose outputs are the same.

    Args:
        model_or_id: a transformers ViT (see `conversion/registry.py` for the families), a folder or a Hub id.
        model_class: SpecializedViTModel, SpecializedViTBackbone or SpecializedViTForImageClassification. A
            vanilla classifier keeps its head; a base model gets a new one with `num_labels`.
        flags: specialisation, backbone, label and dropout options of `SpecializedViTConfig`; with an id also
            `revision`, `dtype` and other options of `from_pretrained`.

    Returns:
        the model with the host's dtype, device, mode and attention implementation, and a `conversion_report`.
    """
    missing, load_options = set(), {key: flags.pop(key) for key in LOAD_OPTIONS if key in flags}
    check_flags(flags)
    host = model_or_id
    if isinstance(host, (str, Path)):
        host, missing = open_vanilla(host, is_classifier(model_class), **load_options)
    elif load_options:
        raise ValueError(f"{sorted(load_options)} only apply to a folder or Hub id, but a model was given")
    if not isinstance(host, PreTrainedModel):
        kind = type(host).__name__
        raise TypeError(
            f"expected a transformers model, a folder or a Hub id, got {kind}; open timm models as TimmWrapperModel"
        )
    if getattr(host, "is_quantized", False):
        raise ValueError("a quantised model cannot be converted; load it without quantisation first")
    host_parameters = {name: tensor for name, tensor in host.named_parameters() if name not in missing}
    find_family(host.config)
    config, family = specialized_config(host, host_parameters, model_class, flags)
    with torch.device("meta"):
        model = model_class(config).to(host.dtype)
    model.to_empty(device=host.device)
    model.name_or_path = host.name_or_path
    model.conversion_report = fill(model, family, host, host_parameters)
    if config.attention_bias:
        warnings.warn(
            "attention_bias adds a key that every query attends to: the outputs differ from the vanilla model until it"
            " has been trained",
            stacklevel=3,
        )
    return model.train(host.training)


def is_classifier(model_class: type) -> bool:
    """Whether the class has a head."""
    return issubclass(model_class, SpecializedViTForImageClassification)


def check_flags(flags: dict):
    """Only what does not follow from the host may be chosen."""
    allowed = (*SPECIALIZATION_FLAGS, *OTHER_FLAGS)
    facts = {item.name for item in fields(SpecializedViTConfig)}
    for name in flags:
        if name in allowed:
            continue
        if name in facts:
            raise ValueError(f"{name} follows from the vanilla model and cannot be chosen; flags are {sorted(allowed)}")
        close = difflib.get_close_matches(name, allowed, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; flags are {sorted(allowed)}"
        raise ValueError(f"unknown flag {name!r}{hint}")


def specialized_config(
    host: PreTrainedModel, parameters: dict[str, Tensor], model_class: type, flags: dict
) -> tuple[SpecializedViTConfig, HostFamily]:
    """The config of the specialised twin of `host`, and the host's family."""
    model_type = host.config.model_type
    facts = find_family(host.config).options(host)
    family = gated_family(model_type, facts.get("use_swiglu_ffn", False))
    for name, ending in (("use_pooler", "pooler.dense.weight"), ("use_mask_token", "embeddings.mask_token")):
        if facts.get(name, False):
            facts[name] = any(parameter.endswith(ending) for parameter in parameters)
    host_input = facts.get("classifier_input", "cls")
    if is_classifier(model_class):
        facts |= {name: getattr(host.config, name, None) for name in LABEL_FACTS}
        if "num_labels" in flags and flags["num_labels"] != host.config.num_labels:
            facts |= dict.fromkeys(LABEL_FACTS)
        if flags.get("classifier_input", host_input) != "pooled":
            facts["use_pooler"] = False
    if issubclass(model_class, SpecializedViTBackbone):
        facts["use_pooler"] = False
        if type(host).__name__ in family.backbones and "out_indices" not in flags:
            facts["out_features"] = host.config.out_features
    if flags.get("attention_bias"):
        facts["attention_bias_init"] = 0.0  # the least disturbance of a pretrained model
    config = SpecializedViTConfig(**{**facts, **flags}, host_config=remember(host))
    config.architectures = [model_class.__name__]
    config._attn_implementation = host.config._attn_implementation
    return config, family


def remember(host: PreTrainedModel) -> dict:
    """The host config as a dict, with the class it belongs to; labels and dtype live in our own config."""
    forgotten = ("id2label", "label2id", "label_names", "transformers_version", "dtype", "torch_dtype")
    facts = {key: value for key, value in host.config.to_dict().items() if key not in forgotten}
    return {**facts, "architectures": [type(host).__name__], "_name_or_path": host.config._name_or_path}


@torch.no_grad()
def fill(
    model: SpecializedViTPreTrainedModel, family: HostFamily, host: PreTrainedModel, host_parameters: dict[str, Tensor]
) -> ConversionReport:
    """Copy the host's parameters into a model with uninitialised memory and draw what has no source."""
    report = ConversionReport(type(host).__name__, type(model).__name__)
    ours = dict(model.named_parameters())
    places = {
        name: family.translate(name, host_parameters) for name, tensor in host_parameters.items() if tensor.numel()
    }
    keep_head = heads_fit(model, host)
    inside = "specialized_vit." if is_classifier(type(model)) else ""
    origin, placed = {}, {}
    for name, place in places.items():
        targets = [target if target.startswith("classifier") else inside + target for target in place.names]
        if all(target in ours for target in targets) and targets and (keep_head or "classifier" not in targets[0]):
            placed[name] = type(place)(tuple(targets), place.slot)
            origin |= dict.fromkeys(targets, name)
            continue
        reason = dropped_reason(name)
        if reason is None:
            raise ValueError(
                f"{type(host).__name__} has the parameter {name!r}, which the specialised ViT does not know; convert a"
                f" plain {family.base_class}"
            )
        report.dropped[name] = reason
    tensors = gather(placed, {name: tensor.detach() for name, tensor in host_parameters.items()})
    for name, parameter in ours.items():
        twin = re.sub(r"_cls(?=\.(weight|bias|lambda1)$)", "", name)
        if twin not in tensors:
            report.created.append(name)
            continue
        parameter.copy_(tensors[twin].reshape(parameter.shape))
        parameter.requires_grad_(host_parameters[origin[twin]].requires_grad)
        parameter._is_hf_initialized = True  # kept by the initialisation below
        (report.copied if twin == name else report.cloned)[name] = origin[twin]
    unexplained = [name for name in report.created if not NEW_WEIGHTS.fullmatch(name)]
    if unexplained:
        raise ValueError(f"{type(host).__name__} has no weights for {unexplained[:3]}")
    model.apply(model._init_weights)
    for parameter in ours.values():
        parameter._is_hf_initialized = False
    count_values(report, ours, host_parameters)
    return report


def heads_fit(model: SpecializedViTPreTrainedModel, host: PreTrainedModel) -> bool:
    """Whether the host's classifier, if it has one, reads and says what ours does."""
    if not is_classifier(type(model)):
        return False
    reads = find_family(host.config).options(host).get("classifier_input", "cls")
    return model.config.num_labels == host.config.num_labels and model.config.classifier_input == reads


def count_values(report: ConversionReport, ours: dict[str, Tensor], host_parameters: dict[str, Tensor]):
    """Fill in how many scalars each group of the report holds."""
    groups = {"copied": report.copied, "cloned to CLS": report.cloned, "newly created": report.created}
    report.counts = {group: sum(ours[name].numel() for name in names) for group, names in groups.items()}
    report.counts["dropped"] = sum(host_parameters[name].numel() for name in report.dropped)
