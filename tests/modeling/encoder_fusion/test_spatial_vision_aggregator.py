import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_fusion_plans import FUSION_PLANS, sva_grids
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.grid_matching import bilinear
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.sva_layers import WindowAttention, WindowReader, cut_windows
from vitweave.modeling.visible_tokens import visible_cells

NAME = "spatial_vision_aggregator"
CHANNELS, GRIDS = [24, 40, 36], [(4, 4), (4, 4), (8, 8)]
# with 4 heads, the windows of 4 cells are read by projections moved to the query, with 8 heads they are not
SMALL = {"vision_hidden_size": 32, "num_heads": 4, "depth": 2}
FORMS = [
    {},
    {"num_heads": 8},
    {"layer_type": "sep"},
    {"query_sides": [4, 2], "depth": 1},
    {"query_sides": [2], "final_side": 3, "layer_type": "sep"},
]
every_form = pytest.mark.parametrize("options", FORMS, ids=str)
SIZES = torch.tensor([[300, 100], [480, 640]])


def build(grids=GRIDS, **options):
    """A fusion with random values in every parameter, norms too."""
    torch.manual_seed(0)
    fusion = build_encoder_fusion(NAME, CHANNELS, grids, options=SMALL | options).eval()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return fusion


def features(batch=2, grids=GRIDS, sizes=SIZES, dtype=torch.float32) -> EncoderMaps:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(batch, c, *grid, generator=generator) for c, grid in zip(CHANNELS, grids, strict=True)]
    return EncoderMaps([part.to(dtype) for part in maps], image_sizes=sizes)


def attend(attention: WindowAttention, x, keys: list, mask):
    """One query (hidden,) to the cells (cells, channels) of the maps."""
    heads = attention.num_heads
    query = attention.q_proj(attention.q_norm(x)).view(heads, -1)
    parts = list(zip(attention.readers, keys, strict=True))
    k = torch.cat([r.k_proj(r.k_norm(cells)) for r, cells in parts]).unflatten(1, (heads, -1))
    v = torch.cat([r.v_proj(r.v_norm(cells)) for r, cells in parts]).unflatten(1, (heads, -1))
    scores = torch.einsum("hd,khd->hk", query, k) / query.shape[1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return attention.o_proj(torch.einsum("hk,khd->hd", weights, v).flatten())


def one_position(layer, q, context, windows, masks):
    """The formula of one layer at one position of one image."""
    context = layer.proj_context(context)
    x = layer.proj_in(torch.cat([q, context]))
    places = [getattr(layer, f"pos_embed_{index}") for index in range(len(windows))]
    windows = [part if place is None else part + place for part, place in zip(windows, places, strict=True)]
    if hasattr(layer, "attention"):
        a = attend(layer.attention, x, windows, torch.cat(masks))
    else:
        shares = layer.weight_mlp(torch.cat([q, context])).softmax(0)
        found = [
            attend(reader, x, [cells], mask) if isinstance(reader, WindowAttention) else reader(cells[0])
            for reader, cells, mask in zip(layer.readers, windows, masks, strict=True)
        ]
        a = sum(share * part for share, part in zip(shares, found, strict=True))
    return q + layer.proj_out(layer.norm(x + a))


def by_formula(fusion, given: EncoderMaps) -> torch.Tensor:
    """Image by image, position by position."""
    images = []
    for image in range(given.maps[0].shape[0]):
        states = [p(part[image].permute(1, 2, 0)) for p, part in zip(fusion.projections, given.maps, strict=True)]
        context, groups = states[0].flatten(0, 1).mean(0), []
        _, queries, final = sva_grids([tuple(part.shape[-2:]) for part in given.maps], **fusion.sides)
        for sampler, start, (rows, columns) in zip(fusion.samplers, fusion.query, queries, strict=True):
            out = torch.empty(rows, columns, start.shape[0], dtype=start.dtype)
            for y in range(rows):
                for x in range(columns):
                    windows, masks = [], []
                    for part in states:
                        high, wide = part.shape[0] // rows, part.shape[1] // columns
                        place = (slice(y * high, (y + 1) * high), slice(x * wide, (x + 1) * wide))
                        windows.append(part[place].flatten(0, 1))
                        mask = torch.ones(len(windows[-1]), dtype=torch.bool)
                        if given.image_sizes is not None:
                            mask = visible_cells(given.image_sizes, part.shape[0])[image][place].flatten()
                        masks.append(mask if mask.any() else ~mask)
                    q = start
                    for layer in sampler.layers:
                        q = one_position(layer, q, context, windows, masks)
                    out[y, x] = q
            out = F.interpolate(out.permute(2, 0, 1)[None], size=final, mode="bilinear")
            groups.append(out[0])
        images.append(torch.cat(groups).flatten(1).mT)
    return torch.stack(images)


@every_form
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["whole", "padded"])
@torch.no_grad()
def test_equals_the_formula(options, sizes):
    fusion, given = build(**options).double(), features(sizes=sizes, dtype=torch.float64)
    found = fusion(given)
    torch.testing.assert_close(found, by_formula(fusion, given), rtol=1e-10, atol=1e-10)
    plan = FUSION_PLANS[NAME](CHANNELS, GRIDS, None, **SMALL | options)
    assert plan == fusion.plan and found.shape[1:] == (plan.num_tokens, plan.hidden_size)
    assert plan.num_tokens == plan.grid[0] * plan.grid[1] and fusion.keeps_grid


