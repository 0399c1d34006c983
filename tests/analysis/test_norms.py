import pytest
import torch

from vitweave.analysis.norms import cls_share, median, norm_outliers, one_role_dimensions


def test_median_of_an_even_count_is_between_the_middle_values():
    assert median(torch.tensor([[4.0, 1.0], [10.0, 2.0]])) == 3.0
    assert median(torch.tensor([4.0, 1.0, 10.0])) == 4.0


def test_robust_threshold_by_hand():
    norms = torch.tensor([[8.0, 9.0, 10.0], [11.0, 12.0, 99.0]], dtype=torch.float64)
    found = norm_outliers(norms)  # median 10.5, deviations 2.5 1.5 .5 .5 1.5 88.5, MAD 1.5
    assert found.threshold == pytest.approx(10.5 + 3 * 1.4826 * 1.5)
    assert found.mask.tolist() == [[False] * 3, [False, False, True]]
    assert found.fraction == pytest.approx(1 / 6)


def test_absolute_threshold():
    found = norm_outliers(torch.tensor([10.0, 150.0, 151.0]), threshold=150)
    assert found.mask.tolist() == [False, False, True]


def test_share_and_dimensions_of_one_role():
    share = cls_share(torch.tensor([[1.0, 0.0, 0.0, 9.5]]), torch.tensor([[1.0, 2.0, 0.0, 0.5]]))
    torch.testing.assert_close(share, torch.tensor([[0.5, 0.0, 0.5, 0.95]]))
    assert one_role_dimensions(share, tau=0.9) == {"cls": [[3]], "patch": [[1]]}
    assert one_role_dimensions(share, tau=0.99) == {"cls": [[]], "patch": [[1]]}
    with pytest.raises(ValueError, match="expected tau between"):
        one_role_dimensions(share, tau=0.1)
