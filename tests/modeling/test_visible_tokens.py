import pytest
import torch

from vitweave.configuration.image_tokens import visible_grid
from vitweave.modeling.visible_tokens import add_newlines, visible_cells

SHAPES = [(480, 640), (640, 480), (1, 1), (300, 100), (100, 300), (1, 5000), (5000, 1), (333, 334), (110, 176)]


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (4, (480, 640), (4, 4, 0, 0)),
        (4, (900, 300), (4, 2, 0, 1)),
        (24, (480, 640), (18, 24, 3, 0)),
        (24, (110, 176), (16, 24, 4, 0)),  # int(110 * 24 / 176) = 15, padding of 9 // 2 rows
        (24, (1, 5000), (2, 24, 11, 0)),
        (27, (5000, 1), (27, 1, 0, 13)),
    ],
)
def test_visible_part_of_a_square(side, size, expected):
    assert visible_grid(side, *size) == expected


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="positive size, got side=24, image 0x5"):
        visible_grid(24, 0, 5)


@pytest.mark.parametrize("side", [1, 4, 24, 27])
def test_tensors_and_numbers_agree(side):
    cells = visible_cells(torch.tensor(SHAPES), side)
    for found, size in zip(cells, SHAPES, strict=True):
        rows, columns, top, left = visible_grid(side, *size)
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[top : top + rows, left : left + columns] = True
        assert torch.equal(found, expected), size


def test_rows_end_with_a_newline():
    side, newline = 6, torch.full((8,), -1.0)
    tokens = torch.arange(len(SHAPES) * side * side).view(-1, side * side, 1).expand(-1, -1, 8).float()
    found = add_newlines(tokens, torch.tensor(SHAPES), newline)
    for image, (part, size) in enumerate(zip(found, SHAPES, strict=True)):
        rows, columns, top, left = visible_grid(side, *size)
        expected = []
        for row in range(top, top + rows):
            start = image * side * side + row * side + left
            expected += [*range(start, start + columns), -1]
        assert part.shape == (rows * (columns + 1), 8) and part[:, 3].tolist() == expected
    whole = add_newlines(tokens[:2], None, newline)
    assert [len(part) for part in whole] == [42, 42] and whole[1][6].eq(-1).all()


def test_newlines_and_tokens_get_gradients():
    newline = torch.zeros(8, requires_grad=True)
    tokens = torch.randn(1, 16, 8, requires_grad=True)
    add_newlines(tokens, torch.tensor([[4, 2]]), newline)[0].sum().backward()
    assert newline.grad.eq(4).all() and tokens.grad.sum() == 8 * 8


def test_a_row_of_tokens_is_refused():
    with pytest.raises(ValueError, match="square grids of tokens to put newlines into, got 12 tokens"):
        add_newlines(torch.zeros(1, 12, 8), None, torch.zeros(8))
