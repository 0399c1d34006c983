"""The `vitweave` command.

A sub-command lives beside the code it runs: `add_<name>_command(subparsers)` adds its parser and sets `run`, a function
of the parsed arguments that returns an exit code or None. `COMMANDS` lists them; heavy imports belong inside `run`.
"""

import argparse
import sys
import traceback

from vitweave.analysis.command import add_inspect_command
from vitweave.cli_compare import add_compare_command
from vitweave.cli_compare_encoders import add_compare_encoders_command
from vitweave.cli_convert import add_convert_command
from vitweave.cli_cost import add_cost_command
from vitweave.cli_search import add_index_command, add_search_command
from vitweave.cli_search_fusion import add_search_fusion_command
from vitweave.cli_specialize import add_specialize_command
from vitweave.hub.command import add_export_command, add_verify_command

COMMANDS = (
    add_specialize_command,
    add_convert_command,
    add_inspect_command,
    add_export_command,
    add_verify_command,
    add_index_command,
    add_search_command,
    add_compare_command,
    add_cost_command,
    add_compare_encoders_command,
    add_search_fusion_command,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every sub-command."""
    parser = argparse.ArgumentParser(prog="vitweave", description="Woven vision encoders for transformers.")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for add_command in COMMANDS:
        add_command(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; an error is one line and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
