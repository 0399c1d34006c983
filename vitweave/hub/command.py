"""`vitweave export MODEL OUT`."""

import argparse
from pathlib import Path


def add_export_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "export",
        help="write a model with its code, so that it loads with transformers alone",
        description="Write weights, config, processor, flattened code and a model card into OUT, and check in a process"
        " without vitweave that they load and give the same outputs.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a saved vitweave model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--card", help="JSON with the card's texts and metrics (default: vitweave_card.json in MODEL)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it already holds a model")
    parser.add_argument("--no-verify", action="store_true", help="skip the check that OUT loads without vitweave")
    parser.set_defaults(run=run_export)


def add_verify_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare the files of a published model with their checksums, and its metrics with new ones",
        description="Compare the files in FOLDER with the SHA256SUMS that `vitweave export` wrote there: changed,"
        " missing and added ones are told. Then measure the metrics of its card again on the data sets that are given."
        " Neither code of FOLDER nor a command of its card is run. Of a card alone, a CARD.md, the metrics are listed.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="an exported model, or the page of a card")
    parser.add_argument(
        "--data",
        metavar="NAME=PATH",
        type=name_and_path,
        nargs="+",
        action="extend",
        default=[],
        help="where a data set of the card lies, whose metrics are then measured again",
    )
    parser.add_argument("--tolerance", type=float, default=0.005, help="largest difference that passes (0.005)")
    parser.set_defaults(run=run_verify)


def name_and_path(text: str) -> tuple[str, Path]:
    """`NAME=PATH` as an argument."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, Path(path)


def printable(text: object) -> str:
    """What stands on a card, in one line that can do nothing to a terminal."""
    return " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())


def run_verify(args: argparse.Namespace) -> None:
    """Check files, data and metrics, in this order; print what was found, and fail where it differs."""
    from vitweave.hub.card import CardInfo
    from vitweave.hub.checksums import check_sums
    from vitweave.hub.recompute import check_data, recompute

    folder, data = Path(args.folder), dict(args.data)
    if folder.suffix == ".md" and folder.is_file():
        list_page(folder)
        return
    sums = check_sums(folder)
    print(f"{folder}: {len(sums)} files as published")
    card = CardInfo.load(folder)
    for name, known in check_data(card, data).items():
        print(f"{name}: {'data as published' if known else 'the card has no SHA-256 of the data, they may be others'}")
    differing = []
    for found in recompute(folder, card.metrics, data):
        metric = found.metric
        place = metric.dataset if metric.split is None else f"{metric.dataset}, {metric.split}"
        what = printable(f"{metric.name or metric.type} on {place}: {metric.value:.6g}")
        if found.value is None:
            print(f"{what}, not recomputed: {printable(found.reason)}; by its author: {printable(metric.command)}")
            continue
        print(f"{what}, recomputed {found.value:.6g}, difference {found.difference:+.2g}")
        if not abs(found.difference) <= args.tolerance:  # a NaN differs
            differing.append(f"{what} but recomputed {found.value:.6g}")
    if differing:
        raise ValueError(f"{len(differing)} metrics differ by more than {args.tolerance:g}: {'; '.join(differing)}")


def list_page(path: Path) -> None:
    """Print what a card's page says was measured, and how."""
    from vitweave.hub.card_page import read_page

    rows, figures, commands = read_page(path)
    print(f"{path}: the page of a card, there is no model to evaluate; its commands, none of which was run:")
    for name, dataset, split, value, command in rows:
        print(printable(f"{name} on {dataset}, {split}: {value}, by {command}"))
    for line in (*figures, *commands):
        print(printable(line))


def run_export(args: argparse.Namespace) -> None:
    """Load MODEL, export it, print what was written."""
    from vitweave.hub.card import CardInfo
    from vitweave.hub.export import export, load_card, load_model, load_processor

    card = CardInfo.load(args.card) if args.card else None  # a mistake in it is told before the model is loaded
    model = load_model(args.model)
    card = card or load_card(args.model)
    processor = load_processor(args.model)
    folder = export(model, args.out, processor, card, overwrite=args.force, verify=not args.no_verify)
    checked = "not checked" if args.no_verify else "checked in a process without vitweave"
    print(f"{folder}: {len(list(folder.iterdir()))} files, {checked}")
