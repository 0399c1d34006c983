"""Files of results."""

import json

from vitweave.analysis.whole_files import json_text, write_whole


def test_numbers_that_are_not_finite_become_null(tmp_path):
    found = {"value": float("nan"), "rounds": [{"value": float("inf"), "steps": 3}], "layers": (3, 6), "name": "concat"}
    write_whole(tmp_path / "out" / "found.json", json_text(found))
    read = json.loads((tmp_path / "out" / "found.json").read_text(), parse_constant=lambda word: 1 / 0)
    assert read == {"value": None, "rounds": [{"value": None, "steps": 3}], "layers": [3, 6], "name": "concat"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["found.json"]
