"""A specialised ViT back to the vanilla model it was made from."""

import re

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, CLIPConfig, PreTrainedConfig, PreTrainedModel

from vitweave.modeling.conversion.host_family import HostFamily, scatter
from vitweave.modeling.conversion.registry import HOST_FAMILIES, gated_family

SHOWN = 5  # differing parameters listed in an error


def to_vanilla(model: PreTrainedModel, strict: bool = True) -> PreTrainedModel:
    """Rebuild the host model with the patch weights of `model`.

    Args:
        strict: refuse when something would be lost: [CLS] weights that differ from their patch twins, low-rank updates,
            an attention bias. Otherwise these are dropped.
    """
    config = model.config
    if not config.host_config:
        raise ValueError("this model was not converted from a vanilla ViT (its config has no host_config)")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    lost = differences(tensors)
    if strict and lost:
        listed = "\n  ".join(lost[:SHOWN])
        raise ValueError(
            f"{len(lost)} parameters of the specialised ViT have no place in a vanilla one, first:\n  {listed}\n"
            "Use strict=False to drop them and keep the patch weights."
        )
    facts = dict(config.host_config)
    model_type, saved_as = facts.pop("model_type"), (facts.get("architectures") or [None])[0]
    if model_type not in HOST_FAMILIES:
        raise ValueError(f"host_config names the type {model_type!r}; supported: {', '.join(HOST_FAMILIES)}")
    family = gated_family(model_type, config.use_swiglu_ffn)
    host_config = CONFIG_MAPPING[model_type].from_dict(facts, num_labels=config.num_labels)
    host_config.id2label, host_config.label2id = config.id2label, config.label2id
    host_config.dtype, host_config._attn_implementation = model.dtype, config._attn_implementation
    host = build(family, host_config, model, saved_as)
    fill(host, family, tensors)
    host.name_or_path = facts.get("_name_or_path", "")
    return host.train(model.training)


def differences(tensors: dict[str, Tensor]) -> list[str]:
    """What a vanilla ViT cannot hold, one line each."""
    found = []
    for name, tensor in tensors.items():
        twin = re.sub(r"_cls(?=\.(weight|bias|lambda1)$)", "", name)
        if twin != name and not torch.equal(tensor, tensors[twin]):
            largest = (tensor - tensors[twin]).abs().max().item()
            found.append(f"{name} differs from {twin} by up to {largest:.3g}")
        elif name.endswith("_cls_up.weight") and tensor.any():
            found.append(f"{name} is not zero")
        elif name.endswith((".bias_k", ".bias_v")):
            found.append(f"{name} is an attention bias")
    return found


def build(
    family: HostFamily, config: PreTrainedConfig, model: PreTrainedModel, saved_as: str | None
) -> PreTrainedModel:
    """The host class that matches ours, without weights in memory yet filled."""
    ours = model.config
    arguments = {}
    if hasattr(model, "classifier"):
        class_name = family.classifiers.get(ours.classifier_input)
        if class_name is None:
            raise ValueError(
                f"{family.base_class} has no classifier that reads {ours.classifier_input!r}; restore the encoder alone"
                " with model.specialized_vit.to_vanilla()"
            )
    elif hasattr(model, "out_features") and saved_as in family.backbones:
        class_name = saved_as
        config.set_output_features_output_indices(out_features=ours.out_features, out_indices=None)
    else:
        class_name, arguments = family.base_class, family.base_arguments(ours)
    if class_name == "CLIPVisionModel":
        config = getattr(config, "vision_config", config)
    elif class_name == "CLIPForImageClassification" and not hasattr(config, "vision_config"):
        config = CLIPConfig(vision_config=config.to_dict(), num_labels=ours.num_labels, id2label=ours.id2label)
    return getattr(transformers, class_name)(config, **arguments).to(model.device, model.dtype)


@torch.no_grad()
def fill(host: PreTrainedModel, family: HostFamily, tensors: dict[str, Tensor]):
    """Copy our patch weights into every parameter of the host."""
    parameters = dict(host.named_parameters())
    for name, parameter in parameters.items():
        if not parameter.numel():
            continue
        place = family.translate(name, parameters)
        inside = "" if not place.names or place.names[0] in tensors else "specialized_vit."
        names = tuple(inside + target for target in place.names)
        if not names or any(target not in tensors for target in names):
            raise ValueError(f"nothing to put into {type(host).__name__}'s {name!r}")
        parameter.copy_(scatter(type(place)(names, place.slot), tensors, parameter.shape))
