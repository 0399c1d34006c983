"""Config of the specialised ViT: which layers own separate [CLS] weights, and how the host ViT is built."""

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.reductions import as_pair

BLOCK_FIELDS = ("norm_blocks", "qkv_blocks", "proj_blocks", "mlp_blocks")
CHOICES = {
    "drop_path_decay": ("uniform", "linear"),
    "position_embedding_type": ("learned", "rotary", "none"),
    "position_interpolation": ("bicubic", "bicubic_antialias"),
    "relative_position_bias": (None, "per_layer", "shared"),
    "final_norm": ("tokens", "pooled"),
    "pooling": ("cls", "mean"),
    "classifier_input": ("cls", "cls_mean", "mean", "pooled", "cls_distilled"),
    "register_role": ("patch", "cls"),
    "attention_bias": (False, "kv"),
    "cls_init": ("independent", "equal"),
}

COLUMNS, ROWS = "colwise", "rowwise"  # tensor parallelism: a process owns some outputs, or some inputs, of a Linear
PARALLEL_LINEARS = {
    **{f"attention.{part}_proj{twin}": COLUMNS for part in "qkv" for twin in ("", "_cls", "_cls_up")},
    **{f"attention.o_proj{twin}": ROWS for twin in ("", "_cls", "_cls_down")},
    **{f"mlp.{name}{twin}": COLUMNS for name in ("fc1", "gate_proj", "up_proj") for twin in ("", "_cls", "_cls_up")},
    **{f"mlp.{name}{twin}": ROWS for name in ("fc2", "down_proj") for twin in ("", "_cls", "_cls_down")},
}


