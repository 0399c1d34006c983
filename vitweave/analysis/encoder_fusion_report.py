"""A comparison of encoder fusions as a table, as JSON and as a plot."""

from pathlib import Path

from vitweave.analysis.fusion_report import as_table, in_per_cent, plot_rows, write_files


def markdown_table(rows: list[dict]) -> str:
    """One line per row, in the given order; accuracies in per cent, differences in points."""
    seeds = [entry["seed"] for entry in rows[0]["seeds"]]
    head = ["fusion", "accuracy", "95 % interval", *(f"seed {seed}" for seed in seeds)]
    head += ["against the better encoder alone", "against plain concatenation"]
    head += ["learning rate", "parameters", "ms / image"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        gains = row.get("differences", {})
        lines.append(
            [
                row["name"],
                f"{100 * row['accuracy']:.1f}",
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                *(f"{100 * entry['accuracy']:.1f}" for entry in row["seeds"]),
                *(shown(gains[peer]) if peer in gains else "" for peer in ("alone", "concat")),
                f"{row['learning_rate']:g}",
                f"{row['parameters']:,}",
                f"{row['milliseconds']:.2f}",
            ]
        )
    return as_table(lines)


def shown(gain: dict[str, float]) -> str:
    """A difference with its interval."""
    return "{accuracy:+.1f} ({low:+.1f} to {high:+.1f})".format(**in_per_cent(gain))


def best_first(rows: list[dict]) -> list[dict]:
    """The encoders alone, then the fusions by their accuracy."""
    alone = [row for row in rows if "differences" not in row]
    return alone + sorted((row for row in rows if "differences" in row), key=lambda row: -row["accuracy"])


def write_report(rows: list[dict], out: str | Path, facts: dict, plot: bool = True) -> str:
    """Write comparison.json, comparison.md and comparison.png into `out`.

    Args:
        facts: what was compared, told above the table and kept in the JSON.

    Returns:
        the table.
    """
    rows = best_first(rows)
    table = markdown_table(rows)
    write_files(rows, out, facts, "Encoder fusions in classification", table)
    if plot:
        better = max(row["accuracy"] for row in rows if "differences" not in row)
        words = {"title": "accuracy", "what": "the validation images", "line": "better encoder alone"}
        plot_rows(rows, Path(out, "comparison.png"), "name", "accuracy", better, **words)
    return table
