"""Our own EVA-02 detector ViT."""

from vitweave.modeling.eva02_det_layers import rotary_tables
from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.vision_families.base import VisionFamily


class Eva02Det(VisionFamily):
    """EVA-02 detector ViT: patches only, windowed and global blocks, no final norm; pooled by the mean."""

    blocks = "encoder.layer"
    final_norm = None

    def model_classes(self, config):
        return OWN_MODELS[config.model_type]()["model"]

    def embed(self, model, pixel_values):
        return model.embeddings(pixel_values)[0]

    def block_options(self, model, pixel_values):
        patch_height, patch_width = model.embeddings.patch_size
        grid = pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width
        return {"grid": grid, "rotary": rotary_tables(model.config, grid, pixel_values)}

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=1)
