"""The sub-pixel head: every score of a patch lands on its own pixel."""

import pytest
import torch

from vitweave.modeling.heads.linear import LinearHead
from vitweave.modeling.heads.registry import build_segmentation_head
from vitweave.modeling.heads.subpixel import SubpixelHead


def test_every_score_has_its_pixel():
    head = SubpixelHead([3, 2], num_labels=2, upsampling=3).eval()
    maps = [torch.randn(2, channels, 4, 5) for channels in (3, 2)]
    logits = head(maps)
    scores = head.classifier(head.norm(torch.cat(maps, dim=1)))
    assert logits.shape == (2, 2, 12, 15)
    for label, row, column in ((0, 0, 0), (0, 1, 2), (1, 2, 1)):
        expected = scores[:, label * 9 + row * 3 + column]
        torch.testing.assert_close(logits[:, label, row::3, column::3], expected)


def test_without_upsampling_it_is_the_linear_head():
    subpixel, linear = SubpixelHead([4], 3, upsampling=1), LinearHead([4], 3)
    linear.load_state_dict(subpixel.state_dict())
    features = [torch.randn(2, 4, 5, 6)]
    torch.testing.assert_close(subpixel(features), linear(features))


def test_learns_a_line_thinner_than_a_patch():
    """One column of pixels per 4-pixel patch: bilinear upsampling of one score per patch cannot draw it."""
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :, 1::4] = 1
    features = [torch.randn(1, 8, 4, 4)]
    head = SubpixelHead([8], 2, upsampling=4)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(50):
        loss = torch.nn.functional.cross_entropy(head(features), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (head(features).argmax(dim=1) == labels).all()


def test_refuses_to_shrink():
    with pytest.raises(ValueError, match="needs upsampling >= 1, got 0"):
        build_segmentation_head("subpixel", [8], 3, {"upsampling": 0})
