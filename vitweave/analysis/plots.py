"""The pictures of a report. matplotlib (the extra `viz`) is imported only when something is drawn."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from vitweave.analysis.drift import ParameterDrift
from vitweave.analysis.measurement import TapStatistics
from vitweave.analysis.norms import NormOutliers

BEFORE, AFTER = "#4477aa", "#ee6677"  # readable with colour-vision deficiencies


def new_figure(width: float, height: float):
    """An empty matplotlib figure (no window system needed)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install vitweave[viz]") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def plot_cosine(taps: dict[str, TapStatistics], path: Path) -> None:
    """Cosines before and after each norm, per block; bands are one standard deviation over patches or images."""
    rows = [
        ("cls_patch_cosine", "[CLS] / patch"),
        ("patch_patch_cosine", "patch / patch"),
        ("cls_register_cosine", "[CLS] / register"),
    ]
    rows = [row for row in rows if getattr(taps["before.norm1"], row[0]) is not None]
    figure = new_figure(9, 2.8 * len(rows))
    axes = figure.subplots(len(rows), 2, sharex=True, sharey="row", squeeze=False)
    for row, (statistic, title) in zip(axes, rows, strict=True):
        for axis, norm in zip(row, ("norm1", "norm2"), strict=True):
            for when, colour in (("before", BEFORE), ("after", AFTER)):
                _plot_band(axis, taps[f"{when}.{norm}"], statistic, f"{when} {norm}", colour)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(f"{title}, {norm}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
        row[0].set_ylabel("cosine")
    for axis in axes[-1]:
        axis.set_xlabel("block (0 = first)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(
        "Token similarity: line = mean over images, band = 1 std (over patches for [CLS] / patch, else images)",
        fontsize=10,
    )
    figure.savefig(path)


def _plot_band(axis, statistics: TapStatistics, statistic: str, label: str, colour: str) -> None:
    values = getattr(statistics, statistic)  # (layers, images)
    mean = values.mean(dim=1).numpy()
    over_patches = statistic == "cls_patch_cosine"
    std = (statistics.cls_patch_cosine_std.mean(dim=1) if over_patches else values.std(dim=1, correction=0)).numpy()
    blocks = range(len(mean))
    axis.plot(blocks, mean, marker="o", markersize=3, color=colour, label=label)
    axis.fill_between(blocks, mean - std, mean + std, color=colour, alpha=0.18, linewidth=0)


def plot_dimensions(shares: dict[str, Tensor], tau: float, path: Path) -> None:
    """Share of [CLS] in each dimension's magnitude: sorted heat map per block, and the number of one-role dimensions.

    Args:
        shares: tap -> (layers, hidden).
    """
    figure = new_figure(11, 6.5)
    axes = figure.subplots(2, len(shares), squeeze=False, sharex="row", height_ratios=[3, 2])
    for column, (tap, share) in enumerate(shares.items()):
        axis = axes[0][column]
        ordered = share.sort(dim=1).values.numpy()
        image = axis.imshow(ordered, aspect="auto", vmin=0, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axis.set_title(tap.replace(".", " "))
        axis.set_xlabel("dimensions, sorted by share")
        counts = axes[1][column]
        blocks = range(len(share))
        counts.bar(blocks, (share > tau).sum(dim=1).numpy(), color="#b2182b", label=f"[CLS] only (share > {tau:g})")
        counts.bar(
            blocks, -(share < 1 - tau).sum(dim=1).numpy(), color="#2166ac", label=f"patches only (share < {1 - tau:g})"
        )
        counts.axhline(0, color="black", linewidth=0.8)
        counts.set_xlabel("block (0 = first)")
        counts.grid(alpha=0.3, axis="y")
        counts.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        for located in (axis.yaxis, counts.xaxis, counts.yaxis):
            located.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("block (0 = first)")
    axes[1][0].set_ylabel("number of dimensions")
    low, high = min(a.get_ylim()[0] for a in axes[1]), max(a.get_ylim()[1] for a in axes[1])
    for axis in axes[1]:
        axis.set_ylim(min(low, -1), max(high, 1))
    figure.colorbar(image, ax=list(axes[0]), label="share of [CLS] in the mean magnitude")
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path)


def plot_patch_norms(
    pictures: Tensor, norms: Tensor, grid: tuple[int, int], outliers: NormOutliers, block: int, path: Path
) -> None:
    """Norm maps beside the pictures (outliers ringed), and the histogram over all images.

    Args:
        pictures: (shown, height, width, channels) in [0, 1]; the first images of the set.
        norms: (images, patches).
    """
    shown = len(pictures)
    figure = new_figure(2.2 * max(shown, 3) + 1, 7)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2, 1.1])
    axes = top.subplots(2, shown, squeeze=False)
    low, high = float(norms.min()), float(norms.max())
    scale = "log" if 0 < 10 * low < high else "linear"  # a few huge norms would hide all the others
    for column in range(shown):
        _show(axes[0][column], pictures[column])
        image = _show(axes[1][column], norms[column].reshape(grid), norm=scale, clim=(low, high), cmap="viridis")
        rows, columns = outliers.mask[column].reshape(grid).numpy().nonzero()
        axes[1][column].scatter(columns, rows, s=18, facecolors="none", edgecolors="red", linewidths=0.8)
    bar = top.colorbar(image, ax=axes.ravel().tolist(), label="patch norm")
    top.suptitle(f"Patch norms after block {block}; red rings: above {outliers.threshold:.3g}", fontsize=10)
    axis = bottom.subplots()
    edges = torch.logspace(math.log10(low), math.log10(high), 61).numpy() if scale == "log" else 60
    axis.hist(norms.flatten().numpy(), bins=edges, color=BEFORE)
    axis.set_xscale(scale)
    axis.set_yscale("log")
    if scale == "log":
        _plain_log_ticks(bar.ax.yaxis)
        _plain_log_ticks(axis.xaxis)
    above = f"threshold {outliers.threshold:.3g}: {outliers.fraction:.2%} above"
    axis.axvline(outliers.threshold, color="red", linestyle="--", label=above)
    axis.set_xlabel("norm of the patch token (residual stream)")
    axis.set_ylabel("patches")
    axis.legend()
    figure.savefig(path)


