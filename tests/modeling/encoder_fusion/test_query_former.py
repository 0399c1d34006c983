import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.encoder_fusion_plans import FUSION_PLANS, FusionPlan
from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.query_former import keep_encoders
from vitweave.modeling.encoder_fusion.registry import build_encoder_fusion
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel

NAME = "query_former"
CHANNELS, GRIDS = [24, 40, 32], [(3, 5), (2, 2), (4, 4)]
SMALL = {"queries_per_encoder": 4, "width": 32, "depth": 3, "num_heads": 4, "encoder_hidden_size": 48}


def build(hidden_size=20, **options):
    torch.manual_seed(0)
    return build_encoder_fusion(NAME, CHANNELS, GRIDS, hidden_size, SMALL | options).eval()


def features(batch=2, dtype=torch.float32) -> EncoderMaps:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    maps = [noise(channels, *grid) for channels, grid in zip(CHANNELS, GRIDS, strict=True)]
    return EncoderMaps(maps, [noise(1, 24), None, noise(5, 32)])


@torch.no_grad()
def test_tokens_are_as_planned():
    fusion = build()
    assert fusion.plan == FUSION_PLANS[NAME](CHANNELS, GRIDS, 20, **SMALL) == FusionPlan(20, 12)
    assert fusion(features()).shape == (2, 12, 20) and not fusion.keeps_grid
    assert build(hidden_size=None)(features()).shape == (2, 12, 32)
    other = EncoderMaps([torch.randn(2, c, 2, 3) for c in CHANNELS])  # any grids, no prefixes
    assert fusion(other).shape == (2, 12, 20) and fusion.plan_for([(2, 3)] * 3) == fusion.plan


def test_the_full_size_has_the_parameters_of_the_paper():
    widths = [1408, 1024, 1664, 1792, 1024]  # EVA-CLIP-g, CLIP-L, SILC-G, ViT-e, DINOv2-L; FlanT5-XL reads 2048
    with torch.device("meta"):
        fusion = build_encoder_fusion(NAME, widths, [(16, 16)] * 5, 2048)
    assert sum(parameter.numel() for parameter in fusion.parameters()) / 1e6 == pytest.approx(116, abs=1)
    assert fusion.num_tokens == 160
    blocks = fusion.q_former.encoder.layer
    assert [hasattr(block, "crossattention") for block in blocks] == [True, False] * 6


@torch.no_grad()
def test_the_order_of_encoders_and_cells_is_free():
    fusion, given = build(), features()
    turned = copy.deepcopy(fusion)
    turned.projections = nn.ModuleList(reversed(fusion.projections))
    found = turned(EncoderMaps([part.flip(3) for part in given.maps[::-1]], given.prefixes[::-1]))
    torch.testing.assert_close(found, fusion(given))


@torch.no_grad()
def test_class_tokens_count_where_they_are_kept():
    fusion, given = build(), features()
    assert not torch.allclose(fusion(given), fusion(EncoderMaps(given.maps, [None] * 3)), atol=1e-3)


def test_encoders_are_left_out_at_the_rate_and_one_always_stays():
    kept = keep_encoders(4000, 3, 0.5, torch.device("cpu"))
    assert kept.any(dim=1).all()
    # 0.5, plus a third of the images from which all three would have gone
    torch.testing.assert_close(kept.double().mean(0), torch.full((3,), 0.5 + 0.125 / 3).double(), rtol=0, atol=0.03)
    assert keep_encoders(500, 2, 0.999, torch.device("cpu")).sum(dim=1).min() == 1
    assert keep_encoders(500, 1, 0.9, torch.device("cpu")).all()


