"""Read the results off a model card's page, where only the page is there."""

import re
from pathlib import Path

COLUMN = re.compile(r"(?<!\\)\|")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CONTINUED = re.compile(r"\\\n\s*")
TABLE = re.compile(r"^\|.*\n\|[\s:|-]+\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)
NUMBER = re.compile(r"[*+-]*\d")
RESULT_COLUMNS = ("metric", "dataset", "split", "value", "recompute with")
FACT_COLUMNS = ("fact", "value")  # of the architecture


def read_page(path: Path) -> tuple[list[tuple[str, ...]], list[str], list[str]]:
    """What a page says was measured.

    Returns:
        rows (metric, dataset, split, value, command) of the results; what other tables hold, a line per row with a
        number; and the other commands.
    """
    text = path.read_text(encoding="utf-8")
    commands = [
        command for language, block in FENCE.findall(text) if language.strip() == "bash" for command in lines_of(block)
    ]
    results, figures = [], []
    for table in TABLE.findall(FENCE.sub("", text)):
        head, _, *rows = map(_cells, table.splitlines())
        if head == RESULT_COLUMNS:
            results += [(*row[:-1], row[-1].strip("`")) for row in rows if len(row) == len(head)]
        elif head != FACT_COLUMNS:
            figures += [told(head, row) for row in rows if any(map(NUMBER.match, row[1:]))]
    return results, figures, commands


def lines_of(block: str) -> list[str]:
    """The commands of a block, each in one line."""
    return [line.strip() for line in CONTINUED.sub(" ", block).splitlines() if line.strip()]


def told(head: tuple[str, ...], row: tuple[str, ...]) -> str:
    """`last layer: RSUM = 103.6; parameters = 300,875` of a row; empty cells are left out."""
    cells = [f"{name} = {value}" for name, value in zip(head[1:], row[1:], strict=False) if value]
    return re.sub(r"\*\*|`", "", f"{row[0]}: {'; '.join(cells)}")


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().replace(r"\|", "|") for cell in COLUMN.split(line)[1:-1])
