"""FID and KID against their formulas, on the features of a given network."""

import numpy as np
import pytest
import torch
from modality_translators import target_images
from scipy.linalg import sqrtm
from torch import nn
from transformers import ViTConfig, ViTModel, set_seed

from vitweave.training import image_distances
from vitweave.training.image_distances import EncoderFeatures, ImageDistances
from vitweave.training.translation_metrics import TranslationMetrics

WIDTH = 6


@pytest.fixture(autouse=True)
def torchmetrics(request):
    if "without" not in request.node.name:
        pytest.importorskip("torchmetrics", reason="needs torchmetrics")


class Statistics(nn.Module):
    """Mean and spread of the channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def sets(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and drawn images (batch, 3, 32, 48) in [0, 1], which differ in brightness and contrast."""
    tints = torch.rand(2, count, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    real = 0.3 * (target_images(count) + 1) / 2 + 0.5 * tints[0]
    drawn = 0.2 * (target_images(count, seed=2) + 1) / 2 + 0.6 * tints[1]
    return real, drawn


def filled(*images: torch.Tensor, **options) -> ImageDistances:
    distances = ImageDistances(Statistics(), **options)
    for real, part in zip((True, False), images, strict=True):
        for batch in part.split(7):
            distances.update(batch, real)
    return distances


def frechet(real: np.ndarray, drawn: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    first, second = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
    mixed = sqrtm(first @ second).real
    return ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(first + second - 2 * mixed)


def kernel_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """The unbiased squared MMD under (x y / width + 1)^3."""
    inner, across = (
        [(a @ b.T / WIDTH + 1) ** 3 for a, b in pairs] for pairs in (((real, real), (drawn, drawn)), ((real, drawn),))
    )
    count = len(real)
    same = sum((part.sum() - np.trace(part)) / (count * (count - 1)) for part in inner)
    return same - 2 * across[0].mean()


def test_both_follow_their_formulas():
    images = sets()
    real, drawn = (Statistics()(part).double().numpy() for part in images)
    found = filled(*images).compute()
    assert found["fid"] == pytest.approx(frechet(real, drawn), rel=1e-3) and found["fid"] > 0.001
    assert found["kid"] == pytest.approx(kernel_distance(real, drawn), rel=1e-2) and found["kid"] > 0.001


def test_equal_sets_are_at_no_distance_and_few_images_at_none():
    real, drawn = sets()
    found = filled(real, real).compute()
    assert abs(found["fid"]) < 1e-6 and found["kid"] < 1e-4
    assert all(np.isnan(value) for value in filled(real[:1], drawn[:1]).compute().values())
    distances = filled(real, drawn)
    distances.reset()
    assert np.isnan(distances.compute()["fid"])


def test_subsets_have_a_seed_of_their_own():
    images = sets()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = filled(*images, kid_subsets=5, kid_subset_size=10).compute()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert filled(*images, kid_subsets=5, kid_subset_size=10).compute() == found
    assert found["kid"] != filled(*images).compute()["kid"]


def test_translation_figures_hold_them_and_unmeasured_pixels_do_not_count():
    real, drawn = (2 * part - 1 for part in sets())
    real[:, :, :4] = float("nan")
    found = []
    for noise in (0.0, 5.0):
        changed = drawn.clone()
        changed[:, :, :4] += noise
        metrics = TranslationMetrics(ImageDistances(Statistics()))
        metrics.update(changed, real)
        found.append(metrics.compute())
    assert found[0] == found[1] and {"mae", "ssim", "fid", "kid"} <= found[0].keys() and found[0]["fid"] > 0
    metrics.reset()
    assert np.isnan(metrics.compute()["fid"])


def test_any_encoder_gives_features():
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).eval()
    features = EncoderFeatures(vit, size=32)
    images = sets(6)[0]
    square = nn.functional.interpolate(images, size=(32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    expected = vit((square - features.mean) / features.std).pooler_output
    torch.testing.assert_close(features(images), expected)
    distances = ImageDistances(features)
    assert not any(part.requires_grad for part in vit.parameters())
    for real, part in zip((True, False), sets(6), strict=True):
        distances.update(part, real)
    assert distances.compute()["fid"] >= 0


def test_features_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"features \(batch, features\) of 2 images"):
        ImageDistances(nn.Identity()).update(torch.zeros(2, 3, 16, 16), True)


def test_without_the_library_the_extra_is_named(monkeypatch):
    def missing(name: str):
        return None

    monkeypatch.setattr(image_distances.importlib.util, "find_spec", missing)
    with pytest.raises(ImportError, match=r"needs torchmetrics.*vitweave\[fid\]"):
        ImageDistances(Statistics())
