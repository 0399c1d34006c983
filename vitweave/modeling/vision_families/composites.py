"""Our own composites as encoders: what they return is their one layer, so that every composite can hold another."""

from vitweave.configuration.encoder_facts import layer_fusion_facts
from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.vision_families.base import VisionFamily, unchanged


class Composite(VisionFamily):
    """One layer, number 1: the output of a model of ours, behind whatever norms it has inside."""

    takes_injections = False  # its blocks are those of the encoders in it
    final_norm = None

    def model_classes(self, config):
        return OWN_MODELS[config.model_type]()["model"]

    def run(self, model, facts, pixel_values, layers, final_norm, inject=unchanged):
        outputs = self.outputs(model, pixel_values)
        return [outputs.last_hidden_state for _ in layers], outputs.pooler_output

    def outputs(self, model, pixel_values):
        return model(pixel_values, return_dict=True)


class LayerFused(Composite):
    """A layer fusion: the fused embedding, the prefix of the encoder, and its patches, fused where the fusion is dense.

    Of a pyramid (fpn) the patches are those of the encoder; its maps are for the backbone.
    """

    def facts(self, model):
        return layer_fusion_facts(model.encoder.facts)  # known even where the config does not tell (timm)

    def check_size(self, model, height, width):
        model.encoder.family.check_size(model.encoder.model, height, width)

    def outputs(self, model, pixel_values):
        return model(pixel_values, output_attentions=False, output_hidden_states=False, return_dict=True)


class MultiEncoder(Composite):
    """Several encoders fused on one grid: their tokens, and the mean of them."""
