"""The EVA-02 detector ViT: what its windows and rotary positions see, how it resamples, what its backbone spares."""

import pytest
import torch
import torch.nn.functional as F
from model_checks import check_saved_and_loaded_equal, check_split_hints_arrive
from torch.export import Dim
from transformers import AutoBackbone, AutoConfig, AutoModel

from vitweave.configuration.configuration_eva02_det import Eva02DetConfig
from vitweave.modeling.conversion.eva02_det import rename_eva02_det
from vitweave.modeling.eva02_det_layers import Eva02DetLayer, from_windows, rotary_table, rotary_tables, to_windows
from vitweave.modeling.modeling_eva02_det import Eva02DetBackbone, Eva02DetModel

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "pretrain_image_size": 24,
    "patch_size": 8,
    "window_size": 4,
    "rope_reference_size": 4,
}


def pixels(height: int = 40, width: int = 56, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than at the start, biases included, so that every part shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny(**options) -> Eva02DetModel:
    return randomized(Eva02DetModel(Eva02DetConfig(**TINY | options)))


def turned(tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Rotary positions by complex numbers: tokens (tokens, heads, head size), angles in units of the first pair."""
    pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous())
    count = pairs.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(count) / count)
    angles = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=1)[:, None]
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def attended(attention, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Attention of one image or window, (tokens, hidden), at the given rotary positions."""
    query, key, value = (
        getattr(attention, name)(tokens).unflatten(1, (4, 8)) for name in ("q_proj", "k_proj", "v_proj")
    )
    logits = torch.einsum("qhc,khc->hqk", turned(query, rows, columns), turned(key, rows, columns)) / 8**0.5
    return attention.o_proj(torch.einsum("hqk,khc->qhc", logits.softmax(dim=-1), value).flatten(1))


def block_by_hand(layer: Eva02DetLayer, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """One block on one image, (patches, hidden), window after window."""
    (height, width), normed = grid, layer.norm1(tokens)
    if layer.window_size:
        side, maps = layer.window_size, normed.unflatten(0, grid)
        rows, columns = (axis.flatten().float() for axis in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
        found = torch.zeros(height, width, tokens.shape[1])
        for top in range(0, height, side):
            for left in range(0, width, side):
                window = torch.zeros(side, side, tokens.shape[1])
                part = maps[top : top + side, left : left + side]
                window[: part.shape[0], : part.shape[1]] = part
                out = attended(layer.attention, window.flatten(0, 1), rows, columns).unflatten(0, (side, side))
                found[top : top + side, left : left + side] = out[: part.shape[0], : part.shape[1]]
        found = found.flatten(0, 1)
    else:
        rows, columns = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
        found = attended(layer.attention, normed, 4 * rows.flatten(), 4 * columns.flatten())
    tokens = tokens + found
    normed, mlp = layer.norm2(tokens), layer.mlp
    return tokens + mlp.down_proj(mlp.norm(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)))


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (2, 9)], ids=str)
@pytest.mark.parametrize("index", [0, 2], ids=["windowed", "global"])
@torch.no_grad()
def test_a_block_equals_the_formulas(index, grid):
    config = Eva02DetConfig(**TINY)
    layer = randomized(Eva02DetLayer(config, index))
    assert bool(layer.window_size) is (index == 0)
    tokens = torch.randn(2, grid[0] * grid[1], 32)
    expected = torch.stack([block_by_hand(layer, image, grid) for image in tokens])
    rotary = rotary_tables(config, grid, tokens)
    torch.testing.assert_close(layer(tokens, grid=grid, rotary=rotary), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(4, 8), (5, 7), (1, 3)], ids=str)
def test_windows_are_put_together_again(grid):
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    windows = to_windows(tokens, grid, 4)
    assert windows.shape[1:] == (16, 3)
    assert torch.equal(windows[0, 1], tokens[0, 1])  # row by row
    assert torch.equal(from_windows(windows, grid, 4), tokens)


@torch.no_grad()
def test_windowed_blocks_see_their_window_and_global_ones_everything():
    changed = pixels(64, 64)
    changed[:, :, :8, :8] += 1  # a patch of the first window
    for window_blocks, seen in (([0, 1, 2], 16), ([0, 1], 64)):
        model = tiny(window_blocks=window_blocks)
        outputs = [model(images).last_hidden_state for images in (pixels(64, 64), changed)]
        moved = (outputs[0] != outputs[1]).any(dim=2).unflatten(1, (8, 8))
        assert moved[:, :4, :4].all() and moved.sum().item() == 2 * seen


