"""What a released multi-encoder model tells: which of its tensors go where in ours."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedConfig

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig

TOWER = "model.vision_tower."  # where the tower stands in the vision-language model
Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TensorNames:
    """Names inside of one part of a release, to those inside of our module.

    renames: regular expressions, applied in order. In the result `{a,b}` means "a and b, one below the other".
    dropped: patterns of tensors that have no place in ours, with the reason.
    optional: patterns of our names that a release may lack, because no tower reads them.
    """

    renames: Renames = ()
    dropped: Renames = ()
    optional: tuple[str, ...] = ()

    def reason(self, name: str) -> str | None:
        """Why a tensor is left out, or None if it is not."""
        return next((reason for pattern, reason in self.dropped if re.fullmatch(pattern, name)), None)

    def translate(self, name: str) -> tuple[str, ...]:
        """Our names of the tensor; several where it holds several of ours."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        braces = re.search(r"\{(.+)\}", name)
        return tuple(name.replace(braces[0], part) for part in braces[1].split(",")) if braces else (name,)


def equal_rows(tensor: Tensor, count: int) -> Sequence[Tensor]:
    """A tensor that holds `count` of ours, one below the other, taken apart."""
    return tensor.chunk(count, dim=0)


@dataclass(frozen=True)
class Part:
    """All tensors of a release whose names begin with `prefix` (of several such parts, the longest counts).

    target: what our names begin with, in the vision-language model; None for parts that are left out.
    split: takes a tensor apart that holds several of ours.
    reason: why a part without target is left out.
    """

    prefix: str
    target: str | None
    names: TensorNames = field(default_factory=TensorNames)
    split: Callable[[Tensor, int], Sequence[Tensor]] = equal_rows
    reason: str = ""


@dataclass(frozen=True)
class Release:
    """A family of released models; the rest of the conversion is the same for all.

    parts: the parts of a tower and its projector, for this config.
    language_parts: the parts of the language model, for its config.
    sizes: fields of `MultiEncoderConfig` that follow from the shapes of the fusion's tensors, by our names.
    projector: name of the projector, where it does not follow from the tensors.
    vlm_options: other fields of `MultiEncoderVlmConfig`.
    text_key: under which `config.json` holds the facts of the language model; None where it holds them itself.
    """

    parts: Callable[[MultiEncoderConfig], list[Part]]
    language_parts: Callable[[PreTrainedConfig | None], list[Part]]
    sizes: Callable[[MultiEncoderConfig, dict[str, Tensor]], dict] = lambda config, tensors: {}
    projector: str | None = None
    vlm_options: dict = field(default_factory=dict)
    text_key: str | None = None


@dataclass
class Placement:
    """Where the tensors of a release go: official name -> (part, our names); what is left out, with the reason; and
    what no part knows."""

    placed: dict[str, tuple[Part, tuple[str, ...]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def place(parts: Sequence[Part], names: Iterable[str]) -> Placement:
    """Sort the official names into the parts."""
    result = Placement()
    by_length = sorted(parts, key=lambda part: len(part.prefix), reverse=True)
    for name in names:
        part = next((part for part in by_length if name.startswith(part.prefix)), None)
        if part is None:
            result.unknown.append(name)
            continue
        rest = name.removeprefix(part.prefix)
        reason = part.names.reason(rest) if part.target is not None else part.reason
        if reason is None:
            result.placed[name] = (part, tuple(part.target + ours for ours in part.names.translate(rest)))
        else:
            result.dropped[name] = reason
    return result


def taken_apart(placement: Placement, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors of ours that an official one holds."""
    part, targets = placement.placed[name]
    return dict(zip(targets, part.split(tensor, len(targets)) if len(targets) > 1 else [tensor], strict=True))


def converted(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors by our names, as far as they have a part."""
    placement, found = place(parts, tensors), {}
    for name in placement.placed:
        found |= taken_apart(placement, name, tensors[name])
    return found


def encoder_parts(
    config: MultiEncoderConfig, prefixes: Sequence[str], names_of: Callable[[MultiEncoderConfig, int], TensorNames]
) -> list[Part]:
    """One part per encoder, with these official prefixes."""
    return [
        Part(prefix, f"{TOWER}encoder_{index}.model.", names_of(config, index)) for index, prefix in enumerate(prefixes)
    ]


def projector_part(prefix: str) -> Part:
    """`mlpNx_gelu`, whose Linear layers have the numbers 0, 2, 4 ..., or `linear`, which has none."""
    numbered = tuple((rf"^{2 * index}\.", f"linear_{index + 1}.") for index in range(4))
    return Part(prefix, "model.multi_modal_projector.", TensorNames(numbered))
