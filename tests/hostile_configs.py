"""Malformed configs of every class of ours, drawn from a seed: case n of a seed is always the same."""

import copy
import random
from dataclasses import fields

from vitweave.auto import FAMILIES

PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VIT = {"model_type": "vit", **PLAIN, "intermediate_size": 48}
OURS = {"model_type": "specialized_vit", **PLAIN, "num_register_tokens": 2}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
SWIN = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
SWIN |= {"image_size": 32, "patch_size": 4}
MIT = {"model_type": "segformer", "hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2]}
MIT |= {"sr_ratios": [2, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
FUSED = {"model_type": "layer_fusion_vision", "encoder_config": OURS, "layers": [1, 2], "fusion_type": "concat"}
TOWER = {"model_type": "multi_encoder_vision", "encoder_configs": [VIT, CONVNEXT], "image_size": 32}
TOWER |= {"encoder_options": [{}, {"image_size": 64, "layer": 3}]}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}

BASES = {
    "specialized_vit": [OURS, {**PLAIN, "num_cls_tokens": 2, "pooling": "mean"}],
    "eva02_det_vit": [{**PLAIN, "pretrain_image_size": 32, "window_size": 2, "window_blocks": [0]}],
    "layer_fusion_vision": [
        FUSED,
        {**FUSED, "encoder_config": VIT, "fusion_type": "fpn", "fusion_options": {"out_channels": 16}},
        {**FUSED, "fusion_type": "recurrent", "fusion_options": {}},
    ],
    "multi_encoder_vision": [
        TOWER,
        {**TOWER, "fusion_type": "spatial_vision_aggregator", "fusion_options": {"vision_hidden_size": 32, "depth": 1}},
        {**TOWER, "fusion_type": "query_former", "fusion_options": {"queries_per_encoder": 2, "width": 32}},
        {**TOWER, "fusion_type": "deformable", "fusion_options": {"num_heads": 2, "num_points": 2}},
    ],
    "modality_fusion_vision": [
        {"stream_config": MIT, "decoder_hidden_size": 16},
        {"stream_config": SWIN, "decoder_hidden_size": 16, "fusion_type": "rectify_fuse"},
        {"stream_config": VIT, "decoder_hidden_size": 16, "modalities": ["rgb", "depth", "thermal"]},
    ],
    "multi_encoder_vlm": [{"vision_config": TOWER, "text_config": LLAMA, "image_token_id": 4}],
    "image_text_retriever": [
        {"vision_config": FUSED, "text_config": BERT, "projection_dim": 16},
        {"vision_config": VIT, "text_config": BERT, "projection_dim": 16, "local_loss_weight": 1.0},
    ],
    "dense_predictor": [
        {"backbone_config": OURS},
        {"backbone_config": {**VIT, "out_indices": [1, 2]}, "head_type": "dpt", "head_options": {"fusion_size": 16}},
    ],
}
HUGE = (10**9, 2**31, 2**63, 10**18, 10**400, -(10**9), 65537, 1e308)
NUMBERS = (0, -1, 1, 2, 3, 7, 0.5, -0.5, True, float("nan"), float("inf"), float("-inf"), *HUGE)
STRINGS = ("", "garbage", "\x00", "../../etc/passwd", "a" * 5000, "kernels-community/flash-attn", "None", "\ud800")
MODEL_TYPES = ("bert", "clip", "timm_wrapper", "timm_backbone", "dpt", "rag", "upernet", "encoder-decoder", "whisper")
HOSTILE = {  # entries that should change nothing, or be refused
    "auto_map": [{"AutoModel": "evil/repo--evil.Evil", "AutoBackbone": "evil.Evil", "AutoConfig": "evil.Evil"}, 5, "x"],
    "_attn_implementation": ["kernels-community/flash-attn", "evil/kernel", "flash_attention_2", {"": "evil/kernel"}],
    "attn_implementation": ["evil/kernel@main:attention", 5, {"encoder_config": "evil/kernel"}],
    "_attn_implementation_internal": ["evil/kernel"],
    "experts_implementation": ["evil/kernel"],
    "custom_pipelines": [{"x": {"impl": "evil.Evil", "pt": ["AutoModel"]}}],
    "backbone": ["../..", "evil/repo", 5],
    "use_pretrained_backbone": [True],
    "architecture": ["hf_hub:evil/repo", "local-dir:/tmp"],
    "model_args": [{"checkpoint_path": "../../evil.bin"}, {"pretrained": True}],
    "_name_or_path": ["../../evil", "evil/repo", 5],
    "quantization_config": [5, {"quant_method": "evil"}],
    "per_layer_config": [5, {"0": {"hidden_size": 8}}, [1]],
    "dtype": ["load", "float32", "torch.load", 5],
    "torch_dtype": ["hub", "bfloat16"],
    "attribute_map": [5, {"hidden_size": "evil"}],
    "sub_configs": [{}, 5],
    "__class__": ["x"],
    "__dict__": [{}],
    "to_dict": [1],
    "save_pretrained": ["x"],
    "__validators__": [{}],
    "stage_names": [["a"] * 3, 5],
    "out_indices": [[99], [-1], "x", 5, [10**9]],
    "out_features": [["stage99"], "x", 5],
    "id2label": [{"a": "b"}, {str(n): "x" for n in range(400_000)}, 5, {"0": None}],
    "num_labels": [10**9, -1, "many", 0, 1.5],
    "architectures": [5, ["Evil"]],
    "problem_type": ["evil"],
    "chunk_size_feed_forward": [-1, 10**9],
    "hidden_act": ["garbage", 5],
    "no_such_option": [1],
    "layer_types": [["garbage"], 5],
    "rope_parameters": [5, {"rope_type": "evil"}],
}
OPTIONS = {
    "fusion_type": ["garbage", "", 5, None, "concat", "aspp", "graph", "add", "mixture_of_resolution", "gemini"],
    "fusion_options": [
        {"depth": 10**9},
        {"num_heads": 0},
        {"rates": "x"},
        {"no_such": 1},
        {"grid": 10**9},
        {"crops": 10**6},
    ],
    "layers": ["quarters", "garbage", [], [99], [-99], [1, 1], ["a"], [1.5], 10**9, [10**9]],
    "head_type": ["garbage", "regression", "mlp", "subpixel"],
    "head_options": [{"bins": 10**9}, {"num_bins": 10**9}, {"no_such": 1}, 5],
    "losses": [{"garbage": 1.0}, {"cross_entropy": -1.0}, {"cross_entropy": float("nan")}, {}, {"dice": 10**400}],
    "loss_options": [{"garbage": {}}, {"cross_entropy": 5}, {"cross_entropy": {"x": 1}}],
    "class_weights": [[1.0] * 300_000, [float("nan")] * 2, [], ["x"]],
    "modalities": [[], ["rgb", "rgb"], ["m"] * 10_000, [f"m{n}" for n in range(10_000)], "rgb", [5]],
    "tile_levels": [[10**9], [0], [], [1] * 100_000, ["x"], [-4]],
    "projector_type": ["mlp999999999x_gelu", "mlp0x_gelu", "mlp" + "9" * 5000 + "x_gelu", "garbage", "identity"],
    "projector_options": [{"no_such": 1}, 5],
    "fusion_blocks": [10**9, -1, [1], [10**9] * 4, "x"],
    "stage_layers": [[10**9], [], [1, 2], ["x"]],
    "encoder_options": [[{"image_size": 10**9}], [{"layer": 10**9}, {}], [{"unshuffle": {}}, {}], [5, {}], "x"],
    "window_blocks": [[10**9], "x", [-1], 5],
    "qkv_blocks": [10**9, -1, [10**9], "x", list(range(100_000))],
    "image_mean": [[], ["x"], [float("nan")] * 3, [0.5] * 10_000],
    "host_config": [{"model_type": "evil"}, 5, {"_attn_implementation": "evil/kernel"}],
    "intermediate_size": [0, -5, 10**18],
    "mlp_ratio": [0, -1, 1e308, float("nan")],
    "image_token_id": [-1, 10**9, "x"],
}


def config_class_of(family: str) -> type:
    return next(config for config, *_ in FAMILIES if config.model_type == family)


def nested(depth: int) -> dict:
    """Layer fusions inside one another."""
    config = copy.deepcopy(OURS)
    for _ in range(depth):
        config = {"model_type": "layer_fusion_vision", "encoder_config": config, "layers": [1]}
    return config


def garbage(rng: random.Random, depth: int = 0):
    """Any value that JSON can hold, and some it cannot."""
    kind = rng.randrange(9 if depth < 3 else 4)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(STRINGS)
    if kind == 3:
        return None
    if kind < 6:
        return [garbage(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return [rng.choice(NUMBERS)] * rng.choice((1, 2, 4, 100_000))
    if kind == 7:
        return {rng.choice((*STRINGS[:3], "model_type", "depth")): garbage(rng, depth + 1) for _ in range(3)}
    return nested(rng.choice((2, 30, 500)))


def places(config: dict) -> list[dict]:
    """A config's dict and those of the configs and options inside it."""
    found = [config]
    for value in config.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found += places(part)
    return found


def change(rng: random.Random, family: str, config: dict) -> None:
    """One mistake, or one attack, somewhere in the config."""
    place = rng.choice(places(config))
    names = [field.name for field in fields(config_class_of(family))] if place is config else [*place, "num_labels"]
    kind = rng.randrange(10)
    if kind < 4 and names:
        place[rng.choice(names)] = garbage(rng)
    elif kind < 6:
        name = rng.choice(sorted(OPTIONS))
        place[name] = copy.deepcopy(rng.choice(OPTIONS[name]))
    elif kind < 8:
        name = rng.choice(sorted(HOSTILE))
        place[name] = copy.deepcopy(rng.choice(HOSTILE[name]))
    elif kind == 8 and place:
        place["model_type"] = rng.choice((*MODEL_TYPES, *BASES, *STRINGS, 5, None, ["vit"]))
    elif place:
        place.pop(rng.choice(sorted(place)))


def case(seed: int, number: int) -> tuple[str, dict]:
    """(model_type, config) of one case; one in eight is only nested, or unchanged but for its options' numbers."""
    rng = random.Random(seed * 1_000_003 + number)
    family = sorted(BASES)[number % len(BASES)]
    config = copy.deepcopy(rng.choice(BASES[family]))
    config.pop("model_type", None)
    if rng.random() < 0.5:  # as if it were read from a file, where unknown options are kept
        config["transformers_version"] = "5.23.0"
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change(rng, family, config)
    return family, config
