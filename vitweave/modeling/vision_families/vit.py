"""ViTs: sequences of class tokens, registers and patches of one width."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitweave.modeling.vision_families.base import VisionFamily


class ResizedViT(VisionFamily):
    """ViTs that take another image size only when told to interpolate their position embeddings."""

    def embed(self, model, pixel_values):
        return model.embeddings(pixel_values, interpolate_pos_encoding=True)


class PatchMean(ResizedViT):
    """I-JEPA: no class token; where there is no pooler, the mean of the patches is the pooled output."""

    def pool(self, model, hidden_states, normed):
        return normed.mean(dim=1) if model.pooler is None else model.pooler(normed)


class Dinov2(VisionFamily):
    """DINOv2 with and without registers, InternViT: they interpolate by themselves."""

    blocks = "encoder.layer"


class Dinov3(VisionFamily):
    """DINOv3: rotary position embeddings, computed once from the image size."""

    blocks = "model.layer"
    final_norm = "norm"

    def block_options(self, model, pixel_values):
        return {"position_embeddings": model.rope_embeddings(pixel_values)}


class Beit(VisionFamily):
    """BEiT: relative position bias, one per block or one for all; mean-pooled ones norm the pooled output only."""

    def block_options(self, model, pixel_values):
        resolution = tuple(pixel_values.shape[-2:])
        if model.shared_position_bias is None:
            return {"resolution": resolution}
        window = tuple(size // model.config.patch_size for size in resolution)
        return {"resolution": resolution, "attention_mask": model.shared_position_bias(window)}


class Clip(ResizedViT):
    """CLIP: a norm before the blocks; the final norm is for the class token only, the patches stay as they are."""

    blocks = "encoder.layers"

    def embed(self, model, pixel_values):
        return model.pre_layrnorm(super().embed(model, pixel_values))

    def block_options(self, model, pixel_values):
        return {"attention_mask": None}

    def norm(self, model, hidden_states):
        return torch.cat([model.post_layernorm(hidden_states[:, :1]), hidden_states[:, 1:]], dim=1)


class Siglip(ResizedViT):
    """SigLIP: no class token; an attention head pools the patches, and where it is left out, their mean."""

    blocks = "encoder.layers"
    final_norm = "post_layernorm"

    def block_options(self, model, pixel_values):
        return {"attention_mask": None}

    def pool(self, model, hidden_states, normed):
        return model.head(normed) if model.use_head else normed.mean(dim=1)


class Siglip2(Siglip):
    """SigLIP 2 (NaFlex): takes patches with their grid; a batch of images of one size is cut into them here."""

    def embed(self, model, pixel_values):
        embeddings = model.embeddings
        size = embeddings.patch_size
        grid = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        patches = cut_patches(pixel_values[..., : grid[0] * size, : grid[1] * size], grid, size)
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.unflatten(0, (side, side)).permute(2, 0, 1)[None]
        # float32, because resizing with antialias knows no half precision on CPU
        table = F.interpolate(table.float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
        return embeddings.patch_embedding(patches) + table.flatten(2).transpose(1, 2).to(patches.dtype)


def cut_patches(pixel_values: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """(batch, channels, height, width), whole patches -> (batch, patches, size * size * channels), channels fastest."""
    patches = pixel_values.unflatten(-2, (grid[0], size)).unflatten(-1, (grid[1], size))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Mae(VisionFamily):
    """ViT-MAE: its embedding drops and shuffles patches for pre-training; as an encoder it sees all, in order."""

    def embed(self, model, pixel_values):
        embeddings = model.embeddings
        patches = embeddings.patch_embeddings(pixel_values)
        positions = embeddings.interpolate_pos_encoding(patches, *pixel_values.shape[-2:])
        cls = (embeddings.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([cls, patches + positions[:, 1:]], dim=1)


class Radio(VisionFamily):
    """RADIO: normalises the pixels itself, has no final norm, and pools to the summary tokens side by side."""

    blocks = "encoder.layer"
    final_norm = None

    def check_size(self, model, height, width):
        size = model.config.patch_size
        if height % size or width % size:
            raise ValueError(
                f"expected an image of whole patches of {size}x{size} pixels, got {height}x{width}; RADIO neither crops"
                " nor pads, resize the image first"
            )

    def embed(self, model, pixel_values):
        return model.embeddings(model.input_conditioner(pixel_values))

    def pool(self, model, hidden_states, normed):
        return hidden_states[:, model.summary_idxs].flatten(1)
