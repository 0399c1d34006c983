"""Where a ViT's tokens come from and how they know their place: patches, learned, rotary and relative positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.grid_matching import resample_positions


class PatchEmbeddings(nn.Module):
    """Image to patch tokens by one strided convolution."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = as_pair(config.patch_size)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size, bias=config.patch_bias
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, hidden, height / patch, width / patch)."""
        check_pixel_values(pixel_values, self.num_channels, self.patch_size)
        return self.projection(pixel_values.to(self.projection.weight.dtype))


def check_pixel_values(pixel_values: Tensor, num_channels: int | None, patch_size: tuple[int, int] | None):
    """Refuse images that are no batch, have other channels, or are smaller than a patch; None leaves a check out."""
    if pixel_values.ndim != 4:
        raise ValueError(
            f"expected pixel_values (batch, channels, height, width), got {tuple(pixel_values.shape)};"
            " a single image needs pixel_values[None]"
        )
    channels, height, width = pixel_values.shape[1:]
    if num_channels is not None and channels != num_channels:
        raise ValueError(
            f"expected {num_channels} image channels, got {channels} in pixel_values {tuple(pixel_values.shape)};"
            " convert the images (e.g. to RGB) or build the model with num_channels to match"
        )
    if patch_size is None or torch.compiler.is_compiling():  # comparing would pin down the sizes of an exported graph
        return
    if height < patch_size[0] or width < patch_size[1]:
        raise ValueError(
            f"the image of {height}x{width} pixels is smaller than one patch of {patch_size[0]}x{patch_size[1]};"
            " resize it first"
        )


class SpecializedViTEmbeddings(nn.Module):
    """Patches, class tokens and registers as one sequence [CLS.., registers.., patches..]."""

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        hidden = config.hidden_size
        self.num_cls_tokens = config.num_cls_tokens
        self.stored_grid = config.image_grid
        self.antialias = config.position_interpolation == "bicubic_antialias"
        self.cls_token = nn.Parameter(torch.zeros(1, config.num_cls_tokens, hidden))
        self.mask_token = nn.Parameter(torch.zeros(1, hidden)) if config.use_mask_token else None
        self.register_tokens = None
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, hidden))
        self.num_position_prefix = config.num_cls_tokens if config.position_for_cls else 0
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            positions = self.num_position_prefix + math.prod(self.stored_grid)
            trained = not config.freeze_position_embeddings
            self.position_embeddings = nn.Parameter(torch.zeros(1, positions, hidden), requires_grad=trained)
        self.patch_embeddings = PatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """Embed images.

        Args:
            pixel_values: (batch, channels, height, width).
            bool_masked_pos: (batch, patches), True where the mask token replaces the patch.

        Returns:
            tokens (batch, tokens, hidden) and the patch grid (height, width).
        """
        maps = self.patch_embeddings(pixel_values)
        batch, grid = maps.shape[0], (maps.shape[2], maps.shape[3])
        patches = maps.flatten(2).transpose(1, 2)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs the mask token; build the config with use_mask_token=True")
            patches = torch.where(bool_masked_pos.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)

        cls_tokens = self.cls_token
        if self.position_embeddings is not None:
            prefix = self.num_position_prefix
            table = self.position_embeddings[:, prefix:]
            patches = patches + resample_positions(table, grid, self.antialias, stored=self.stored_grid)
            if prefix:
                cls_tokens = cls_tokens + self.position_embeddings[:, :prefix]
        prefix_tokens = [cls_tokens] if self.register_tokens is None else [cls_tokens, self.register_tokens]
        tokens = torch.cat([*(token.expand(batch, -1, -1) for token in prefix_tokens), patches], dim=1)
        return self.dropout(tokens), grid


def rotary_tables(
    config: SpecializedViTConfig, grid: tuple[int, int], like: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of DINOv3's axial rotary positions (arXiv:2508.10104).

    Patch centres lie in [-1, 1] on both axes; a quarter of the head size serves as frequencies for each axis. Prefix
    tokens get angle 0, which leaves them unrotated.

    Args:
        like: a tensor of the model's dtype and device.

    Returns:
        cos and sin, each (prefix + patches, head size).
    """
    head_dim = config.hidden_size // config.num_attention_heads
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [(torch.arange(n, dtype=torch.float32, device=like.device) + 0.5) / n * 2 - 1 for n in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)  # (patches, 2)
    if training:
        centres = move_coordinates(config, centres)
    exponents = torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=like.device)  # (head_dim / 4,)
    frequencies = 1 / config.rope_theta**exponents
    angles = (2 * math.pi * centres)[:, :, None].to(dtype) * frequencies.to(dtype)
    angles = angles.flatten(1, 2).tile(2)  # (patches, head_dim)
    angles = F.pad(angles, (0, 0, config.num_prefix_tokens, 0))
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def move_coordinates(config: SpecializedViTConfig, centres: Tensor) -> Tensor:
    """DINOv3's training augmentation: shift, per-axis stretch and common stretch of the patch coordinates."""
    if config.pos_embed_shift is not None:
        centres = centres + torch.empty_like(centres[:1]).uniform_(-config.pos_embed_shift, config.pos_embed_shift)
    if config.pos_embed_jitter is not None:
        limit = math.log(config.pos_embed_jitter)
        centres = centres * torch.empty_like(centres[:1]).uniform_(-limit, limit).exp()
    if config.pos_embed_rescale is not None:
        limit = math.log(config.pos_embed_rescale)
        centres = centres * torch.empty_like(centres[:1, :1]).uniform_(-limit, limit).exp()
    return centres


def rotate(tokens: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (batch, heads, tokens, head size), pairing channel i with channel i + head size / 2."""
    first, second = tokens.chunk(2, dim=-1)
    return tokens * cos + torch.cat((-second, first), dim=-1) * sin


class RelativePositionBias(nn.Module):
    """BEiT's learnt attention bias per head and relative patch position (arXiv:2106.08254).

    The table is laid out (2 height - 1) x (2 width - 1) for the stored grid, followed by the entries [CLS] to patch,
    patch to [CLS] and [CLS] to [CLS]; for another grid the first part is resampled bilinearly.
    """

    def __init__(self, config: SpecializedViTConfig):
        super().__init__()
        self.stored_grid = config.image_grid
        entries = (2 * self.stored_grid[0] - 1) * (2 * self.stored_grid[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, config.num_attention_heads))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """The bias (1, heads, 1 + patches, 1 + patches) for a patch grid (height, width)."""
        height, width = grid
        table = self.relative_position_bias_table
        stored = [2 * size - 1 for size in self.stored_grid]
        patch_part = table[:-3].unflatten(0, stored).permute(2, 0, 1)[None]  # (1, heads, 2h - 1, 2w - 1)
        patch_part = F.interpolate(patch_part, size=(2 * height - 1, 2 * width - 1), mode="bilinear")
        rows = torch.arange(height, device=table.device).repeat_interleave(width)
        columns = torch.arange(width, device=table.device).repeat(height)
        row_steps = rows[:, None] - rows[None, :] + height - 1
        column_steps = columns[:, None] - columns[None, :] + width - 1
        patches = patch_part[0][:, row_steps, column_steps]  # (heads, patches, patches)
        to_patch, to_cls, cls_to_cls = table[-3:, :, None, None]  # each (heads, 1, 1)
        top = torch.cat((cls_to_cls, to_patch.expand(-1, 1, height * width)), dim=2)
        rest = torch.cat((to_cls.expand(-1, height * width, 1), patches), dim=2)
        return torch.cat((top, rest), dim=1)[None]
