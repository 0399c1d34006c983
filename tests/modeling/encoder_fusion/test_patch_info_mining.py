"""Patch info mining: the formula, windows, views, NaN scores, gradients, adapters on the projections, the tower."""

import copy

import pytest
import torch
import torch.nn.functional as F
from encoder_maps import cast, image, random_maps, trained
from model_checks import check_saved_and_loaded_equal
from peft import LoraConfig, inject_adapter_in_model
from tiny_encoders import CASES

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_fusion_plans import FusionPlan
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.patch_info_mining import PatchInfoMiningFusion
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel

CHANNELS, QUERIES = (32, 48), (2, 3)
DETAIL = [(2, 3), (4, 6), (8, 12), (4, 12)]
every_detail = pytest.mark.parametrize("detail", DETAIL, ids=str)


def build(detail, dtype=torch.float32, **options):
    """A fusion whose parameters have moved, and maps for it."""
    torch.manual_seed(0)
    fusion = trained(PatchInfoMiningFusion(CHANNELS, [QUERIES, detail], **options)).to(dtype)
    return fusion, random_maps(CHANNELS, [QUERIES, detail], dtype=dtype)


def by_the_formula(fusion, queries, detail, scale=32**-0.5):
    """Window by window, with keys and values."""
    (height, width), found = queries.shape[2:], []
    rows, columns = detail.shape[2] // height, detail.shape[3] // width
    for y in range(height):
        for x in range(width):
            query = queries[:, :, y, x]
            window = detail[:, :, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns].flatten(2).transpose(1, 2)
            keys, values = fusion.k_proj(fusion.k_norm(window)), fusion.v_proj(fusion.v_norm(window))
            scores = torch.einsum("bc,bnc->bn", fusion.q_proj(fusion.q_norm(query)), keys) * scale
            scores = torch.where(scores.isnan(), 0, scores)
            found.append(query + torch.einsum("bn,bnc->bc", scores.softmax(dim=1), values))
    return torch.stack(found, dim=1)


