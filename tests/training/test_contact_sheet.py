"""The contact sheet shows every hit whole, and says so where a file is gone."""

import numpy as np
import PIL.Image
import pytest

from vitweave.training.contact_sheet import write_contact_sheet
from vitweave.training.image_index import Hit


def test_every_hit_is_shown(tmp_path):
    hits = []
    for number, colour in enumerate([(200, 0, 0), (0, 200, 0), (0, 0, 200)]):
        path = tmp_path / f"{number}.png"
        PIL.Image.new("RGB", (60, 20 + 40 * number), colour).save(path)
        hits.append(Hit(number, 0.5, {"name": f"a rather long name of figure {number} " * 3, "path": str(path)}))
    hits.append(Hit(3, 0.1, {"name": "gone", "path": str(tmp_path / "gone.png")}))
    write_contact_sheet(tmp_path / "sheet.png", "A query of some length.", hits, columns=2, size=100)
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
        assert sheet.width == 2 * 108 + 8
    for number in range(3):
        shown = np.abs(pixels - np.array([200 * (number == channel) for channel in range(3)])).sum(-1) < 30
        rows, columns = np.nonzero(shown)
        high, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert max(high, wide) == pytest.approx(96, abs=1)
        assert wide / high == pytest.approx(60 / (20 + 40 * number), rel=0.05)


def test_nothing_found_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one hit"):
        write_contact_sheet(tmp_path / "sheet.png", "query", [])
