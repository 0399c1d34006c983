"""Checkpoints with the tensor names and shapes of released multi-encoder models, at the width of the tiny presets."""

import torch
from torch import Tensor
from transformers import LlamaConfig

WIDTH, MLP, BLOCKS, HEAD = 32, 64, 4, 16
DIMS, DEPTHS = [32, 32, 64, 64], [1, 1, 1, 1]
TEXT = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)
Shapes = dict[str, tuple[int, ...]]


def below(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def clip(side: int = 4, width: int = WIDTH, mlp: int = MLP) -> Shapes:
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, 14, 14),
        "embeddings.position_embedding.weight": (side**2 + 1, width),
        **norm("pre_layrnorm", width),
        **norm("post_layernorm", width),
    }
    for block in range(BLOCKS):
        layer = f"encoder.layers.{block}"
        for part in "qkv":
            shapes |= linear(f"{layer}.self_attn.{part}_proj", width, width)
        shapes |= linear(f"{layer}.self_attn.out_proj", width, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", mlp, width) | linear(f"{layer}.mlp.fc2", width, mlp)
    return below("vision_model.", shapes)


def convnext(scale: str = "weight", stem: str = "stem", stages: str = "stages", head: bool = False) -> Shapes:
    shapes = {f"{stem}.0.weight": (DIMS[0], 3, 4, 4), f"{stem}.0.bias": (DIMS[0],), **norm(f"{stem}.1", DIMS[0])}
    for stage, (width, depth) in enumerate(zip(DIMS, DEPTHS, strict=True)):
        if stage:
            before = f"{stages}.{stage}.downsample"
            shapes |= norm(f"{before}.0", DIMS[stage - 1])
            shapes |= {f"{before}.1.weight": (width, DIMS[stage - 1], 2, 2), f"{before}.1.bias": (width,)}
        for number in range(depth):
            block = f"{stages}.{stage}.blocks.{number}"
            shapes |= {f"{block}.{scale}": (width,), f"{block}.conv_dw.weight": (width, 1, 7, 7)}
            shapes |= {f"{block}.conv_dw.bias": (width,), **norm(f"{block}.norm", width)}
            shapes |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    return shapes | (norm("head.norm", DIMS[-1]) if head else {})


def sam(whole_neck: bool, grid: int = 8, window: int = 4, channels: int = 32) -> Shapes:
    shapes = {
        "pos_embed": (1, grid, grid, WIDTH),
        "patch_embed.projection.weight": (WIDTH, 3, 16, 16),
        "patch_embed.projection.bias": (WIDTH,),
        "neck.conv1.weight": (channels, WIDTH, 1, 1),
        **norm("neck.layer_norm1", channels),
    }
    if whole_neck:
        shapes |= {"neck.conv2.weight": (channels, channels, 3, 3), **norm("neck.layer_norm2", channels)}
    for block in range(BLOCKS):
        layer, rows = f"layers.{block}", 2 * (grid if block in (1, 3) else window) - 1
        shapes |= norm(f"{layer}.layer_norm1", WIDTH) | norm(f"{layer}.layer_norm2", WIDTH)
        shapes |= {f"{layer}.attn.rel_pos_h": (rows, HEAD), f"{layer}.attn.rel_pos_w": (rows, HEAD)}
        shapes |= linear(f"{layer}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.mlp.lin1", MLP, WIDTH) | linear(f"{layer}.mlp.lin2", WIDTH, MLP)
    return shapes


def eva02_det(side: int = 4, mlp: int = 85) -> Shapes:
    shapes = {
        "pos_embed": (1, side**2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
    }
    tables = {"rope_win.freqs_cos": (16, HEAD), "rope_win.freqs_sin": (16, HEAD)}
    tables |= {"rope_glb.freqs_cos": (64, HEAD), "rope_glb.freqs_sin": (64, HEAD)}
    for block in range(BLOCKS):
        layer = f"blocks.{block}"
        shapes |= norm(f"{layer}.norm1", WIDTH) | norm(f"{layer}.norm2", WIDTH)
        for part in "qkv":
            shapes |= linear(f"{layer}.attn.{part}_proj", WIDTH, WIDTH, bias=False)
        shapes |= {f"{layer}.attn.q_bias": (WIDTH,), f"{layer}.attn.v_bias": (WIDTH,)}
        shapes |= linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.mlp.w1", mlp, WIDTH) | linear(f"{layer}.mlp.w2", mlp, WIDTH)
        shapes |= norm(f"{layer}.mlp.ffn_ln", mlp) | linear(f"{layer}.mlp.w3", WIDTH, mlp)
        shapes |= {f"{layer}.attn.rope.freqs_cos": (16, HEAD), f"{layer}.attn.rope.freqs_sin": (16, HEAD)}
    return shapes | tables


def pix2struct(rows: int = 64) -> Shapes:
    shapes = {
        **linear("embeddings.patch_projection", WIDTH, 768),
        "embeddings.row_embedder.weight": (rows, WIDTH),
        "embeddings.column_embedder.weight": (rows, WIDTH),
        "layernorm.weight": (WIDTH,),
    }
    for block in range(BLOCKS):
        layer = f"encoder.layer.{block}"
        for part in ("query", "key", "value", "output"):
            shapes |= linear(f"{layer}.attention.{part}", WIDTH, WIDTH, bias=False)
        shapes |= linear(f"{layer}.mlp.wi_0", MLP, WIDTH, bias=False)
        shapes |= linear(f"{layer}.mlp.wi_1", MLP, WIDTH, bias=False) | linear(
            f"{layer}.mlp.wo", WIDTH, MLP, bias=False
        )
        for name in ("pre_mlp_layer_norm", "pre_attention_layer_norm"):
            shapes |= norm(f"{layer}.{name}", WIDTH, bias=False)
    return shapes


def intern_vit(side: int = 4) -> Shapes:
    shapes = {
        "embeddings.class_embedding": (1, 1, WIDTH),
        "embeddings.position_embedding": (1, side**2 + 1, WIDTH),
        "embeddings.patch_embedding.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embedding.bias": (WIDTH,),
    }
    for block in range(BLOCKS):
        layer = f"encoder.layers.{block}"
        shapes |= norm(f"{layer}.norm1", WIDTH) | norm(f"{layer}.norm2", WIDTH)
        shapes |= {f"{layer}.ls1": (WIDTH,), f"{layer}.ls2": (WIDTH,)}
        shapes |= linear(f"{layer}.attn.qkv", 3 * WIDTH, WIDTH) | linear(f"{layer}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.mlp.fc1", MLP, WIDTH) | linear(f"{layer}.mlp.fc2", WIDTH, MLP)
    return shapes


def llama(config: LlamaConfig = TEXT) -> Shapes:
    """LLaVA's layout; older checkpoints hold the rotary frequencies of every layer."""
    width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    shapes = {"embed_tokens.weight": (config.vocab_size, width), "norm.weight": (width,)}
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        for part, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            shapes |= linear(f"{layer}.self_attn.{part}_proj", rows, width, bias=False)
        shapes |= {f"{layer}.self_attn.rotary_emb.inv_freq": (config.head_dim // 2,)}
        for part in ("gate", "up"):
            shapes |= linear(f"{layer}.mlp.{part}_proj", config.intermediate_size, width, bias=False)
        shapes |= linear(f"{layer}.mlp.down_proj", width, config.intermediate_size, bias=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= norm(f"{layer}.{name}", width, bias=False)
    return below("model.", shapes) | linear("lm_head", config.vocab_size, width, bias=False)


def intern_lm2(config: LlamaConfig = TEXT) -> Shapes:
    width, groups = config.hidden_size, config.num_attention_heads + 2 * config.num_key_value_heads
    shapes = {"model.tok_embeddings.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes |= linear(f"{layer}.attention.wqkv", groups * config.head_dim, width, bias=False)
        shapes |= linear(f"{layer}.attention.wo", width, width, bias=False)
        shapes |= linear(f"{layer}.feed_forward.w1", config.intermediate_size, width, bias=False)
        shapes |= linear(f"{layer}.feed_forward.w3", config.intermediate_size, width, bias=False)
        shapes |= linear(f"{layer}.feed_forward.w2", width, config.intermediate_size, bias=False)
        shapes |= norm(f"{layer}.attention_norm", width, bias=False) | norm(f"{layer}.ffn_norm", width, bias=False)
    return below("language_model.", shapes | linear("output", config.vocab_size, width, bias=False))


def mlp_projector(channels: int, width: int = TEXT.hidden_size) -> Shapes:
    name = "model.mm_projector"
    return linear(f"{name}.0", width, channels) | linear(f"{name}.2", width, width)


def llava_hr(clip_width: int = WIDTH, side: int = 4) -> Shapes:
    width, slow, tower = clip_width, DIMS[-1], "model.vision_tower"
    shapes = below(f"{tower}.fast_vision_tower.vision_tower.", clip(side, clip_width))
    shapes |= below(f"{tower}.slow_vision_tower.vision_tower.", convnext(head=True))
    for index in range(3):
        adapter = f"{tower}.align_stages_latent.{index}"
        shapes |= {f"{adapter}.slow_conv.weight": (slow, slow, 1, 1), f"{adapter}.slow_conv.bias": (slow,)}
        shapes |= {f"{adapter}.slow_proj.weight": (width, slow, 1, 1), f"{adapter}.slow_proj.bias": (width,)}
        shapes |= {f"{adapter}.fast_conv.weight": (width, 1, 7, 7), f"{adapter}.fast_conv.bias": (width,)}
        shapes |= {f"{adapter}.fast_proj.weight": (width, width, 1, 1), f"{adapter}.fast_proj.bias": (width,)}
        shapes |= linear(f"{adapter}.gate.0", width // 2, 2 * width) | linear(f"{adapter}.gate.2", 1, width // 2)
    shapes |= linear(f"{tower}.align_stages.0.fast_proj", width, width)
    shapes |= linear(f"{tower}.align_stages.0.slow_proj", width, slow)
    return shapes | mlp_projector(width) | llama()


def mini_gemini(scale: str = "gamma") -> Shapes:
    shapes = below("model.vision_tower.vision_tower.", clip())
    shapes |= below("model.vision_tower_aux.", convnext(scale, "vision_stem", "vision_stages"))
    for name, channels in (("query", WIDTH), ("aux", sum(DIMS)), ("val", sum(DIMS))):
        projector = f"model.vlm_uni_{name}_projector"
        shapes |= norm(f"{projector}.0", channels) | linear(f"{projector}.1", WIDTH, channels)
    return shapes | mlp_projector(WIDTH) | llama()


def eagle(with_sam: bool) -> Shapes:
    towers = [clip(), convnext(), sam(whole_neck=False), eva02_det(), pix2struct()]
    towers = [tower for index, tower in enumerate(towers) if with_sam or index != 2]
    shapes = {}
    for index, tower in enumerate(towers):
        shapes |= below(f"model.vision_tower.vision_towers.{index}.vision_tower.", tower)
    channels = WIDTH + DIMS[-1] + (4 * 32 if with_sam else 0) + 2 * WIDTH
    return shapes | mlp_projector(channels) | llama()


def leo() -> Shapes:
    width = TEXT.hidden_size
    shapes = below("vision_model_1.", intern_vit()) | below("vision_model_2.", sam(whole_neck=True))
    for name, channels in (("mlp1", 4 * WIDTH), ("mlp2", 16 * 32)):
        shapes |= norm(f"{name}.0", channels) | linear(f"{name}.1", width, channels) | linear(f"{name}.3", width, width)
    return shapes | intern_lm2()


def internvl() -> Shapes:
    width, channels = TEXT.hidden_size, 4 * WIDTH
    projector = norm("mlp1.0", channels) | linear("mlp1.1", width, channels) | linear("mlp1.3", width, width)
    return below("vision_model.", intern_vit()) | projector | intern_lm2()


def cambrian(depth: int = 1, inside: int = 1) -> Shapes:
    """The connector: the encoders are frozen and not saved; two samplers between the layers of the language model."""
    width, text = WIDTH, TEXT.hidden_size
    shapes = {"model.vision_query": (1, width), "model.image_newline": (text,)}
    for index, channels in enumerate((WIDTH, WIDTH, WIDTH, sum(DIMS))):
        name = f"model.mm_projector_aux_{index}"
        shapes |= linear(f"{name}.0", width, channels) | linear(f"{name}.2", width, width) | norm(f"{name}.3", width)
    samplers = [(f"model.vision_sampler_0.layers.{index}", width) for index in range(depth)]
    samplers += [(f"model.vision_sampler_layers.{index}.layers.0", text) for index in range(inside)]
    for layer, query in samplers:
        shapes |= linear(f"{layer}.proj_context", width, width, bias=False)
        shapes |= linear(f"{layer}.proj_in", width, query + width, bias=False)
        for name in ("q_proj", *(f"{part}_proj_{tower}" for part in "kv" for tower in range(4))):
            shapes |= norm(f"{layer}.cross_attn.{name}.0", width)
            shapes |= linear(f"{layer}.cross_attn.{name}.1", width, width, bias=False)
        shapes |= linear(f"{layer}.cross_attn.o_proj", width, width, bias=False)
        shapes |= {f"{layer}.pos_embed_3": (16, width), **norm(f"{layer}.norm", width)}
        shapes |= linear(f"{layer}.proj_out.linear_1", width, width, bias=False)
        shapes |= linear(f"{layer}.proj_out.linear_2", query, width, bias=False)
    return shapes | mlp_projector(width) | llama()


OFFICIAL = {
    "cambrian": cambrian,
    "eagle-x4": lambda: eagle(with_sam=False),
    "eagle-x5": lambda: eagle(with_sam=True),
    "internvl": internvl,
    "leo": leo,
    "llava-hr": llava_hr,
    "mgm": mini_gemini,
    "mgm-hd": mini_gemini,
}


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values that all show in an output; those of norms are near one."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: ((1.0 if len(shape) == 1 else 0.0) + 0.2 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


def official_checkpoint(preset: str) -> dict[str, Tensor]:
    return random_tensors(OFFICIAL[preset]())
