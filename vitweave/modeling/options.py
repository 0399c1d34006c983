"""Parts chosen by name: the class behind a name, and its constructor's arguments as the options."""

import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from vitweave.configuration.option_types import check_option_types

Part = TypeVar("Part")


def closest(name: str, known: Collection[str]) -> str:
    """` (did you mean ...?)` when a known name is close, else nothing."""
    hints = difflib.get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(map(repr, hints))}?)" if hints else ""


def pick(table: Mapping[str, Part], name: str, role: str) -> Part:
    """The entry of a registry, or an error that lists the known names."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {role} {name!r}{closest(str(name), table)}; known: {sorted(table)}")
    return table[name]


def check_options(part: type, options: Mapping[str, Any], given: Collection[str], owner: str) -> None:
    """Refuse by name the options that the constructor of `part` does not take, those it needs but did not get, and
    values of another kind than it takes.

    Args:
        options: what the user wrote.
        given: names of the arguments that the builder fills in itself.
        owner: what the options belong to, for the message, e.g. "the head 'linear'".
    """
    if not isinstance(options, Mapping):
        raise ValueError(f"expected the options of {owner} as a mapping, got {options!r:.100}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # all that nn.Module has to offer
    signature = inspect.signature(part).parameters
    arguments = {name: argument for name, argument in signature.items() if argument.kind not in variadic}
    known = sorted(set(arguments) - set(given))
    for name in options:
        if name not in known:
            raise ValueError(f"{owner} has no option {name!r}{closest(name, known)}; its options: {known}")
    needed = [name for name in known if arguments[name].default is inspect.Parameter.empty and name not in options]
    if needed:
        raise ValueError(f"{owner} needs the options {needed}; got {sorted(options)}")
    check_option_types(part, options, owner)