@every_detail
def test_the_formula(detail):
    fusion, features = build(detail, torch.float64)
    torch.testing.assert_close(fusion(features), by_the_formula(fusion, *features.maps), rtol=1e-9, atol=1e-9)
    fusion, features = build(detail, torch.float64, softmax_scale=1.0)
    torch.testing.assert_close(fusion(features), by_the_formula(fusion, *features.maps, 1.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@every_detail
def test_maps_far_from_zero_keep_their_digits_and_stay_as_they_are(detail, last):
    fusion, features = build(detail)
    shifted = features.maps[1] + 100
    shifted = shifted.to(memory_format=torch.channels_last) if last else shifted
    before = shifted.clone()
    fused = fusion(EncoderMaps([features.maps[0], shifted]))
    torch.testing.assert_close(fused, by_the_formula(fusion, features.maps[0], shifted), rtol=1e-3, atol=1e-3)
    assert torch.equal(shifted, before)


@every_detail
def test_gradients_are_those_of_the_formula(detail):
    fusion, features = build(detail, torch.float64)
    plain, given = copy.deepcopy(fusion), [part.clone().requires_grad_() for part in features.maps]
    maps = [part.requires_grad_() for part in features.maps]
    fusion(features).square().sum().backward()
    by_the_formula(plain, *given).square().sum().backward()
    for (name, ours), theirs in zip(fusion.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9, msg=name)
        # one cell alone needs no score, and what is the same for all keys of a window cancels
        silent = name in ("k_proj.bias", "k_norm.bias") or (detail == QUERIES and name[:2] in ("q_", "k_"))
        assert (ours.grad.abs().max() < 1e-9) == silent, name
    for ours, theirs in zip(maps, given, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9)


def test_scores_that_are_no_number_count_as_zero():
    fusion, features = build((4, 6), torch.float64)
    fusion.k_proj.bias.data[3] = float("nan")
    fused = fusion(features)
    assert torch.isfinite(fused).all()
    torch.testing.assert_close(fused, by_the_formula(fusion, *features.maps))
    fusion, features = build((4, 6))
    features.maps[1][0, 5, 1, 1] = float("nan")  # in the first window
    alone = fusion(features).isnan().any(dim=2)
    assert alone[0, 0] and alone.sum() == 1


def test_projections_that_are_wrapped_are_evaluated_as_they_are_written():
    fusion, features = build((4, 6), torch.float64)
    before = fusion(features)
    config = LoraConfig(r=2, target_modules=["k_proj", "v_proj"])
    adapted = inject_adapter_in_model(config, fusion)
    torch.testing.assert_close(adapted(features), before)  # they start at zero
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(adapted(features), before, atol=0.1)
    torch.testing.assert_close(adapted(features), by_the_formula(adapted, *features.maps))


def test_detail_of_several_encoders_meets_on_the_finest_grid():
    grids = [QUERIES, (4, 6), (8, 12), (3, 5)]
    fusion, features = trained(PatchInfoMiningFusion([32, 8, 16, 24], grids)), random_maps([32, 8, 16, 24], grids)
    resized = [F.interpolate(part, size=(8, 12), mode="bilinear", align_corners=False) for part in features.maps[1:]]
    assert torch.equal(fusion(features), fusion(EncoderMaps([features.maps[0], torch.cat(resized, dim=1)])))


@pytest.mark.parametrize("has_global_view", [False, True])
@pytest.mark.parametrize("crops", [1, 2, 3])
def test_crops_read_their_block_and_the_global_view_the_shrunk_map(crops, has_global_view):
    detail = (crops * 4, crops * 9)
    fusion, features = build(detail, crops=crops, has_global_view=has_global_view)
    alone = PatchInfoMiningFusion(CHANNELS, [QUERIES, (4, 9)])
    alone.load_state_dict(fusion.state_dict())
    views = torch.randn(2, crops**2 + has_global_view, 32, *QUERIES)
    fused = fusion(EncoderMaps([views, features.maps[1]]))
    blocks = [block for row in features.maps[1].chunk(crops, 2) for block in row.chunk(crops, 3)]
    if has_global_view:
        blocks.insert(0, F.interpolate(features.maps[1], size=(4, 9), mode="bilinear", align_corners=False))
    expected = [alone(EncoderMaps([view, block])) for view, block in zip(views.unbind(1), blocks, strict=True)]
    torch.testing.assert_close(fused, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)
    assert fused.shape[1] == fusion.num_tokens and fusion.keeps_grid == (len(blocks) == 1)


@every_detail
def test_one_graph_half_precision_and_images_apart(detail):
    fusion, features = build(detail)
    torch.compiler.reset()
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), fusion(features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion(features)
    assert (fused.float() - fusion(features)).norm() < 0.05 * fused.norm()
    fused.float().square().sum().backward()
    low, maps = build(detail, torch.bfloat16)
    fused, precise = low(maps), copy.deepcopy(low).float()(cast(maps, torch.float32))
    assert fused.dtype == torch.bfloat16 and (fused.float() - precise).norm() < 0.05 * precise.norm()
    fused.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in low.parameters())
    fusion, features = build(detail, torch.float64)
    torch.testing.assert_close(fusion(image(features, 1)), fusion(features)[1:])


class FromTensors(torch.nn.Module):
    """The fusion with maps as plain arguments, for torch.export."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, views, detail):
        return self.fusion(EncoderMaps([views, detail]))


@pytest.mark.slow
def test_exports_with_any_batch_size():
    fusion, features = build((8, 12), crops=2, has_global_view=True)
    views, batch = torch.randn(2, 5, 32, *QUERIES), torch.export.Dim("batch", min=1, max=64)
    given = (views, features.maps[1])
    program = torch.export.export(FromTensors(fusion), given, dynamic_shapes=({0: batch}, {0: batch}))
    larger = tuple(part.repeat(2, *[1] * (part.ndim - 1)) for part in given)
    torch.testing.assert_close(program.module()(*larger), FromTensors(fusion)(*larger), rtol=1e-4, atol=1e-4)


def test_the_plan_and_its_refusals():
    assert PatchInfoMiningFusion([1024, 8], [(24, 24), (192, 192)]).plan == FusionPlan(1024, 576, (24, 24))
    hd = PatchInfoMiningFusion([1024, 8], [(24, 24), (384, 384)], crops=2, has_global_view=True)
    assert hd.plan == FusionPlan(1024, 2880, None)
    with pytest.raises(ValueError, match=r"each of 4x6 queries \(grid 2x3, crops=2\), got 6x9 cells: .* as 8x12 cells"):
        PatchInfoMiningFusion(CHANNELS, [QUERIES, (6, 9)], crops=2)
    with pytest.raises(ValueError, match="at least two encoders"):
        PatchInfoMiningFusion([32], [QUERIES])
    with pytest.raises(ValueError, match="crops per side, at least 1, got 0"):
        PatchInfoMiningFusion(CHANNELS, [QUERIES, QUERIES], crops=0)
    with pytest.raises(ValueError, match="hidden_size to be None or the 32 channels"):
        build_encoder_fusion("patch_info_mining", CHANNELS, [QUERIES, QUERIES], 48)


@pytest.mark.parametrize("crops", [1, 2])
def test_in_a_tower(crops, tmp_path):
    config = MultiEncoderConfig(
        encoder_configs=[
            {"model_type": "clip_vision_model", **CASES["clip_vision_model"]},
            {"model_type": "convnext", **CASES["convnext"]},
        ],
        encoder_options=[
            {"layer": -2, "final_norm": False, "image_size": 32},
            {"layer": [1, 2, 3, 4], "final_norm": False},
        ],
        image_size=128,
        fusion_type="patch_info_mining",
        fusion_options={"crops": crops, "has_global_view": crops > 1},
    )
    torch.manual_seed(0)
    model, pixels = MultiEncoderModel(config).eval(), torch.randn(2, 3, 128, 128)
    fused = model(pixels).last_hidden_state
    assert fused.shape == (2, 16 if crops == 1 else 80, 32) == (2, config.num_tokens, config.fused_size)
    assert model.fusion.k_proj.weight.abs().max() > 0.8 * 80**-0.5 and model.fusion.k_proj.bias.any()  # as torch draws
    loaded = check_saved_and_loaded_equal(model, tmp_path).eval()
    assert torch.equal(loaded(pixels).last_hidden_state, fused)
    assert torch.equal(model(encoder_outputs=model.encode(pixels)).last_hidden_state, fused)
