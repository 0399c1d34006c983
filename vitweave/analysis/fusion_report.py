"""A comparison of fusions as a table, as JSON and as a plot."""

from pathlib import Path

from vitweave.analysis.plots import new_figure
from vitweave.analysis.whole_files import json_text, write_whole


def markdown_table(rows: list[dict]) -> str:
    """One line per fusion, in the given order; RSUM and recalls in per cent."""
    seeds = [entry["seed"] for entry in rows[0]["seeds"]]
    head = ["fusion", "RSUM", "95 % interval", "against the baseline", *(f"seed {seed}" for seed in seeds)]
    head += ["R@1 i→t", "R@1 t→i", "R@10 i→t", "R@10 t→i", "parameters", "ms / image"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        gain = row.get("difference")
        shown = "" if gain is None else "{rsum:+.1f} ({low:+.1f} to {high:+.1f})".format(**in_per_cent(gain))
        recalls = [row["recall"][f"{way}_R@{k}"] for k in (1, 10) for way in ("image_to_text", "text_to_image")]
        lines.append(
            [
                row["fusion"],
                f"{100 * row['rsum']:.1f}",
                f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
                shown,
                *(f"{100 * entry['rsum']:.1f}" for entry in row["seeds"]),
                *(f"{100 * recall:.1f}" for recall in recalls),
                f"{row['parameters']:,}",
                f"{row['milliseconds']:.3f}",
            ]
        )
    return as_table(lines)


def as_table(lines: list[list[str]]) -> str:
    """Lines of cells as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def in_per_cent(values: dict[str, float]) -> dict[str, float]:
    """Every share times 100."""
    return {name: 100 * value for name, value in values.items()}


def best_first(rows: list[dict]) -> list[dict]:
    """The baseline, then the fusions by their RSUM."""
    return [rows[0], *sorted(rows[1:], key=lambda row: -row["rsum"])]


def chance_rsum(pairs: int) -> float:
    """RSUM of a random order: twice the sum of the cutoffs' shares of the gallery."""
    return 2 * sum(min(1.0, cutoff / pairs) for cutoff in (1, 5, 10))


def plot_rows(
    rows: list[dict], path: str | Path, name: str = "fusion", metric: str = "rsum", base: float | None = None, **words
) -> None:
    """Mean with its interval per row, a dot per seed, a line at the baseline.

    Args:
        name, metric: the entries of a row that label it and that are drawn.
        base: where the line stands; None for the first row's.
        words: title, what and line of the label.
    """
    words = {"title": "RSUM", "what": "the validation pairs", "line": "baseline"} | words
    figure = new_figure(8, 1.2 + 0.36 * len(rows))
    axis = figure.subplots()
    for height, row in enumerate(reversed(rows)):
        mean, low, high = (100 * row[entry] for entry in (metric, "low", "high"))
        axis.plot([low, high], [height, height], color="#4477aa", linewidth=2)
        axis.plot([mean], [height], marker="o", color="#4477aa", markersize=7)
        seeds = [100 * entry[metric] for entry in row["seeds"]]
        axis.plot(seeds, [height] * len(seeds), linestyle="", marker="|", color="#222222", markersize=9)
    axis.axvline(100 * (rows[0][metric] if base is None else base), color="#ee6677", linewidth=1, linestyle="--")
    axis.set_yticks(range(len(rows)), [row[name] for row in reversed(rows)])
    axis.set_xlabel("{title} (per cent); bar: 95 % bootstrap over {what}, ticks: seeds, dashed: {line}".format(**words))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def write_report(rows: list[dict], out: str | Path, facts: dict, plot: bool = True) -> str:
    """Write comparison.json, comparison.md and comparison.png into `out`.

    Args:
        facts: what was compared, told above the table and kept in the JSON.

    Returns:
        the table.
    """
    rows = best_first(rows)
    table = markdown_table(rows)
    write_files(rows, out, facts, "Layer fusions in retrieval", table)
    if plot:
        plot_rows(rows, Path(out, "comparison.png"))
    return table


def write_files(rows: list[dict], out: str | Path, facts: dict, title: str, table: str) -> None:
    """comparison.json and comparison.md."""
    out = Path(out)
    write_whole(out / "comparison.json", json_text({"facts": facts, "rows": rows}))
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    write_whole(out / "comparison.md", f"# {title}\n\n{told}\n\n{table}\n")
