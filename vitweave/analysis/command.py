"""`vitweave inspect`: token similarity, norms, PCA maps and drift of a model on images."""

import argparse
from pathlib import Path


def add_inspect_command(subparsers) -> None:
    """Add the sub-command to the `vitweave` parser."""
    parser = subparsers.add_parser(
        "inspect", help="measure a model's tokens on images; write plots and a JSON", description=__doc__
    )
    parser.add_argument("model", help="folder or Hub id of a vision model, vanilla or specialised")
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="use only the first images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default=None, help="e.g. cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--tau", type=float, default=0.9, help="share from which a dimension belongs to one role (default: %(default)s)"
    )
    parser.add_argument(
        "--norm-threshold",
        type=float,
        default=None,
        help="absolute patch-norm threshold (default: median + 3 * 1.4826 * MAD)",
    )
    parser.add_argument(
        "--norm-block",
        type=int,
        default=None,
        help="block after which patch norms are taken, 0 = first (default: the last)",
    )
    parser.add_argument(
        "--foreground-threshold",
        type=float,
        default=None,
        help="fit the PCA maps again to the patches on one side of it, 0..1",
    )
    parser.add_argument("--foreground-side", choices=("above", "below"), default="above")
    parser.add_argument("--no-plots", action="store_true", help="write only the JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `vitweave inspect`."""
    from vitweave.analysis.report import (
        InspectOptions,  # late: the other sub-commands start faster
        inspect_model,  # late: the other sub-commands start faster
    )

    options = InspectOptions(
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device,
        tau=args.tau,
        norm_threshold=args.norm_threshold,
        norm_block=args.norm_block,
        foreground_threshold=args.foreground_threshold,
        foreground_side=args.foreground_side,
        plots=not args.no_plots,
        progress=True,
    )
    report = inspect_model(args.model, args.images, args.out, options=options)
    print(summary(report))
    print(f"wrote {args.out / 'report.json'}" + "".join(f", {name}" for name in report["plots"]))
    return 0


def summary(report: dict) -> str:
    """The findings of a report in a few lines."""
    lines = [f"{report['model']} ({report['model_type']}), {len(report['images'])} images of {report['grid']} patches"]
    for norm in ("norm1", "norm2"):
        taps = [(report["token_similarity"] or {}).get(f"{when}.{norm}", {}) for when in ("before", "after")]
        if all("cls_patch_cosine" in tap for tap in taps):
            before, after = (tap["cls_patch_cosine"]["mean"] for tap in taps)
            mean_before, mean_after = sum(before) / len(before), sum(after) / len(after)
            lines.append(
                f"[CLS] / patch cosine, mean over blocks: {mean_before:+.3f} before {norm}, {mean_after:+.3f} after"
            )
    if report["patch_norms"]:
        norms = report["patch_norms"]
        lines.append(f"patch norms above {norms['threshold']:.3g}: {norms['fraction_above']:.2%}")
    lines += [f"skipped {analysis}: {reason}" for analysis, reason in report["skipped"].items()]
    return "\n".join(lines)
