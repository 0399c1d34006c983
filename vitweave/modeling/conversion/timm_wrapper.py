"""timm's VisionTransformer in transformers' TimmWrapper: ViT, DeiT, DeiT-III (arXiv:2204.07118), CLIP, DINOv2."""

from torch import nn
from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import HostFamily

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}


def check_supported(vit: nn.Module):
    """Refuse timm models that are no plain ViT with one class token, by the first thing that is different."""
    if type(vit).__name__ != "VisionTransformer":
        raise ValueError(
            f"this timm model is a {type(vit).__name__}; of timm, only VisionTransformer can be specialised (ViT, DeiT,"
            " DeiT-III, CLIP, DINOv2)"
        )
    block = vit.blocks[0]
    if type(block).__name__ != "Block":
        raise ValueError(f"this timm VisionTransformer has blocks of type {type(block).__name__}, expected Block")
    obstacles = {
        "no class token": not vit.has_class_token,
        f"an MLP of type {type(block.mlp).__name__}": type(block.mlp).__name__ not in ("Mlp", "GluMlp"),
        "a gate that comes last in its MLP": getattr(block.mlp, "gate_last", False),
        "norms on queries and keys": has_weights(block.attn.q_norm),
        "norms inside of its attention": has_weights(getattr(block.attn, "norm", None)),
        "gated attention": getattr(block.attn, "gate", None) is not None,
        "a norm in its patch embedding": has_weights(vit.patch_embed.norm),
        "norms of another type than LayerNorm": not isinstance(block.norm1, nn.LayerNorm),
        f"pooling {vit.global_pool!r}": vit.global_pool not in ("token", "avg") or vit.pool_include_prefix,
        "a norm before and none after pooling": vit.global_pool == "token" and has_weights(vit.fc_norm),
        "no final norm": not (has_weights(vit.norm) or has_weights(vit.fc_norm)),
        "position embeddings for its registers": bool(vit.num_reg_tokens) and not vit.no_embed_class,
    }
    found = [what for what, there in obstacles.items() if there]
    if found:
        raise ValueError(f"this timm VisionTransformer cannot be specialised: it has {', '.join(found)}")


def has_weights(module: nn.Module | None) -> bool:
    """Whether a module that may be an Identity owns parameters."""
    return module is not None and any(True for _ in module.parameters())


def timm_options(model: PreTrainedModel) -> dict:
    """Facts of a timm VisionTransformer, read from its modules: the wrapper's config names the architecture only."""
    vit = model.timm_model
    check_supported(vit)
    block, gated = vit.blocks[0], type(vit.blocks[0].mlp).__name__ == "GluMlp"
    activation = type(block.mlp.act).__name__
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation} in a timm model; known: {sorted(ACTIVATIONS)}")
    pooled_norm, token_pool = has_weights(vit.fc_norm), vit.global_pool == "token"
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc2.in_features,
        "use_swiglu_ffn": gated,
        "hidden_act": ACTIVATIONS[activation],
        "hidden_dropout_prob": block.attn.proj_drop.p,
        "attention_probs_dropout_prob": block.attn.attn_drop.p,
        "drop_path_rate": getattr(vit.blocks[-1].drop_path1, "drop_prob", 0.0) or 0.0,
        "drop_path_decay": "linear",
        "layer_norm_eps": block.norm1.eps,
        "image_size": list(vit.patch_embed.img_size),
        "patch_size": list(vit.patch_embed.patch_size),
        "num_channels": vit.patch_embed.proj.in_channels,
        "patch_bias": vit.patch_embed.proj.bias is not None,
        **dict.fromkeys(("query_bias", "key_bias", "value_bias"), block.attn.qkv.bias is not None),
        "proj_bias": block.attn.proj.bias is not None,
        "mlp_bias": block.mlp.fc1.bias is not None,
        "layerscale_value": getattr(block.ls1, "init_values", None),
        "position_embedding_type": "none" if vit.pos_embed is None else "learned",
        "position_interpolation": "bicubic_antialias",
        "position_for_cls": not vit.no_embed_class,
        "use_mask_token": False,
        "num_register_tokens": vit.num_reg_tokens,
        "pre_norm": has_weights(vit.norm_pre),
        "final_norm": "pooled" if pooled_norm else "tokens",
        "pooling": "cls" if token_pool else "mean",
        "classifier_input": "cls" if token_pool else "pooled",
        "apply_layernorm": not pooled_norm,
    }


def renames(gated: bool) -> tuple[tuple[str, str], ...]:
    """Names of the plain or of the gated MLP, whose first linear is fused."""
    plain = ((r"\.mlp\.fc1\.(\w+)$", r".mlp.{gate_proj,up_proj}.\1"), (r"\.mlp\.fc2\.", ".mlp.down_proj."))
    return (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm_pre\.", "pre_layernorm."),
        (r"^(fc_)?norm\.", "layernorm."),
        (r"^head\.", "classifier."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.qkv\.(\w+)$", r".attention.{q_proj,k_proj,v_proj}.\1"),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
        *(plain if gated else ()),
    )


TIMM, TIMM_GATED = (
    HostFamily(
        options=timm_options,
        renames=renames(gated),
        prefixes=("timm_model.",),
        base_class="TimmWrapperModel",
        classifiers=dict.fromkeys(("cls", "pooled"), "TimmWrapperForImageClassification"),
    )
    for gated in (False, True)
)
