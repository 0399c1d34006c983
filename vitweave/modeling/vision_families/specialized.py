"""Our own specialised ViT."""

import torch

from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.tokens import by_role
from vitweave.modeling.vision_families.base import VisionFamily, unchanged


class Specialized(VisionFamily):
    """Our specialised ViT stops and keeps by itself; its class-attention layers, if any, belong to the last layer."""

    def model_classes(self, config):
        return OWN_MODELS[config.model_type]()["model"]

    def run(self, model, facts, pixel_values, layers, final_norm, inject=unchanged):
        hidden_states, grid = model.embed(pixel_values)
        last = facts.num_layers
        keep = tuple(layer for layer in layers if layer != last)
        stop_at = None if last in layers else max(layers)
        inject = None if inject is unchanged else inject
        outputs = model.encoder(hidden_states, grid, keep=keep, stop_at=stop_at, inject=inject)
        kept = {**dict(zip(keep, outputs.kept, strict=True)), last: outputs.last_hidden_state}
        return self.finish(model, facts, [kept[layer] for layer in layers], layers, final_norm)

    def norm(self, model, hidden_states):
        if model.config.final_norm == "pooled" and model.config.pooling == "cls":  # as CLIP
            cls = by_role(model, "layernorm", 1, hidden_states[:, :1])
            return torch.cat([cls, hidden_states[:, 1:]], dim=1)
        return model.pool(hidden_states)[0]

    def pool(self, model, hidden_states, normed):
        return model.pool(hidden_states)[1]
