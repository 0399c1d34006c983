"""Sizes of encoders from the shapes of their tensors: a released checkpoint need not be as large as its preset."""

import math
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedConfig

# entries of a config that its constructor finds anew
FOLLOWS_FROM_DEPTH = ("model_type", "stage_names", "out_features", "out_indices", "window_blocks")
Shapes = dict[str, Tensor]  # by our names inside of the encoder; only their shapes are read


def heads_of(width: int, config: PreTrainedConfig) -> int:
    """Attention heads of an encoder of this width, each as wide as in the preset."""
    head_size = config.hidden_size // config.num_attention_heads
    if width % head_size:
        raise ValueError(
            f"cannot tell the attention heads of a {config.model_type!r} encoder of width {width} from its tensors: in"
            f" the preset a head is {head_size} wide. Give convert_multi_encoder a config with the sizes"
        )
    return width // head_size


def depth(shapes: Shapes, block: str) -> int:
    """Number of blocks; `block` is what their names begin with, e.g. "encoder.layers."."""
    return len({name.removeprefix(block).split(".")[0] for name in shapes if name.startswith(block)})


def side(rows: int, patch: int) -> int:
    """Pixels of the square image whose patches a position table of so many rows describes."""
    return math.isqrt(rows) * patch


def clip_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """CLIP and SigLIP."""
    patch = shapes["embeddings.patch_embedding.weight"]
    rows = shapes["embeddings.position_embedding.weight"].shape[0] - ("embeddings.class_embedding" in shapes)
    return {
        "hidden_size": patch.shape[0],
        "num_hidden_layers": depth(shapes, "encoder.layers."),
        "num_attention_heads": heads_of(patch.shape[0], config),
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.bias"].shape[0],
        "patch_size": patch.shape[2],
        "image_size": side(rows, patch.shape[2]),
    }


def convnext_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """ConvNeXt in transformers."""
    widths = [shapes[f"encoder.stages.{stage}.layers.0.dwconv.bias"].shape[0] for stage in range(4)]
    depths = [depth(shapes, f"encoder.stages.{stage}.layers.") for stage in range(4)]
    return {"hidden_sizes": widths, "depths": depths}


def timm_convnext_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """ConvNeXt in timm, whose name stands for its sizes; other ones are arguments of timm's constructor."""
    stages = [f"timm_model.stages.{stage}.blocks." for stage in range(4)]
    dims = [shapes[f"{stage}0.conv_dw.bias"].shape[0] for stage in stages]
    depths = [depth(shapes, stage) for stage in stages]
    is_xxlarge = (dims, depths) == ([384, 768, 1536, 3072], [3, 4, 30, 3])
    if is_xxlarge and config.architecture == "convnext_xxlarge":
        return {}
    return {"model_args": {**(config.model_args or {}), "dims": dims, "depths": depths}}


def sam_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """SAM; windows and global blocks follow from the tables of relative positions."""
    table, patch = shapes["vision_encoder.pos_embed"], shapes["vision_encoder.patch_embed.projection.weight"]
    blocks = depth(shapes, "vision_encoder.layers.")
    tables = [shapes[f"vision_encoder.layers.{block}.attn.rel_pos_h"].shape for block in range(blocks)]
    whole = 2 * table.shape[1] - 1
    windows = sorted({(rows + 1) // 2 for rows, _ in tables if rows != whole})
    return {
        "hidden_size": table.shape[3],
        "num_hidden_layers": blocks,
        "num_attention_heads": table.shape[3] // tables[0][1],
        "mlp_dim": shapes["vision_encoder.layers.0.mlp.lin1.bias"].shape[0],
        "output_channels": shapes["vision_encoder.neck.conv1.weight"].shape[0],
        "patch_size": patch.shape[2],
        "image_size": table.shape[1] * patch.shape[2],
        "global_attn_indexes": [block for block, (rows, _) in enumerate(tables) if rows == whole],
        **({"window_size": windows[0]} if windows else {}),
    }


def intern_vit_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """InternViT, with or without norms of queries and keys."""
    patch = shapes["embeddings.patch_embeddings.projection.weight"]
    pixels = side(shapes["embeddings.position_embeddings"].shape[1] - 1, patch.shape[2])
    first = "encoder.layer.0."
    return {
        "hidden_size": patch.shape[0],
        "num_hidden_layers": depth(shapes, "encoder.layer."),
        "num_attention_heads": heads_of(patch.shape[0], config),
        "intermediate_size": shapes[f"{first}mlp.fc1.bias"].shape[0],
        "patch_size": [patch.shape[2], patch.shape[3]],
        "image_size": [pixels, pixels],
        "attention_bias": f"{first}attention.q_proj.bias" in shapes,
        "use_qk_norm": f"{first}attention.q_norm.weight" in shapes,
        "norm_type": "layer_norm" if f"{first}layernorm_before.bias" in shapes else "rms_norm",
    }


def eva02_det_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """The EVA-02 detector ViT; windows and image size are not in its tensors."""
    patch = shapes["embeddings.patch_embeddings.weight"]
    rows = shapes["embeddings.position_embeddings"].shape[1] - 1
    inner = shapes["encoder.layer.0.mlp.gate_proj.weight"].shape[0]
    return {
        "hidden_size": patch.shape[0],
        "num_hidden_layers": depth(shapes, "encoder.layer."),
        "num_attention_heads": heads_of(patch.shape[0], config),
        "intermediate_size": None if inner == int(patch.shape[0] * 8 / 3) else inner,
        "patch_size": patch.shape[2],
        "pretrain_image_size": side(rows, patch.shape[2]),
    }


def pix2struct_sizes(config: PreTrainedConfig, shapes: Shapes) -> dict:
    """The image encoder of Pix2Struct."""
    projection = shapes["embeddings.patch_projection.weight"]
    return {
        "hidden_size": projection.shape[0],
        "patch_embed_hidden_size": projection.shape[1],
        "num_hidden_layers": depth(shapes, "encoder.layer."),
        "num_attention_heads": shapes["encoder.layer.0.attention.query.weight"].shape[0] // config.d_kv,
        "d_ff": shapes["encoder.layer.0.mlp.wi_0.weight"].shape[0],
        "seq_len": shapes["embeddings.row_embedder.weight"].shape[0],
    }


ENCODER_SIZES: dict[str, Callable[[PreTrainedConfig, Shapes], dict]] = {
    "clip_vision_model": clip_sizes,
    "convnext": convnext_sizes,
    "eva02_det_vit": eva02_det_sizes,
    "internvl_vision": intern_vit_sizes,
    "pix2struct_vision_model": pix2struct_sizes,
    "sam_vision_model": sam_sizes,
    "siglip_vision_model": clip_sizes,
    "timm_wrapper": timm_convnext_sizes,
}


def resized_encoder(config: PreTrainedConfig, shapes: Shapes) -> PreTrainedConfig:
    """The encoder's config with the sizes of these tensors; as it is where they do not tell or are incomplete."""
    sizes = ENCODER_SIZES.get(config.model_type)
    if sizes is None or not shapes:
        return config
    try:
        found = sizes(config, shapes)
    except KeyError:  # the missing tensor is named by the comparison with the model
        return config
    if all(same(getattr(config, name), value) for name, value in found.items()):
        return config
    entries = config.to_diff_dict()
    return type(config)(**{k: v for k, v in entries.items() if k not in (*FOLLOWS_FROM_DEPTH, *found)}, **found)


def same(first, second) -> bool:
    """Whether two sizes agree, a list and a tuple of equal numbers among them."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return list(first) == list(second)
    return first == second


def tensors_below(prefix: str, tensors: Shapes) -> Shapes:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
