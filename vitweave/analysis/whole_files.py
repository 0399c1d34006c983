"""Text files that are there whole or not at all, and JSON that every reader takes."""

import json
import math
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write beside the target and rename, so that a process killed at any time leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def json_text(content: dict) -> str:
    """JSON with null in place of numbers that are not finite, for which JSON has no word."""

    def known(value):
        if isinstance(value, dict):
            return {key: known(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [known(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(known(content), indent=1, allow_nan=False) + "\n"