def resolve_blocks(name: str, blocks: str | int | list[int] | tuple[int, ...], num_layers: int) -> list[int]:
    """Explicit, sorted block indices of "all", "first_third", "none", an int k (the first k blocks) or a list.

    "first_third" of 12 / 24 / 40 blocks are the first 4 / 8 / 13 (rounded down).
    """
    named = {"all": num_layers, "first_third": num_layers // 3, "none": 0}
    if isinstance(blocks, str):
        if blocks not in named:
            raise ValueError(
                f"{name} must be one of {sorted(named)}, a number of blocks or a list; got {blocks!r:.100}"
            )
        blocks = named[blocks]
    if isinstance(blocks, int):
        if not 0 <= blocks <= num_layers:
            raise ValueError(f"{name}={blocks} asks for more blocks than the {num_layers} there are")
        return list(range(blocks))
    outside = [index for index in blocks if not 0 <= index < num_layers]
    if outside:
        raise ValueError(f"{name} has the block indices {outside}, expected 0 to {num_layers - 1}")
    return sorted(set(blocks))


@strict
class SpecializedViTConfig(BackboneConfigMixin, VitweaveConfig):
    """A ViT whose [CLS] and patch tokens own separate norms and early QKV projections (arXiv:2602.08626).

    The block lists (`norm_blocks`, `qkv_blocks`, `proj_blocks`, `mlp_blocks`) take "all", "first_third", "none", a
    number k (the first k blocks) or explicit indices from 0. They are resolved once, when the config is made or the
    field is assigned, so a checkpoint keeps its meaning; what was asked for stays readable in `requested_blocks`.

    Specialisation:
        specialize_norm: both LayerNorms of the blocks in `norm_blocks`.
        specialize_layer_scale: their LayerScales too (ignored without LayerScale).
        specialize_final_norm: the norm after the last block.
        qkv_parts: which of q, k, v are specialised in `qkv_blocks`, e.g. "kv".
        proj_blocks, mlp_blocks: attention output projection and all linears of the MLP.
        register_role: whose weights the registers use, "patch" or "cls".
        num_cls_tokens: class-like tokens at the start; 2 for a distilled DeiT.
        attention_bias: "kv" adds one learnt key and value per head, seen by every query (arXiv:2402.17762).
        attention_bias_init: standard deviation of that key and value at the start.
        cls_rank, cls_alpha: 0 = full [CLS] weights; r > 0 = the shared weights plus a rank-r update scaled by
            alpha / r on the [CLS] rows, for the linear layers (the norms stay full).
        cls_rank_fused: q, k and v share the down-projection, as in the low-rank update of one fused qkv matrix.
        cls_init: from scratch, linear weights of the two roles are drawn "independent" or start "equal".
        class_attention_layers: CaiT's alternative (arXiv:2103.17239) for comparison: the blocks see no class token, and
            this many class-attention layers update it afterwards. Nothing can be specialised then.
        class_attention_scale: start value of their LayerScale.

    The host:
        host_config: the vanilla config this model was converted from, for `to_vanilla`; None = trained from scratch.
        hidden_act: activation of the MLP; None = "gelu", or "silu" in a SwiGLU.
        freeze_position_embeddings: the position table is not trained (MAE).
        intermediate_size: width of the MLP; None = hidden_size * mlp_ratio (SwiGLU: 2/3 of it, rounded up to 8).
        layerscale_value: start value, None = no LayerScale.
        position_embedding_type: "learned" table, "rotary" on the patches (DINOv3), or "none".
        position_interpolation: how the table is resampled to another grid; antialiased for DINOv2 with registers.
        position_for_cls: the table has entries for the class tokens (DeiT-III's covers patches only).
        pos_embed_shift, pos_embed_jitter, pos_embed_rescale: DINOv3's random change of coordinates in training.
        relative_position_bias: BEiT's, one table "per_layer" or one "shared".
        pre_norm: a norm before block 0 (CLIP).
        final_norm: applied to the "tokens" or to the "pooled" vector alone (CLIP, mean-pooled BEiT).
        pooling: "cls" or the "mean" of the patches; use_pooler adds a dense layer and `pooler_act` (ViT).
        classifier_input: what the classifier reads: "cls", "cls_mean" ([CLS] and patch mean, DINOv2), "mean", "pooled",
            or "cls_distilled" (the mean of two classifiers on the two class tokens, distilled DeiT).
        apply_layernorm, reshape_hidden_states: as in transformers' backbones: final norm on every map; maps
            (batch, hidden, height, width) or sequences (batch, tokens, hidden) that keep the prefix tokens.
    """

    model_type = "specialized_vit"
    # a model drops the rules of layers that it does not have
    base_model_tp_plan = {
        f"encoder.{stage}.*.{name}": style
        for stage in ("layer", "class_layer")
        for name, style in PARALLEL_LINEARS.items()
    }

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    mlp_ratio: float | int = 4
    use_swiglu_ffn: bool = False
    mlp_bias: bool = True
    hidden_act: str | None = None
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    drop_path_decay: str = "uniform"
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    num_channels: int = 3
    patch_bias: bool = True
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    proj_bias: bool = True
    layerscale_value: float | int | None = 1.0
    position_embedding_type: str = "learned"
    position_interpolation: str = "bicubic"
    position_for_cls: bool = True
    freeze_position_embeddings: bool = False
    rope_theta: float | int = 100.0
    pos_embed_shift: float | int | None = None
    pos_embed_jitter: float | int | None = None
    pos_embed_rescale: float | int | None = None
    relative_position_bias: str | None = None
    use_mask_token: bool = True
    num_cls_tokens: int = 1
    num_register_tokens: int = 0
    pre_norm: bool = False
    final_norm: str = "tokens"
    pooling: str = "cls"
    use_pooler: bool = False
    pooler_act: str = "tanh"
    pooler_output_size: int | None = None
    classifier_input: str = "cls"

    host_config: dict | None = None

    class_attention_layers: int = 0
    class_attention_scale: float | int = 1e-5
    specialize_norm: bool = True
    specialize_layer_scale: bool = True
    specialize_final_norm: bool = False
    norm_blocks: str | int | list[int] | tuple[int, ...] = "all"
    qkv_blocks: str | int | list[int] | tuple[int, ...] = "first_third"
    qkv_parts: str = "qkv"
    proj_blocks: str | int | list[int] | tuple[int, ...] = "none"
    mlp_blocks: str | int | list[int] | tuple[int, ...] = "none"
    requested_blocks: dict | None = None
    register_role: str = "patch"
    attention_bias: bool | str = False
    attention_bias_init: float | int = 0.02
    cls_rank: int = 0
    cls_alpha: float | int | None = None
    cls_rank_fused: bool = False
    cls_init: str = "independent"

    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __setattr__(self, name, value):
        if name in BLOCK_FIELDS:
            self.__dict__.setdefault("_requested", {})[name] = value
            if isinstance(value, str) and self.class_attention_layers:
                value = "none"  # the blocks see no class token
            value = resolve_blocks(name, value, self.num_hidden_layers)
        super().__setattr__(name, value)

    def __post_init__(self, **extra):
        chosen = {key: extra.pop(key, None) for key in ("out_features", "out_indices")}
        extra.pop("stage_names", None)  # always follows num_hidden_layers
        requested = self.__dict__.pop("_requested", {})
        if self.requested_blocks is None:
            self.requested_blocks = {k: list(v) if isinstance(v, tuple) else v for k, v in requested.items()}
        self.stage_names = ["stem", *(f"stage{index + 1}" for index in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(**chosen)
        super().__post_init__(**extra)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first patch: class tokens and registers."""
        return self.num_cls_tokens + self.num_register_tokens

    @property
    def num_cls_rows(self) -> int:
        """Leading rows of the sequence that use the [CLS] weights."""
        return self.num_cls_tokens + (self.num_register_tokens if self.register_role == "cls" else 0)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def image_grid(self) -> tuple[int, int]:
        """Patches per column and row at `image_size`."""
        height, width = as_pair(self.image_size)
        patch_height, patch_width = as_pair(self.patch_size)
        return height // patch_height, width // patch_width

    def validate_choices(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}")
        if not self.qkv_parts or set(self.qkv_parts) - set("qkv"):
            raise ValueError(f"qkv_parts must be made of the letters q, k, v; got {self.qkv_parts!r}")

    def validate_sizes(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.position_embedding_type == "rotary" and (self.hidden_size // self.num_attention_heads) % 4:
            raise ValueError("rotary positions need a head size (hidden_size / num_attention_heads) that 4 divides")

    def validate_specialization(self):
        if self.num_cls_tokens < 1:
            raise ValueError("num_cls_tokens must be at least 1: without a class token there is nothing to specialise")
        linears = [*self.qkv_blocks, *self.proj_blocks, *self.mlp_blocks]
        if self.cls_rank and not linears:
            raise ValueError(
                f"cls_rank={self.cls_rank} acts on linear layers, but qkv_blocks, proj_blocks and mlp_blocks are empty;"
                " norms have no low-rank form"
            )
        if self.cls_rank < 0:
            raise ValueError(f"cls_rank must be 0 (full weights) or positive, got {self.cls_rank}")
        if self.class_attention_layers and (linears or self.norm_blocks):
            raise ValueError(
                "with class_attention_layers the blocks see no class token, so norm_blocks, qkv_blocks, proj_blocks and"
                " mlp_blocks must be 'none'"
            )
        if self.relative_position_bias and self.num_prefix_tokens != 1:
            raise ValueError(
                "relative_position_bias knows one class token and no registers,"
                f" got {self.num_prefix_tokens} prefix tokens"
            )
        if self.classifier_input == "cls_distilled" and self.num_cls_tokens != 2:
            raise ValueError(f"classifier_input='cls_distilled' needs num_cls_tokens=2, got {self.num_cls_tokens}")
