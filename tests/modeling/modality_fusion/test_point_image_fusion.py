import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitweave.modeling.modality_fusion.point_image_fusion import PointImageFusion, project_points, sample_points

SIZE = (48, 80)


def build(start="released", **options):
    torch.manual_seed(0)
    fusion = PointImageFusion([8, 12], 10, 32, start=start, **options)
    if start == "released":
        for name, tensor in fusion.state_dict().items():
            if not name.endswith(("num_batches_tracked", "running_var")):
                nn.init.normal_(tensor, std=0.3)
    return fusion.eval()


def scene(points=40, batch=2, dtype=torch.float32):
    """Arguments of the forward; about a quarter of the points lie outside."""
    generator = torch.Generator().manual_seed(1)
    uv = (torch.rand(points, 2, generator=generator) * 1.2 - 0.1) * torch.tensor([SIZE[1], SIZE[0]])
    pyramid = [torch.randn(batch, 8, 12, 20, generator=generator), torch.randn(batch, 12, 6, 10, generator=generator)]
    features = torch.randn(points, 10, generator=generator)
    index = torch.randint(batch, (points,), generator=generator)
    return [features.to(dtype), [level.to(dtype) for level in pyramid], uv.to(dtype), index, SIZE]


def test_points_read_the_map_as_grid_sample_does():
    _, (level, _), uv, index, size = scene(points=60)
    level = level.double().requires_grad_()
    places = uv.double() / torch.tensor([size[1], size[0]])
    found = sample_points(level, places, index)
    grid = (2 * places - 1)[None, None].expand(2, -1, -1, -1)
    expected = F.grid_sample(level, grid, padding_mode="zeros", align_corners=False)[index, :, 0, torch.arange(60)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), level)[0], torch.autograd.grad(expected.square().sum(), level)[0]
    )


def test_outside_of_the_map_there_is_zero():
    places = torch.tensor([[-0.5, 0.5], [0.5, 1.5], [float("nan"), 0.5], [1e30, -1e30], [float("inf"), 0.5]])
    assert not sample_points(torch.ones(1, 3, 4, 6), places, torch.zeros(5, dtype=torch.long)).any()
    centres = torch.tensor([[0.5 / 6, 0.5 / 4], [5.5 / 6, 3.5 / 4]])
    numbered = torch.arange(24.0).view(1, 1, 4, 6)
    found = sample_points(numbered, centres, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.0, 23.0]), atol=1e-5, rtol=0)


def test_points_are_projected_through_their_own_camera():
    camera = torch.tensor([[100.0, 0, 50, 0], [0, 100, 40, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    points = torch.tensor([[0.0, 0, 5], [1, -1, 10]])
    expected = torch.tensor([[50.0, 40.0], [60.0, 30.0]])
    torch.testing.assert_close(project_points(points, camera), expected)
    torch.testing.assert_close(project_points(points, camera.expand(2, 4, 4)), expected)


@torch.no_grad()
def test_the_order_of_the_points_does_not_matter():
    fusion, (features, pyramid, uv, index, size) = build(), scene()
    order = torch.randperm(40)
    found = fusion(features[order], pyramid, uv[order], index[order], size)
    torch.testing.assert_close(found, fusion(features, pyramid, uv, index, size)[order])


@torch.no_grad()
def test_a_point_sees_its_own_image_only():
    fusion, (features, pyramid, uv, index, size) = build(), scene()
    changed = [torch.where(torch.tensor([False, True]).view(2, 1, 1, 1), float("nan"), level) for level in pyramid]
    before, after = (fusion(features, levels, uv, index, size) for levels in (pyramid, changed))
    assert torch.equal(after[index == 0], before[index == 0]) and after[index == 1].isnan().any()
    one = index == 1
    alone = fusion(features[one], [level[1:] for level in pyramid], uv[one], index[one] - 1, size)
    torch.testing.assert_close(alone, before[one])


@torch.no_grad()
def test_it_starts_as_the_mean_of_both():
    fusion, (features, pyramid, uv, index, size) = build(start="identity"), scene()
    image = fusion.image_norm(fusion.image_proj(fusion.read_pyramid(pyramid, uv, index, size)))
    points = fusion.point_norm(fusion.point_proj(features))
    torch.testing.assert_close(fusion(features, pyramid, uv, index, size), F.relu((image + points) / 2))
    assert fusion.image_norm.eps == fusion.point_norm.eps == 1e-3


def test_every_weight_gets_a_gradient():
    fusion = build().train()
    fusion(*scene()).square().sum().backward()
    idle = {name for name, parameter in fusion.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not idle


def test_compiled():
    fusion, given = build(), scene()
    torch.testing.assert_close(torch.compile(fusion, fullgraph=True, backend="eager")(*given), fusion(*given))


@torch.no_grad()
def test_half_precision():
    fusion, given = build(), scene()
    half = copy.deepcopy(fusion).bfloat16()
    features, pyramid, *places = scene(dtype=torch.bfloat16)
    found = half(features, pyramid, *given[2:4], places[-1])  # places in the image stay exact
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), fusion(*given), dim=-1).mean() > 0.99


def test_a_pyramid_of_other_levels_is_refused():
    features, pyramid, *rest = scene()
    with pytest.raises(ValueError, match="pyramid of 2 levels, got 1"):
        build()(features, pyramid[:1], *rest)
