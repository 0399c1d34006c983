"""DINOv3's ViTs (arXiv:2508.10104): rotary positions, registers, no key bias."""

from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import SHAPE_FACTS, HostFamily, take


def dinov3_options(model: PreTrainedModel) -> dict:
    """Facts of a DINOv3 ViT."""
    config = model.config
    return {
        **take(config, *SHAPE_FACTS, "intermediate_size", "mlp_bias", "layerscale_value", "drop_path_rate"),
        **take(config, "query_bias", "key_bias", "value_bias", "proj_bias", "num_register_tokens", "rope_theta"),
        **take(config, "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
        **take(config, "apply_layernorm", "reshape_hidden_states"),
        "attention_probs_dropout_prob": config.attention_dropout,
        "use_swiglu_ffn": config.use_gated_mlp,
        "position_embedding_type": "rotary",
    }


def renames(gated: bool) -> tuple[tuple[str, str], ...]:
    """Names of the plain or of the gated MLP; both call their linears up_proj and down_proj."""
    plain = () if gated else ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
    return (
        (r"^(model\.)?layer\.", "encoder.layer."),
        (r"^norm\.", "layernorm."),
        (r"^embeddings\.patch_embeddings\.(\w+)$", r"embeddings.patch_embeddings.projection.\1"),
        *plain,
    )


DINOV3, DINOV3_GATED = (
    HostFamily(
        options=dinov3_options,
        renames=renames(gated),
        prefixes=(),
        base_class="DINOv3ViTModel",
        backbones=("DINOv3ViTBackbone",),
    )
    for gated in (False, True)
)
