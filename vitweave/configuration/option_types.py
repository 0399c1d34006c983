"""Whether the options of a config are what the constructor or function behind them says it takes."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

PLAIN = (bool, int, float, str, NoneType)


def check_option_types(target: Callable, options: Mapping[str, Any], owner: str) -> None:
    """Refuse options whose values are of another kind than the annotations of `target` say.

    Args:
        owner: what the options belong to, for the message, e.g. "the head 'linear'".
    """
    signature = inspect.signature(target).parameters
    for name, value in options.items():
        annotation = signature[name].annotation if name in signature else inspect.Parameter.empty
        if not fits(value, annotation):
            raise ValueError(f"{owner} expected {name} to be {told(annotation)}, got {value!r:.100}")


def fits(value: Any, annotation: Any) -> bool:
    """Whole numbers are numbers, too; booleans are not; a sequence is a list or a tuple. Other kinds are not judged."""
    kind, inner = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if kind in (None, NoneType):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in PLAIN:
        return isinstance(value, kind)
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and inner and Ellipsis not in inner:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(one, inner[0]) for one in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and (not inner or all(fits(one, inner[1]) for one in value.values()))
    return True


def told(annotation: Any) -> str:
    """An annotation as one writes it."""
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)