@torch.no_grad()
def test_grids_need_not_be_square():
    grids = [(2, 3), (4, 3), (6, 9)]
    fusion, given = build(grids).double(), features(grids=grids, sizes=None, dtype=torch.float64)
    assert fusion.plan.grid == (2, 3)
    torch.testing.assert_close(fusion(given), by_formula(fusion, given), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_larger_images_get_more_queries_unless_sides_are_given():
    grids = [(4, 6), (4, 6), (8, 12)]
    given = features(grids=grids, sizes=None, dtype=torch.float64)
    fusion = build().double()
    assert fusion.plan_for(grids).grid == (4, 6)
    torch.testing.assert_close(fusion(given), by_formula(fusion, given), rtol=1e-10, atol=1e-10)
    uneven = EncoderMaps([*given.maps[:2], F.interpolate(given.maps[2], size=(7, 11))])
    assert fusion(uneven).shape == (2, 24, 32)

    resized = EncoderMaps([bilinear(part, grid) for part, grid in zip(given.maps, GRIDS, strict=True)])
    fixed = build(query_sides=[4]).double()
    assert fixed.plan_for(grids) == fixed.plan
    torch.testing.assert_close(fixed(given), by_formula(fusion, resized), rtol=1e-10, atol=1e-10)
    asked = build(tower_sides=[2, [4, 2], 6])
    assert asked.plan_for(grids) == asked.plan and asked.plan.grid == (2, 2)
    assert asked(features(sizes=None)).shape == (2, 4, 32)


def has_visible(grid: tuple[int, int], query_grid: tuple[int, int]) -> torch.Tensor:
    """(batch, positions), whether the window of a map shows a part of the image."""
    return cut_windows(visible_cells(SIZES, grid[0])[..., None], query_grid).any(2)[..., 0]


@pytest.mark.parametrize("options", [{}, {"num_heads": 8}, {"layer_type": "sep"}, {"query_sides": [2]}], ids=str)
@torch.no_grad()
def test_padding_says_nothing_to_the_visible_part(options):
    fusion, given, changed = build(**options), features(), features()
    for index in (1, 2):  # the first map is also the context, the mean of all its cells
        padding = ~visible_cells(SIZES, GRIDS[index][0])[:, None].expand_as(changed.maps[index])
        changed.maps[index][padding] += 10
    visible = torch.stack([has_visible(grid, fusion.plan.grid) for grid in GRIDS]).all(0)
    a, b, whole = fusion(given), fusion(changed), fusion(features(sizes=None))
    assert visible.any() and torch.equal(a[visible], b[visible])
    assert torch.equal(a, b) == visible.all()  # windows of nothing but padding are read
    assert not torch.equal(a[visible], whole[visible])


@torch.no_grad()
def test_windows_of_nothing_but_padding_are_read_whole():
    fusion = build(query_sides=[4])
    outside = torch.stack([~has_visible(grid, (4, 4)) for grid in GRIDS]).all(0)
    assert outside.any()
    padded, whole = fusion(features()), fusion(features(sizes=None))
    assert torch.equal(padded[outside], whole[outside]) and padded.isfinite().all()


@pytest.mark.parametrize("layer_type", ["joint", "sep"])
@torch.no_grad()
def test_the_order_of_the_encoders_behind_the_first_is_free(layer_type):
    fusion, order = build(layer_type=layer_type, query_sides=[4]), [0, 2, 1]
    torch.manual_seed(0)
    channels, grids = [CHANNELS[k] for k in order], [GRIDS[k] for k in order]
    turned = build_encoder_fusion(NAME, channels, grids, options=SMALL | {"layer_type": layer_type}).eval()
    for ours, theirs in zip(turned.samplers[0].layers, fusion.samplers[0].layers, strict=True):
        for new, old in enumerate(order):
            setattr(ours, f"pos_embed_{new}", getattr(theirs, f"pos_embed_{old}"))
        ours.proj_context, ours.proj_in, ours.norm = theirs.proj_context, theirs.proj_in, theirs.norm
        ours.proj_out = theirs.proj_out
        part, source = (ours.attention, theirs.attention) if layer_type == "joint" else (ours, theirs)
        part.readers = nn.ModuleList(source.readers[k] for k in order)
        if layer_type == "joint":
            part.q_norm, part.q_proj, part.o_proj = source.q_norm, source.q_proj, source.o_proj
        else:
            ours.weight_mlp = copy.deepcopy(theirs.weight_mlp)
            ours.weight_mlp.fc2.weight.copy_(theirs.weight_mlp.fc2.weight[order])
    turned.query, turned.projections = fusion.query, nn.ModuleList(fusion.projections[k] for k in order)
    given = features()
    found = turned(EncoderMaps([given.maps[k] for k in order], image_sizes=SIZES))
    torch.testing.assert_close(found, fusion(given))


@every_form
@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch(options):
    fusion, given = build(**options), features()
    for image in range(2):
        alone = EncoderMaps([part[image : image + 1] for part in given.maps], image_sizes=SIZES[image : image + 1])
        torch.testing.assert_close(fusion(alone)[0], fusion(given)[image])


@every_form
def test_every_weight_gets_the_gradient_of_the_formula(options):
    fusion, given = build(**options).double(), features(dtype=torch.float64)
    plain = copy.deepcopy(fusion)
    fusion(given).square().mean().backward()
    by_formula(plain, given).square().mean().backward()
    for (name, a), b in zip(fusion.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=name)
        # one softmax per map: what all keys have in common cancels
        cancels = options.get("layer_type") == "sep" and "k_norm.bias" in name
        assert cancels or a.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("layer_type", ["joint", pytest.param("sep", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled(layer_type):
    fusion, given = build(layer_type=layer_type, depth=1), features()
    torch.testing.assert_close(torch.compile(fusion, fullgraph=True, backend="eager")(given), fusion(given))


@pytest.mark.slow
@pytest.mark.parametrize("layer_type", ["joint", "sep"])
@torch.no_grad()
def test_exported_with_a_free_batch_size(layer_type):
    class OfTensors(nn.Module):
        def __init__(self, fusion):
            super().__init__()
            self.fusion = fusion

        def forward(self, maps: list, sizes):
            return self.fusion(EncoderMaps(maps, image_sizes=sizes))

    model, given, batch = OfTensors(build(layer_type=layer_type)), features(), torch.export.Dim("batch")
    shapes = {"maps": [{0: batch}] * 3, "sizes": {0: batch}}
    exported = torch.export.export(model, (given.maps, SIZES), dynamic_shapes=shapes).module()
    more = [torch.cat([part, part]) for part in given.maps], torch.cat([SIZES, SIZES])
    torch.testing.assert_close(exported(*more), model(*more))


@every_form
@torch.no_grad()
def test_half_precision(options):
    fusion, given = build(**options), features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = fusion(given)
    half = copy.deepcopy(fusion).bfloat16()(features(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    for found in (mixed, half):
        assert F.cosine_similarity(found.float(), fusion(given), dim=-1).min() > 0.999


@torch.no_grad()
def test_adapters_count_where_weights_would_be_folded():
    fusion, given = build(), features()
    before = fusion(given)
    for target in ("k_proj", "v_proj", "proj_in"):
        config = LoraConfig(r=2, target_modules=[target], init_lora_weights=True)
        adapted = inject_adapter_in_model(config, copy.deepcopy(fusion))
        torch.testing.assert_close(adapted(given), before, rtol=1e-4, atol=1e-5)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        assert not torch.allclose(adapted(given), before, atol=1e-3), target


def test_large_windows_are_not_projected_cell_by_cell():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(reader):
        windows, query = torch.randn(2, 9, 16, 64), torch.randn(2, 9, 4, 16)
        with FlopCounterMode(display=False) as counter:
            prepared = reader.prepare(windows)
            reader.read(reader.score(query, prepared).softmax(-1), prepared)
        return counter.get_total_flops()

    few, many = WindowReader(64, 64, 4, 16), WindowReader(64, 64, 4, 16)
    many.k_proj = type("Wrapped", (nn.Linear,), {})(64, 64, bias=False)
    assert flops(few) < 0.2 * flops(many)


def test_a_tower_starts_and_loads(tmp_path):
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MultiEncoderConfig(
        encoder_configs=[vit | {"image_size": 32}, vit | {"image_size": 64}],
        encoder_options=[{"image_size": 32}, {}],
        image_size=64,
        fusion_type=NAME,
        fusion_options={"vision_hidden_size": 512, "depth": 1},
    )
    tower = MultiEncoderModel(config).eval()
    fusion, pixel_values = tower.fusion, torch.randn(2, 3, 64, 64)
    assert fusion.query.std().item() == pytest.approx(512**-0.5, rel=0.15)
    places = fusion.samplers[0].layers[0].pos_embed_1
    assert places.shape == (4, 512) and places.std().item() == pytest.approx(1, rel=0.1)
    assert fusion.samplers[0].layers[0].pos_embed_0 is None

    tower.save_pretrained(tmp_path)
    loaded = MultiEncoderModel.from_pretrained(tmp_path).eval()
    tokens, again = (each(pixel_values, image_sizes=SIZES).last_hidden_state for each in (tower, loaded))
    assert torch.equal(tokens, again) and tokens.shape == (2, config.num_tokens, 512)
    assert not torch.equal(tower(pixel_values).last_hidden_state, tokens)
    larger = tower(torch.randn(1, 3, 64, 96)).last_hidden_state
    assert larger.shape[1] == config.plan_for((64, 96)).num_tokens == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_sides": [3]}, "3x3 queries for the 4x4 map of encoder 0"),
        ({"query_sides": []}, "at least one query group"),
        ({"tower_sides": [4, 4]}, "each of 3 encoders, got 2"),
        ({"num_heads": 5}, "num_heads to divide vision_hidden_size=32, got 5"),
        ({"depth": 0}, "at least one layer, got depth=0"),
        ({"layer_type": "both"}, "layer_type to be one of"),
        ({"dept": 2}, "no option 'dept'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder_fusion(NAME, CHANNELS, GRIDS, options=SMALL | options)


def test_a_width_and_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="query groups = 32, got 64"):
        build_encoder_fusion(NAME, CHANNELS, GRIDS, hidden_size=64, options=SMALL)
    grids = [(2, 3), (4, 3), (6, 9)]
    with pytest.raises(ValueError, match="a map has 2x3 cells"):
        build(grids)(features(grids=grids))
