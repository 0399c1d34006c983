"""Replay of the EVA-02 detector ViT of EAGLE: its weights by their official names, its rotary tables, its map."""

import torch

from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.modeling.conversion.eva02_det import rename_eva02_det
from vitweave.modeling.eva02_det_layers import rotary_tables
from vitweave.modeling.modeling_eva02_det import Eva02DetBackbone, Eva02DetModel
from vitweave.modeling.vision_encoder import VisionEncoder

OPTIONS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "window_size": "window_size",
    "window_block_indexes": "window_blocks",
    "pretrain_img_size": "pretrain_image_size",
    "pt_hw_seq_len": "rope_reference_size",
    "norm_eps": "layer_norm_eps",
}


def eva02_det_config(args: dict) -> Eva02DetConfig:
    assert args["qkv_bias"]
    options = {ours: args[theirs] for theirs, ours in OPTIONS.items()}
    return Eva02DetConfig(**options, intermediate_size=int(args["embed_dim"] * args["mlp_ratio"]))


def replay_eva02_det_vit(case):
    config = eva02_det_config(case.sidecar["args"])
    state, dropped = rename_eva02_det(case.group("state"))
    model = Eva02DetModel(config).to(case.dtype).eval()
    model.load_state_dict(state, strict=True)
    pixel_values, expected = case.tensors["input.pixel_values"], case.tensors["output.map"]
    grid = tuple(expected.shape[2:])

    tables = rotary_tables(config, grid, torch.zeros((), dtype=case.dtype))
    for name, found in (("rope_win", tables.window), ("rope_glb", tables.whole)):
        for part, table in zip(("freqs_cos", "freqs_sin"), found, strict=True):
            case.check(f"state.{name}.{part}", table)
    assert {"rope_win.freqs_cos", "rope_glb.freqs_sin"} <= set(dropped)

    tokens = model(pixel_values).last_hidden_state
    case.check("output.map", tokens.transpose(1, 2).unflatten(2, grid))
    case.check("output.map", VisionEncoder(model)(pixel_values).feature_maps[0])
    backbone = Eva02DetBackbone(config).to(case.dtype).eval()
    backbone.load_state_dict(state, strict=True)
    case.check("output.map", backbone(pixel_values).feature_maps[-1])


KINDS = {"eagle_eva02_det_vit": replay_eva02_det_vit}
