"""Sequence concatenation: the two orders, class tokens, projectors, refusals."""

import pytest
import torch
from encoder_maps import random_maps

from vitweave.modeling.encoder_fusion.base import EncoderMaps
from vitweave.modeling.encoder_fusion.sequence_concat import SequenceConcatFusion

GRIDS = [(2, 3), (3, 2), (1, 6)]


def numbered(index: int, grid: tuple[int, int]) -> torch.Tensor:
    """The map of encoder `index` with 10 * index + k in cell k, row by row."""
    return (10 * index + torch.arange(grid[0] * grid[1])).float().view(1, 1, *grid)


def order_of(order: str, grids: list, prefixes: list | None = None) -> list[int]:
    fusion = SequenceConcatFusion(
        [1] * len(grids),
        grids,
        order=order,
        projector="identity",
        num_prefixes=None if prefixes is None else [0 if prefix is None else len(prefix) for prefix in prefixes],
    )
    kept = [None if prefix is None else torch.tensor(prefix).float().view(1, -1, 1) for prefix in prefixes or []]
    maps = [numbered(index, grid) for index, grid in enumerate(grids)]
    return fusion(EncoderMaps(maps, kept)).flatten().int().tolist()


def test_interleaving_takes_the_encoders_in_turn():
    assert order_of("interleave", GRIDS[:2]) == [0, 10, 1, 11, 2, 12, 3, 13, 4, 14, 5, 15]
    assert order_of("interleave", [(1, 2)] * 3) == [0, 10, 20, 1, 11, 21]
    assert order_of("interleave", GRIDS)[-3:] == [5, 15, 25]


def test_appending_takes_one_encoder_after_the_other():
    assert order_of("append", [(1, 2), (2, 2)]) == [0, 1, 10, 11, 12, 13]
    assert order_of("append", [(1, 2), (1, 1)], [[7, 8], None]) == [7, 8, 0, 1, 10]
    assert order_of("append", [(1, 2), (1, 1)], [None, [9]]) == [0, 1, 9, 10]


def test_every_encoder_has_a_projector_of_its_own():
    fusion = SequenceConcatFusion([32, 48], GRIDS[:2], 40)
    features = random_maps((32, 48), GRIDS[:2])
    fused = fusion(features)
    for index, projector in enumerate(fusion.projectors):
        torch.testing.assert_close(fused[:, index::2], projector(features.maps[index].flatten(2).transpose(1, 2)))
    assert SequenceConcatFusion([32, 48], GRIDS[:2]).hidden_size == 32


def test_only_appending_reads_class_tokens():
    assert SequenceConcatFusion([32, 32], [(2, 3), (1, 1)], order="append").takes_prefixes
    fusion = SequenceConcatFusion([32, 32], GRIDS[:2])
    assert not fusion.takes_prefixes
    features = random_maps((32, 32), GRIDS[:2], prefixes=(1, 1))
    assert torch.equal(fusion(features), fusion(EncoderMaps(features.maps)))


@pytest.mark.parametrize(
    ("grids", "options", "message"),
    [
        ([(2, 3), (4, 6)], {}, r"as many tokens of every encoder with order='interleave', got \[6, 24\]"),
        (GRIDS[:2], {"order": "alternate"}, "expected order to be 'interleave' or 'append', got 'alternate'"),
        (GRIDS[:2], {"num_prefixes": [1, 1]}, "expected no class tokens with order='interleave'"),
        (GRIDS[:2], {"order": "append", "num_prefixes": [1]}, "one entry of num_prefixes for each of 2 encoders"),
        (GRIDS[:2], {"projector": ["linear"]}, "one entry of projector for each of 2 encoders"),
        (GRIDS[:2], {"projector": "identity"}, "expected 32 channels of every encoder with projector='identity'"),
        (GRIDS[:2], {"projector": ["linear", "residual"]}, "got 48 of encoder 1"),
        (GRIDS[:2], {"projector": "mlp"}, "unknown projector 'mlp'"),
    ],
)
def test_what_does_not_fit_is_refused(grids, options, message):
    with pytest.raises(ValueError, match=message):
        SequenceConcatFusion([32, 48], grids, **options)


def test_class_tokens_that_were_not_planned_are_refused():
    fusion = SequenceConcatFusion([32, 48], GRIDS[:2], order="append", num_prefixes=[1, 0])
    assert fusion(random_maps((32, 48), GRIDS[:2], (1, 0))).shape[1] == fusion.num_tokens == 13
    for prefixes, index, found in (((0, 0), 0, 0), ((5, 0), 0, 5), ((1, 2), 1, 2), (None, 0, 0)):
        with pytest.raises(ValueError, match=rf"num_prefixes=\[1, 0\] .* got {found} of encoder {index}"):
            fusion(random_maps((32, 48), GRIDS[:2], prefixes))
