"""Drawn figures: the same every time, and what the caption says is there."""

import numpy as np
import pytest

from vitweave.training.synthetic_figures import COLOURS, KINDS, SyntheticFigures


def test_a_record_is_always_the_same():
    first, second = SyntheticFigures(6)[3], SyntheticFigures(6)[3]
    assert first["caption"] == second["caption"] and first["image"].tobytes() == second["image"].tobytes()
    assert SyntheticFigures(6, seed=1)[3]["caption"] != first["caption"]
    assert {key: value for key, value in first.items() if key != "image"} == SyntheticFigures(6).fields(3)


def test_each_panel_has_the_colour_its_sentence_names():
    figures = SyntheticFigures(20, panel_size=48)
    kinds = set()
    for index, record in enumerate(figures):
        assert record["caption"] == " ".join(record["sentences"]) and record["image"].size == (96, 48)
        pixels = np.asarray(record["image"]).reshape(48, 2, 48, 3)
        for column, (kind, colour) in enumerate(figures.panels(index)):
            kinds.add(kind)
            assert f"A {colour} {kind} on the" in record["sentences"][column]
            shares = {name: (pixels[:, column] == value).all(-1).mean() for name, value in COLOURS.items()}
            assert max(shares, key=shares.get) == colour and shares[colour] > 0.02
            assert sum(share > 0 for share in shares.values()) == 1
    assert kinds == set(KINDS)


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError):
        SyntheticFigures(3)[3]
