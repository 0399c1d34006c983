"""timm models through TimmWrapperModel."""

import torch

from vitweave.configuration.encoder_facts import EncoderFacts
from vitweave.configuration.reductions import ceil_reduction, floor_reduction
from vitweave.modeling.vision_families.base import VisionFamily, unchanged


class Timm(VisionFamily):
    """Layer n is the n-th intermediate of timm's own `forward_intermediates` (ViT: block n); it offers no layer 0.

    What the final norm acts on is timm's choice as well: every layer of a ViT, the last stage of most others.
    """

    takes_injections = False  # timm runs the blocks

    def facts(self, model):
        """Known from the built model only. Grids are exact for image sizes that the strides divide."""
        timm_model = model.timm_model
        if not hasattr(timm_model, "forward_intermediates"):
            raise ValueError(
                f"expected a timm model with `forward_intermediates`, got {model.config.architecture}, which has none"
            )
        info = getattr(timm_model.feature_info, "info", timm_model.feature_info)  # FeatureInfo, or the plain list
        patches = getattr(timm_model, "patch_embed", None)
        reduction = ceil_reduction if patches is None or getattr(patches, "dynamic_img_pad", False) else floor_reduction
        reductions, stride = [floor_reduction(1)], 1
        for layer in info:
            reductions.append(reduction(layer["reduction"] // stride))
            stride = layer["reduction"]
        num_registers = getattr(timm_model, "num_reg_tokens", 0)
        return EncoderFacts(
            hidden_sizes=(info[0]["num_chs"], *(layer["num_chs"] for layer in info)),
            reductions=tuple(reductions),
            num_channels=(model.config.model_args or {}).get("in_chans", 3),
            pooled_size=getattr(timm_model, "head_hidden_size", timm_model.num_features),
            num_class_tokens=getattr(timm_model, "num_prefix_tokens", 0) - num_registers,
            num_registers=num_registers,
            first_layer=1,
        )

    def check_size(self, model, height, width):
        patches = getattr(model.timm_model, "patch_embed", None)
        expected = getattr(patches, "img_size", None)
        if getattr(patches, "strict_img_size", False) and expected is not None and expected != (height, width):
            raise ValueError(
                f"{model.config.architecture} was built for images of {expected[0]}x{expected[1]} pixels, got"
                f" {height}x{width}; resize them, or build it with model_args={{'img_size': ({height}, {width})}} or,"
                " for a ViT, model_args={'dynamic_img_size': True}"
            )

    def run(self, model, facts, pixel_values, layers, final_norm, inject=unchanged):
        in_order = sorted(layers)
        reaches_end = facts.num_layers in layers
        has_prefix = facts.num_class_tokens + facts.num_registers > 0
        output = model.timm_model.forward_intermediates(
            pixel_values,
            indices=[layer - 1 for layer in in_order],
            norm=final_norm,
            stop_early=True,
            intermediates_only=not reaches_end,
            **({"return_prefix_tokens": True} if has_prefix else {}),
        )
        states, pooled = output, None
        if reaches_end:
            last, states = output
            pooled = model.timm_model.forward_head(last, pre_logits=True)
        if has_prefix:  # (batch, hidden, height, width) and (batch, class tokens + registers, hidden) -> one sequence
            states = [torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1) for patches, prefix in states]
        kept = dict(zip(in_order, states, strict=True))
        return [kept[layer] for layer in layers], pooled

    def norm(self, model, hidden_states):
        norm = getattr(model.timm_model, "norm", None)  # of a ViT; the maps of other models stay as they are
        return norm(hidden_states) if norm is not None and hidden_states.ndim == 3 else hidden_states
