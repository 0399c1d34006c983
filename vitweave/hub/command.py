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
        help="compare the files of a published model with their checksums",
        description="Compare the files in FOLDER with the SHA256SUMS that `vitweave export` wrote there: changed,"
        " missing and added ones are told. No code of FOLDER is run; the card names the commands that recompute its"
        " metrics.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="an exported model")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> None:
    """Check the sums, print how many files were compared and how the metrics are recomputed."""
    from vitweave.hub.card import CardInfo
    from vitweave.hub.checksums import check_sums

    folder = Path(args.folder)
    sums = check_sums(folder)
    print(f"{folder}: {len(sums)} files as published")
    for metric in CardInfo.load(folder).metrics:
        print(f"{metric.name or metric.type} = {metric.value} on {metric.dataset}: recompute with {metric.command}")


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
