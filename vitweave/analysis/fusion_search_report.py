"""A search over fusions as a table with its reasons, as JSON, and as a Pareto plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from vitweave.analysis.fusion_report import as_table
from vitweave.analysis.plots import AFTER, BEFORE, new_figure
from vitweave.analysis.whole_files import json_text, write_whole


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points (cost, score) that no other beats in both, by rising cost; of equal points the first."""
    order = sorted(range(len(points)), key=lambda place: (points[place][0], -points[place][1]))
    front: list[int] = []
    for place in order:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front


def final_table(found: dict) -> str:
    """The chosen candidate and the baselines on the validation images."""
    seeds = [entry["seed"] for entry in found["final"][0]["seeds"]]
    head = [f"{found['metric']} on validation", "value", "95 % interval", *(f"seed {seed}" for seed in seeds)]
    head += ["the chosen one against it", "ms / image", "MiB", "GFLOPs", "parameters", "within the budget"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in found["final"]:
        gain = row.get("difference")
        lines.append(
            [
                row["name"] + (" (chosen)" if row["name"] == found["chosen"] else ""),
                f"{row['value']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
                *(f"{entry['value']:.4f}" for entry in row["seeds"]),
                "" if gain is None else "{value:+.4f} ({low:+.4f} to {high:+.4f})".format(**gain),
                *cost_cells(row),
                "yes" if row["within"] else "no",
            ]
        )
    return as_table(lines)


def cost_cells(row: dict) -> list[str]:
    """Cost as a table shows it."""
    return [
        f"{row['milliseconds']:.2f}",
        f"{row['mebibytes']:.1f}",
        f"{row['gigaflops']:.3f}",
        f"{row['parameters']:,}",
    ]


def rounds_table(found: dict) -> str:
    """Every candidate with its value in every round, those that got furthest first."""
    steps = sorted({entry["steps"] for row in found["candidates"] for entry in row["rounds"]})
    sign = 1 if found["lower_is_better"] else -1

    def place(row: dict) -> tuple:
        return -len(row["rounds"]), sign * row["rounds"][-1]["value"] if row["rounds"] else 0.0

    head = ["candidate", *(f"{count} steps" for count in steps), "ms / image", "MiB", "GFLOPs", "parameters"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in sorted(found["candidates"], key=place):
        values = {entry["steps"]: f"{entry['value']:.4f}" for entry in row["rounds"]}
        name = row["name"] + ("" if row["within"] else " (beyond the budget)")
        lines.append([name, *(values.get(count, "") for count in steps), *cost_cells(row)])
    return as_table(lines)


def told_reasons(reasons: dict) -> str:
    """The reasons in words and one matrix."""
    parts = []
    if "similarity" in reasons:
        names = [str(layer) for layer in reasons["layers"]]
        rows = [["layer", *names], ["---", *["---:"] * len(names)]]
        rows += [
            [name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, reasons["similarity"], strict=True)
        ]
        parts.append(
            "Mean cosine between the same token in two layers, after each layer's mean is taken away (1 = the second"
            f" layer adds no direction to the first):\n\n{as_table(rows)}"
        )
    layers = reasons.get("chosen_layers", [])
    for name, words in (
        ("weights", "The trained fusion weighs the layers"),
        ("columns", "Share of each layer in the squared weights of the trained projection"),
    ):
        if name in reasons:
            shares = ", ".join(f"layer {layer} {share:.2f}" for layer, share in zip(layers, reasons[name], strict=True))
            parts.append(f"{words}: {shares}.")
    if "gammas" in reasons:
        sizes = ", ".join(f"{name} {value:.3f}" for name, value in reasons["gammas"].items())
        parts.append(f"Mean size of what the fusion adds to the encoder's own output (gamma): {sizes}.")
    return "\n\n".join(parts)


def plot_pareto(found: dict, path: str | Path, limit: float | None = None) -> None:
    """Value on the held-out images against milliseconds per image: a panel each for the first and the last two rounds.

    Args:
        limit: of the budget in milliseconds, if it has one.
    """
    steps = sorted({entry["steps"] for row in found["candidates"] for entry in row["rounds"]})
    steps = sorted({*steps[:1], *steps[-2:]})
    figure = new_figure(4.6 * max(1, len(steps)), 4.2)
    for axis, count in zip(figure.subplots(1, max(1, len(steps)), squeeze=False)[0], steps, strict=False):
        rows = [
            (row["milliseconds"], entry["value"], row["name"])
            for row in found["candidates"]
            for entry in row["rounds"]
            if entry["steps"] == count and math.isfinite(entry["value"])
        ]
        sign = -1 if found["lower_is_better"] else 1
        front = [rows[place] for place in pareto_front([(cost, sign * value) for cost, value, _ in rows])]
        axis.plot([row[0] for row in rows], [row[1] for row in rows], linestyle="", marker="o", color=BEFORE)
        axis.step([row[0] for row in front], [row[1] for row in front], where="post", color=AFTER, linewidth=1)
        middle = (min(row[0] for row in rows) + max(row[0] for row in rows)) / 2
        for cost, value, name in front:
            shown = {"fontsize": 7, "fontweight": "bold" if name == found["chosen"] else "normal"}
            shown |= {"ha": "left", "xytext": (3, 3)} if cost <= middle else {"ha": "right", "xytext": (-3, 5)}
            axis.annotate(name, (cost, value), textcoords="offset points", **shown)
        if limit is not None:
            axis.axvline(limit, color="#222222", linewidth=1, linestyle="--")
        axis.set_title(f"{len(rows)} candidates after {count} steps", fontsize=9)
        axis.set_xlabel("ms / image")
        axis.set_ylabel(f"{found['metric']} on the held-out training images", fontsize=8)
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
    figure.savefig(path)


def write_report(found: dict, out: str | Path, facts: dict, plot: bool = True, limit: float | None = None) -> str:
    """Write search.json, search.md and search.png into `out`.

    Args:
        found: see `FusionSearch.run`.
        facts: what was searched, told above the tables and kept in the JSON.
        limit: see `plot_pareto`.

    Returns:
        the table of the final runs.
    """
    out, table = Path(out), final_table(found)
    write_whole(out / "search.json", json_text({"facts": facts, **found}))
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    order = "lower is better" if found["lower_is_better"] else "higher is better"
    text = [
        f"# Search over fusions: {found['chosen']}",
        told,
        f"Differences are chosen minus baseline, image by image; {order}.\n\n{table}",
        f"## Rounds\n\n{found['metric']} on the held-out training images.\n\n{rounds_table(found)}",
        f"## Why\n\n{told_reasons(found['reasons'])}",
    ]
    write_whole(out / "search.md", "\n\n".join(text) + "\n")
    if plot:
        plot_pareto(found, out / "search.png", limit)
    return table
