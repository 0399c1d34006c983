"""Read the results off a model card's page, where only the page is there."""

import re
from pathlib import Path

RESULTS = re.compile(r"^## Results$(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
COLUMN = re.compile(r"(?<!\\)\|")
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
METRIC_COLUMNS = 5  # metric, dataset, split, value, command


def read_page(path: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows (metric, dataset, split, value, command) of the results, and the other commands of a page."""
    text = path.read_text(encoding="utf-8")
    results = RESULTS.search(text)
    rows = [_cells(line) for line in results[1].splitlines()] if results else []
    rows = [row for row in rows if len(row) == METRIC_COLUMNS and re.fullmatch("`.+`", row[-1])]
    rows = [(*row[:-1], row[-1].strip("`")) for row in rows]
    return rows, [block.strip() for block in COMMANDS.findall(text)]


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().replace(r"\|", "|") for cell in COLUMN.split(line)[1:-1])