def test_rotary_positions_are_relative_to_the_side_of_the_grid():
    config = Eva02DetConfig(**TINY)
    like = torch.zeros(())
    for small, large in zip(rotary_table(config, (4, 3), like), rotary_table(config, (8, 6), like), strict=True):
        torch.testing.assert_close(large.unflatten(0, (8, 6))[::2, ::2].flatten(0, 1), small)
    half = rotary_table(config, (64, 64), like.bfloat16())
    for rounded, table in zip(half, rotary_table(config, (64, 64), like), strict=True):
        assert torch.equal(rounded, table.bfloat16())  # computed in float32: bfloat16 knows no position 15.75
    stretched = Eva02DetConfig(**TINY | {"rope_reference_size": 8})
    assert not torch.equal(rotary_table(stretched, (4, 3), like)[0], rotary_table(config, (4, 3), like)[0])


@torch.no_grad()
def test_positions_are_resampled_without_antialias_and_without_the_class_row():
    embeddings = tiny().embeddings
    table = embeddings.position_embeddings[:, 1:].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    for size, grid in (((40, 56), (5, 7)), ((24, 24), (3, 3)), ((16, 20), (2, 2))):
        positions = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        expected = (embeddings.patch_embeddings(pixels(*size)) + positions).flatten(2).transpose(1, 2)
        found, found_grid = embeddings(pixels(*size))
        assert found_grid == grid
        torch.testing.assert_close(found, expected)
    before = embeddings(pixels())[0]
    embeddings.position_embeddings[:, 0] += 1
    assert torch.equal(embeddings(pixels())[0], before)


@torch.no_grad()
def test_outputs_are_what_users_of_transformers_expect():
    model = tiny()
    model.set_attn_implementation("eager")
    outputs = model(pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 35, 32)] * 4
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))
    # 5x7 patches fill 2x2 windows of 4x4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(8, 4, 16, 16)] * 2 + [(2, 4, 35, 35)]
    plain = model(pixels(), return_dict=False)
    assert torch.equal(plain[0], outputs.last_hidden_state)


@torch.no_grad()
def test_the_backbone_stops_at_the_deepest_map():
    backbone = randomized(Eva02DetBackbone(Eva02DetConfig(**TINY, out_indices=[0, -3])))
    ran = []
    for index, layer in enumerate(backbone.encoder.layer):
        layer.register_forward_hook(lambda *args, index=index: ran.append(index))
    outputs = backbone(pixels())
    assert ran == [0] and outputs.hidden_states is None
    model = Eva02DetModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict())
    states = model(pixels(), output_hidden_states=True).hidden_states
    for feature_map, state in zip(outputs.feature_maps, states[:2], strict=True):
        assert torch.equal(feature_map, state.transpose(1, 2).unflatten(2, (5, 7)))
    assert len(backbone(pixels(), output_hidden_states=True).hidden_states) == 4


def test_drop_path_drops_whole_samples_more_often_in_deeper_blocks():
    assert [layer.drop_path.rate for layer in tiny(drop_path_rate=0.5).encoder.layer] == [0, 0.25, 0.5]
    config = Eva02DetConfig(**TINY, drop_path_rate=0.5)
    layer = Eva02DetLayer(config, 2).train()
    layer.mlp.down_proj.weight.data.zero_()
    layer.mlp.down_proj.bias.data.zero_()
    tokens = torch.randn(64, 35, 32)
    moved = (layer(tokens, grid=(5, 7), rotary=rotary_tables(config, (5, 7), tokens)) != tokens).any(dim=2)
    assert (moved.all(dim=1) | ~moved.any(dim=1)).all()
    assert 0 < moved.all(dim=1).sum() < 64


def test_is_opened_by_the_auto_classes(tmp_path):
    model = tiny(window_blocks=[0, 2])
    assert type(AutoModel.from_config(model.config)) is Eva02DetModel
    assert type(AutoBackbone.from_config(model.config)) is Eva02DetBackbone
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    check_split_hints_arrive(model)
    assert AutoConfig.from_pretrained(tmp_path).window_blocks == [0, 2] == loaded.config.window_blocks
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(pixels()).pooler_output, loaded(pixels()).pooler_output)


