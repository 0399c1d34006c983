import pytest
import torch

from vitweave.analysis.pca import pca_maps, principal_components


def features(images=3, patches=6, hidden=5):
    return torch.randn(images, patches, hidden, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_components_are_the_eigenvectors_of_the_covariance():
    rows = features().flatten(0, 1)
    scores, components, ratio = principal_components(rows)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    values, vectors = values.flip(0), vectors.flip(1)
    torch.testing.assert_close((components @ vectors[:, :3]).abs(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(ratio, values[:3] / values.sum())
    torch.testing.assert_close(scores.var(dim=0), values[:3])


def test_the_loading_of_largest_magnitude_is_positive():
    _, components, _ = principal_components(features().flatten(0, 1))
    assert (components.gather(1, components.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_maps_follow_the_images_and_not_their_order_scale_or_offset():
    found = pca_maps(features(), (2, 3))
    assert found.maps.shape == (3, 2, 3, 3)
    torch.testing.assert_close(pca_maps(features()[[2, 0, 1]], (2, 3)).maps, found.maps[[2, 0, 1]])
    torch.testing.assert_close(pca_maps(7 * features() + 4, (2, 3)).maps, found.maps)
    flat = found.maps.flatten(0, 2)
    assert torch.equal(flat.min(dim=0).values, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(flat.max(dim=0).values, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("side", ["above", "below"])
def test_foreground_is_fitted_again_and_the_rest_is_black(side):
    first = pca_maps(features(), (2, 3)).maps[..., 0]
    found = pca_maps(features(), (2, 3), foreground_threshold=0.5, foreground_side=side)
    assert torch.equal(found.foreground, first > 0.5 if side == "above" else first < 0.5)
    assert not found.maps[~found.foreground].any()
    kept = features()[found.foreground.flatten(1)]
    torch.testing.assert_close(found.components, principal_components(kept)[1])


def test_equal_features_give_black_maps_and_no_nan():
    found = pca_maps(torch.ones(2, 6, 5), (2, 3))
    assert not found.maps.any() and torch.isfinite(found.explained_variance_ratio).all()


def test_refusals():
    with pytest.raises(ValueError, match="expected 2x2=4 patches, got 6"):
        pca_maps(features(), (2, 2))
    with pytest.raises(ValueError, match="at least 3 patches"):
        principal_components(torch.randn(2, 5))
    with pytest.raises(ValueError, match="towards 0"):
        pca_maps(features(), (2, 3), foreground_threshold=0.999)
    with pytest.raises(ValueError, match="unknown foreground_side 'left'"):
        pca_maps(features(), (2, 3), foreground_threshold=0.5, foreground_side="left")