def plot_pca(pictures: Tensor, maps: Tensor, ratio: Tensor, path: Path) -> None:
    """Pictures above their PCA maps.

    Args:
        pictures: (shown, height, width, channels) in [0, 1].
        maps: (shown or more, rows, columns, 3) in [0, 1].
        ratio: (3,) explained variance ratios.
    """
    shown = len(pictures)
    figure = new_figure(2.2 * max(shown, 2), 4.9)
    axes = figure.subplots(2, shown, squeeze=False)
    for column in range(shown):
        _show(axes[0][column], pictures[column])
        _show(axes[1][column], maps[column])
    explained = ", ".join(
        f"{name} {value:.1%}" for name, value in zip(("red", "green", "blue"), ratio.tolist(), strict=True)
    )
    figure.suptitle(
        f"First three principal components of the patch features\n(explained variance: {explained})", fontsize=10
    )
    figure.savefig(path)


def plot_drift(drifts: list[ParameterDrift], path: Path) -> None:
    """Relative drift: a panel per kind of parameter with a bar per block, and one for what lies outside the blocks."""
    kinds = defaultdict(list)
    for drift in drifts:
        kind = "outside the blocks" if drift.block is None else drift.name.split(f".{drift.block}.")[-1]
        kinds[kind].append((drift.name if drift.block is None else drift.block, drift.relative))
    last = max((drift.block for drift in drifts if drift.block is not None), default=0)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(2.9 * columns + 0.6, 2.1 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (kind, values) in zip(axes, kinds.items(), strict=False):
        finite = [(position, value) for position, value in values if value != float("inf")]
        axis.bar([position for position, _ in finite], [value for _, value in finite], color=BEFORE)
        zero = len(values) - len(finite)
        axis.set_title(kind + (f"\n({zero} of {len(values)}: patch parameter is 0)" if zero else ""), fontsize=9)
        axis.set_xlim(-0.7, (max(len(finite), 4) if kind == "outside the blocks" else last + 1) - 0.3)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, axis="y")
        if kind != "outside the blocks":
            axis.xaxis.get_major_locator().set_params(integer=True)
        if not any(value for _, value in finite):
            axis.set_yticks([])
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    figure.supxlabel("block (0 = first)", fontsize=10)
    figure.supylabel("relative drift |cls - patch| / |patch|", fontsize=10)
    figure.savefig(path)


def _show(axis, picture: Tensor, **options):
    axis.set_xticks([])
    axis.set_yticks([])
    return axis.imshow(picture.numpy(), interpolation="nearest", **options)


def _plain_log_ticks(axis) -> None:
    """Label 20, 50, 100 instead of 2 x 10^1 ..."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