def test_a_left_out_encoder_says_nothing_at_all():
    fusion = build(encoder_dropout=0.5, dropout=0.0).train()
    given, changed, told = features(batch=8), features(batch=8), []
    for index in range(3):
        changed.maps[index] += 1
        changed.prefixes[index] = None if given.prefixes[index] is None else given.prefixes[index] + 1
        seed = torch.manual_seed(index).initial_seed()
        kept = keep_encoders(8, 3, 0.5, torch.device("cpu"))
        torch.manual_seed(seed)
        before = fusion(given)
        torch.manual_seed(seed)
        after = fusion(
            EncoderMaps(
                [changed.maps[k] if k == index else given.maps[k] for k in range(3)],
                [changed.prefixes[k] if k == index else given.prefixes[k] for k in range(3)],
            )
        )
        same = (before == after).flatten(1).all(dim=1)
        assert torch.equal(same, ~kept[:, index])
        told.append(same)
    assert torch.stack(told).any() and not torch.stack(told).all()


@torch.no_grad()
def test_nothing_is_left_out_in_evaluation():
    fusion, given = build(encoder_dropout=0.9), features()
    assert torch.equal(fusion(given), fusion(given))
    torch.testing.assert_close(fusion(given), build(encoder_dropout=0.0)(given), rtol=0, atol=0)
    quiet = build(encoder_dropout=0.0, dropout=0.0)
    torch.testing.assert_close(quiet.train()(given), quiet.eval()(given))


@torch.no_grad()
def test_an_image_alone_gives_what_it_gives_in_a_batch():
    fusion, given = build(), features()
    for image in range(2):
        one = slice(image, image + 1)
        prefixes = [None if part is None else part[one] for part in given.prefixes]
        torch.testing.assert_close(
            fusion(EncoderMaps([part[one] for part in given.maps], prefixes))[0], fusion(given)[image]
        )


def test_every_weight_gets_a_gradient():
    fusion = build().train()
    fusion(features(batch=8)).square().sum().backward()
    idle = [name for name, parameter in fusion.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not idle


@torch.no_grad()
def test_both_kinds_of_attention_agree():
    fusion, given = build(), features()
    expected = fusion(given)
    fusion.q_former.set_attn_implementation("eager")
    found = fusion(given)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_tower_hands_its_attention_and_checkpointing_down(implementation, tmp_path):
    sizes = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    options = {"fusion_type": NAME, "fusion_options": SMALL, "attn_implementation": implementation}
    tower = MultiEncoderModel(MultiEncoderConfig(encoder_configs=[sizes] * 2, image_size=32, **options))
    assert tower.fusion.query.std() < 0.05
    assert tower.fusion.q_former.config._attn_implementation == implementation
    tower.save_pretrained(tmp_path)
    loaded = MultiEncoderModel.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    assert torch.equal(*(each(pixel_values).last_hidden_state for each in (tower.eval(), loaded)))
    assert loaded.fusion.q_former.config._attn_implementation == implementation
    loaded.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in loaded.fusion.q_former.encoder.layer)


@pytest.mark.parametrize(
    ("implementation", "training"),
    [("sdpa", True)] + [pytest.param(*case, marks=pytest.mark.slow) for case in [("sdpa", False), ("eager", True)]],
)
def test_compiled(implementation, training):
    fusion, given = build(dropout=0.0, depth=2).train(training), features()
    fusion.q_former.set_attn_implementation(implementation)
    compiled = torch.compile(fusion, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    found = compiled(given)
    torch.manual_seed(0)
    torch.testing.assert_close(found, fusion(given))


@torch.no_grad()
def test_half_precision():
    fusion, given = build(), features()
    half = copy.deepcopy(fusion).bfloat16()(features(dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float(), fusion(given), dim=-1).min() > 0.999


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries_per_encoder": 0}, "at least one query per encoder"),
        ({"encoder_dropout": 1.0}, r"encoder_dropout in \[0, 1\), got 1.0"),
        ({"num_heads": 5}, "num_heads to divide width=32, got 5"),
        ({"depth": 0}, "at least one block"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency=0"),
        ({"encoder_drop": 0.1}, "no option 'encoder_drop'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