def test_runs_under_autocast_and_in_bfloat16():
    model = tiny()
    expected = model(pixels()).last_hidden_state
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(pixels()).last_hidden_state
        torch.testing.assert_close(mixed.float(), expected, atol=0.5, rtol=0.05)
    half = model.bfloat16()(pixels()).last_hidden_state  # float32 pixels, as processors make them
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.5, rtol=0.05)


def test_starts_as_the_config_says():
    model = Eva02DetModel(Eva02DetConfig(**TINY | {"hidden_size": 128, "initializer_range": 0.1}))
    assert abs(model.embeddings.position_embeddings.std() - 0.1) < 0.02
    assert abs(model.encoder.layer[0].attention.q_proj.weight.std() - 0.1) < 0.01
    assert not model.encoder.layer[0].attention.q_proj.bias.any()


def test_the_released_size_has_the_released_shapes():
    with torch.device("meta"):
        model = Eva02DetModel(Eva02DetConfig())
    official = {"pos_embed": (1, 197, 1024), "patch_embed.proj.weight": (1024, 3, 16, 16)}
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"):
        official[f"blocks.23.{name}"] = (1024,)
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "proj.weight"):
        official[f"blocks.23.attn.{name}"] = (1024, 1024)
    official["blocks.23.attn.proj.bias"] = official["blocks.23.mlp.w3.bias"] = (1024,)
    for name in ("w1.bias", "w2.bias", "ffn_ln.weight", "ffn_ln.bias"):
        official[f"blocks.23.mlp.{name}"] = (2730,)
    official["blocks.23.mlp.w1.weight"] = official["blocks.23.mlp.w2.weight"] = (2730, 1024)
    official["blocks.23.mlp.w3.weight"] = (1024, 2730)
    constants = {"rope_glb.freqs_cos": (4096, 64), "blocks.0.attn.rope.freqs_sin": (256, 64)}
    state = {name: torch.empty(shape, device="meta") for name, shape in (official | constants).items()}
    kept, dropped = rename_eva02_det(state)
    ours = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert set(dropped) == set(constants)
    assert {name: tensor.shape for name, tensor in kept.items()} == {name: ours[name] for name in kept}
    assert {name for name in ours if "layer.23." in name} == {name for name in kept if "layer.23." in name}
    assert model.config.window_blocks == [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22]
    assert {name.partition(".layer.")[0] for name in ours} == {
        *("embeddings.position_embeddings", "embeddings.patch_embeddings.weight"),
        *("embeddings.patch_embeddings.bias", "encoder"),
    }


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_graph_takes_whole_and_cut_off_windows():
    model = tiny()
    sides = {2: 8 * Dim("rows", min=2, max=16), 3: 8 * Dim("columns", min=2, max=16)}
    for height, width in ((40, 56), (64, 64)):
        program = torch.export.export(
            model, (pixels(height, width),), dynamic_shapes={"pixel_values": {0: Dim("batch", min=1, max=8), **sides}}
        )
        for size in ((32, 96, 3), (16, 24, 1), (40, 32, 2)):
            found = program.module()(pixels(*size)).last_hidden_state
            torch.testing.assert_close(found, model(pixels(*size)).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windowsize": 3}, "no option 'windowsize' .did you mean window_size"),
        ({"window_blocks": [0, 3]}, r"window_blocks has the block indices \[3\], expected 0 to 2"),
        ({"window_blocks": "all"}, "window_blocks must be 'two_of_three' or a list of block indices, got 'all'"),
        ({"window_size": 0}, "window_size counts patches and must be at least 1, got 0"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": 24}, "head size .* that 4 divides, got 6"),
        ({"pretrain_image_size": 4}, "pretrain_image_size=4 is smaller than one patch of 8"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(Exception, match=message):
        Eva02DetConfig(**TINY | options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 32, 32), "expected 3 image channels, got 4"),
        ((2, 3, 4, 32), "image of 4x32 pixels is smaller than one patch of 8x8"),
        ((3, 32, 32), "expected pixel_values"),
    ],
)
def test_bad_images_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))
