"""ViTs run without their class token: it leaves before the first block, so that no patch ever attends to it."""

from torch import Tensor
from transformers import PreTrainedModel

from vitweave.configuration.encoder_facts import EncoderFacts, encoder_facts
from vitweave.modeling.grid_matching import resample_positions
from vitweave.modeling.vision_families.base import VisionFamily
from vitweave.modeling.vision_families.vit import Clip, Dinov2, Dinov3, Mae, ResizedViT


class PatchesOnly(VisionFamily):
    """Stands before a ViT's family and takes the class tokens off its embeddings; registers stay.

    The pooled output is the mean of the patches after the final norm, as of encoders that never had a class token.
    """

    def facts(self, model: PreTrainedModel) -> EncoderFacts:
        return encoder_facts(model.config, class_token="drop_before")

    def embed(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        return super().embed(model, pixel_values)[:, encoder_facts(model.config).num_class_tokens :]

    def pool(self, model: PreTrainedModel, hidden_states: Tensor, normed: Tensor) -> Tensor:
        return normed[:, self.facts(model).num_registers :].mean(dim=1)


class ResizedViTPatches(PatchesOnly, ResizedViT):
    """ViT, ViT-MSN, and DeiT, which loses its distillation token as well."""


class Dinov2Patches(PatchesOnly, Dinov2):
    """DINOv2 with and without registers, InternViT."""


class Dinov3Patches(PatchesOnly, Dinov3):
    """DINOv3: its rotary embeddings turn patches only, so they need not know."""


class MaePatches(PatchesOnly, Mae):
    """ViT-MAE."""


class ClipPatches(PatchesOnly, Clip):
    """The CLIP of EAGLE (arXiv:2408.15998) and LLaVA-HR (arXiv:2403.03003): no class token, no final norm.

    At another image size their code resamples the position table with antialias, where transformers' own
    `interpolate_pos_encoding` does without and differs; released checkpoints need the former.
    """

    def embed(self, model, pixel_values):
        embeddings = model.embeddings
        patches = embeddings.patch_embedding(pixel_values)  # (batch, hidden, height, width)
        positions = embeddings.position_embedding.weight[None, 1:]  # the first row is the class token's
        positions = resample_positions(positions, patches.shape[-2:], antialias=True)
        return model.pre_layrnorm(patches.flatten(2).transpose(1, 2) + positions)

    def norm(self, model, hidden_states):
        return hidden_states  # the native norm is for the class token only
