"""`vitweave export MODEL OUT`."""

import argparse


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
