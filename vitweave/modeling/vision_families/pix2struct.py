"""The image encoder of Pix2Struct (arXiv:2210.03347), which takes images of any shape, cut to a budget of patches."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.own_models import OWN_MODELS
from vitweave.modeling.vision_families.base import VisionFamily
from vitweave.modeling.vision_families.vit import cut_patches


class Pix2Struct(VisionFamily):
    """Pix2Struct: does here, on a batch of images of one size, what its image processor does natively.

    Every image is standardised by its own mean and deviation over all channels, so it may come in 0..1, in 0..255 or in
    any other range, as long as the three channels share it: CLIP-normalised pixels do not and have to be
    un-normalised first. It is then resized to the largest grid of whole patches within `config.max_patches` (2048
    where the config has none: 45x45 for a square image). Rows and columns count from 1; the native padding up to
    the budget, which is masked, is left out.
    """

    blocks = "encoder.layer"

    def model_classes(self, config):
        return OWN_MODELS[config.model_type]()["model"]

    def check_size(self, model, height, width):
        rows, columns = encoder_facts(model.config).grid_for(height, width)
        if max(rows, columns) >= model.config.seq_len:
            raise ValueError(
                f"expected a grid of fewer than seq_len={model.config.seq_len} rows and columns, got {rows}x{columns}"
                f" for an image of {height}x{width} pixels; pad it to a less extreme shape, or lower max_patches"
            )

    def embed(self, model, pixel_values):
        facts, embeddings = encoder_facts(model.config), model.embeddings
        rows, columns = facts.grid_for(*pixel_values.shape[-2:])
        size = facts.strides[-1][0]
        # float32, because resizing with antialias knows no half precision on CPU
        pixels = standardised(pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32)))
        pixels = F.interpolate(pixels, size=(rows * size, columns * size), mode="bilinear", antialias=True)
        patches = embeddings.patch_projection(cut_patches(pixels, (rows, columns), size).to(pixel_values.dtype))
        row = embeddings.row_embedder(torch.arange(1, rows + 1, device=pixels.device))
        column = embeddings.column_embedder(torch.arange(1, columns + 1, device=pixels.device))
        return embeddings.dropout(patches + (row[:, None] + column[None]).flatten(0, 1))

    def block_options(self, model, pixel_values):
        if model._supports_sdpa:
            return {}
        rows, columns = encoder_facts(model.config).grid_for(*pixel_values.shape[-2:])
        return {"attention_mask": pixel_values.new_ones(1, rows * columns)}  # the attention of older versions needs one

    def run_block(self, block, hidden_states, options):
        return block(hidden_states, **options)[0]  # the other is the attention

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=1)


def standardised(pixel_values: Tensor) -> Tensor:
    """Each image (batch, channels, height, width) with mean 0 and deviation 1; a flat one is not blown up."""
    mean = pixel_values.mean(dim=(1, 2, 3), keepdim=True)
    deviation = pixel_values.std(dim=(1, 2, 3), keepdim=True)
    return (pixel_values - mean) / deviation.clamp(min=pixel_values.shape[1:].numel() ** -0.5)
