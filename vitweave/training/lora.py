"""LoRA (arXiv:2106.09685) on the [CLS] path, the patch path or both, with norms and heads trained in full beside it."""

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import (
    SpecializedViTBackbone,
    SpecializedViTForImageClassification,
    SpecializedViTModel,
)
from vitweave.modeling.specialize import OTHER_FLAGS, SPECIALIZATION_FLAGS, specialize

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# our names and those of older and of timm hosts
QKV = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "qkv")
CLS_QKV = ("q_proj_cls", "k_proj_cls", "v_proj_cls")
CLS_LINEARS = (*CLS_QKV, "o_proj_cls", "fc1_cls", "fc2_cls", "gate_proj_cls", "up_proj_cls", "down_proj_cls")
CLS_NORMS = ("norm1_cls", "norm2_cls", "layer_scale1_cls", "layer_scale2_cls", "layernorm_cls")
# preset -> last parts of the names of the linears that get low-rank updates, and of the modules trained in full
PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cls": (CLS_LINEARS, CLS_NORMS),
    "patch": (QKV, ()),
    "qkv": ((*QKV, *CLS_QKV), ()),
    "head": ((), ()),
}
NOTHING = "dummy-target-modules"  # PEFT's word for "no low-rank updates"


def lora_config(
    model: PreTrainedModel,
    preset: str = "cls",
    rank: int = 16,
    alpha: float | None = None,
    modules_to_save: list[str] | None = None,
    **options,
) -> "LoraConfig":
    """The PEFT config of one way to adapt a ViT; `peft.get_peft_model(model, lora_config(model))` attaches it.

    Args:
        model: an encoder, a backbone or a model with a head around one. A head is always trained in full.
        preset: "cls" adapts every specialised linear on the [CLS] path and trains the [CLS] norms and LayerScales; the
            patch path stays as it is (f_cls = f_patch + low rank, arXiv:2602.08626). "patch" adapts q, k, v of the
            patch path, which all tokens share in blocks that are not specialised; "qkv" adapts both; "head" only
            trains the head.
        alpha: the update is scaled by alpha / rank; None = rank.
        modules_to_save: full names of further modules to train in full.
        options: of `peft.LoraConfig`, e.g. `lora_dropout`, `use_dora`.
    """
    from peft import LoraConfig  # needed only while training; importing vitweave must not require it

    if preset not in PRESETS:
        raise ValueError(f"unknown LoRA preset {preset!r}; known: {sorted(PRESETS)}")
    if "target_modules" in options:
        raise ValueError("target_modules follows from the preset; build a peft.LoraConfig for other targets")
    linears, whole = PRESETS[preset]
    modules = dict(model.named_modules())
    targets = [name for name, module in modules.items() if name.split(".")[-1] in linears and is_linear(module)]
    saved = [name for name in modules if name.split(".")[-1] in whole]
    heads = head_names(model)
    check_matches(model, preset, targets, heads)
    saved = [*saved, *heads, *(modules_to_save or [])]
    check_names(saved, targets, list(modules))
    options = {"lora_alpha": rank if alpha is None else alpha, **options}
    known_as = model.name_or_path or None
    target_modules = pattern_of(targets) if targets else NOTHING
    return LoraConfig(
        r=rank,
        target_modules=target_modules,
        modules_to_save=saved or None,
        base_model_name_or_path=known_as,
        **options,
    )


def is_linear(module: nn.Module) -> bool:
    """Linear layers, also quantised ones."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def head_names(model: PreTrainedModel) -> list[str]:
    """What stands beside the encoder (or its backbone) and is saved: classifiers, dense heads, losses that count."""
    children = dict(model.named_children())
    encoders = [name for name, child in children.items() if isinstance(child, PreTrainedModel) and takes_images(child)]
    if not encoders:  # an encoder by itself
        return []
    return [name for name, child in children.items() if name not in encoders and child.state_dict()]


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a sub-model is a whole encoder; a stack of blocks takes hidden states."""
    return "pixel_values" in inspect.signature(model.forward).parameters


def check_matches(model: PreTrainedModel, preset: str, targets: list[str], heads: list[str]):
    """A preset must find what it is about."""
    if preset == "head" and not heads:
        raise ValueError(f"preset 'head' matches nothing: {type(model).__name__} has no head")
    if preset == "head" or targets:
        return
    helps = {
        "cls": "specialise some linears (qkv_blocks) with full weights (cls_rank=0), or choose preset 'patch'",
        "patch": "LoRA needs layers named " + ", ".join(QKV),
        "qkv": "LoRA needs layers named " + ", ".join(QKV),
    }
    raise ValueError(f"preset {preset!r} matches no linear layer of {type(model).__name__}; {helps[preset]}")


def check_names(saved: list[str], targets: list[str], modules: list[str]):
    """Every module is adapted once, and PEFT, which compares endings of names, must find these modules only."""
    missing = [name for name in saved if name not in modules]
    if missing:
        raise ValueError(f"modules_to_save names {missing}, which do not exist; give full names, e.g. {modules[-1]!r}")
    twice = sorted({name for name in saved if saved.count(name) > 1})
    nested = [(inner, outer) for outer in saved for inner in (*saved, *targets) if inner.startswith(f"{outer}.")]
    both = sorted(set(saved) & set(targets))
    if twice or nested or both:
        found = [*twice, *both, *(f"{inner} (inside of {outer})" for inner, outer in nested)]
        raise ValueError(f"these modules are matched twice: {found}")
    more = [name for name in modules if name not in saved and name.endswith(tuple(saved or ["\0"]))]
    if more:
        raise ValueError(f"PEFT would also train {more}, whose names end like one of {saved}; rename the head")


def pattern_of(names: list[str]) -> str:
    """A regular expression for full module names, with block numbers left open."""
    shapes = {re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names}
    return "|".join(sorted(shapes))


def save_adapter(model: "PeftModel", folder: str | Path):
    """Write an adapter together with the config of its base, from which `load_adapter` can make the base again."""
    model.save_pretrained(str(folder))
    model.get_base_model().config.save_pretrained(str(folder))


def load_adapter(folder: str | Path, **load_options) -> "PeftModel":
    """Open an adapter written by `save_adapter` whose base was converted in memory from a vanilla folder or Hub id.

    Args:
        load_options: of `from_pretrained`, for the vanilla model (`revision`, `dtype`, ...).
    """
    from peft import PeftModel  # needed only while training

    config = SpecializedViTConfig.from_pretrained(folder)
    source = (config.host_config or {}).get("_name_or_path")
    if not source:
        raise ValueError(f"{folder} does not say which vanilla model its base came from; open the base, then PeftModel")
    if config.attention_bias and config.attention_bias_init:
        raise ValueError("the base has a random attention bias, which its config cannot give back; save the base too")
    classes = (SpecializedViTModel, SpecializedViTBackbone, SpecializedViTForImageClassification)
    model_class = {cls.__name__: cls for cls in classes}[(config.architectures or ["SpecializedViTModel"])[0]]
    is_classifier = model_class is SpecializedViTForImageClassification
    labels = ("num_labels", "id2label", "label2id", "problem_type", "classifier_input")
    names = [name for name in (*SPECIALIZATION_FLAGS, *OTHER_FLAGS) if name not in labels or is_classifier]
    flags = {name: getattr(config, name) for name in names if name != "out_indices"}
    return PeftModel.from_pretrained(specialize(source, model_class, **flags, **load_options), str(folder))
