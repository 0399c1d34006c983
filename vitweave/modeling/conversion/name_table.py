"""A table of official tensor names and ours, read both ways.

A side of an entry is a template: `{stage}` stands for what `FIELDS` says of "stage". Both sides fill their fields with
the same values, but for a few that are counted differently:

- `{number}` counts from 1 what `{stage}` counts from 0;
- `{row}` and its kin say which modality an official tensor belongs to. Where ours numbers modalities too, that is
  `{index}`; else ours holds the tensors of all, joined as the entry says.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# what an official name calls the modalities, in order
MODALITIES = {
    "row": tuple("0123456789"),
    "side": ("1", "2"),
    "extra": ("", "extra_"),
    "unit": ("0_to_1", "1_to_0"),  # by the modality they update
}
FIELDS = {
    **{field: "|".join(values) for field, values in MODALITIES.items()},
    "anywhere": r"|.*\.",
    "stage": r"\d",
    "number": r"\d",
    "block": r"\d+",
    "index": r"\d",
    "leaf": "weight|bias",
    "layer": "fc[12]",
    "letter": "[kv]",
    "statistic": "weight|bias|running_mean|running_var|num_batches_tracked",
    "table": "relative_position_bias_table",
    "merge": r"norm\.(?:weight|bias)|reduction\.weight",
}


@dataclass(frozen=True)
class NameEntry:
    """Official tensors of one kind, and ours.

    official: template of the name.
    ours: templates of the tensors that it holds, one behind the other along `axis`.
    join: how ours holds the official ones of several modalities: "stack" on a first axis of its own, "cat" one behind
        the other, "copy" holds the only official one for each.
    pixel: the official tensor is a 1x1 convolution's, ours a linear layer's.
    """

    official: str
    ours: tuple[str, ...]
    axis: int = 0
    join: str = "stack"
    pixel: bool = False

    @property
    def joins(self) -> bool:
        """Whether one of ours holds something for every modality."""
        return self.join == "copy" or (self.modality is not None and "{index}" not in self.ours[0])

    @property
    def modality(self) -> str | None:
        """The field of the official name that tells the modality."""
        return next((field for field in MODALITIES if f"{{{field}}}" in self.official), None)


class NameTable:
    """
    Args:
        entries: the first that fits a name counts.
        subject: what the names belong to, for messages.
    """

    def __init__(self, entries: Iterable[NameEntry], subject: str):
        self.entries, self.subject = tuple(entries), subject

    def our_names(self, official: str) -> list[str] | None:
        """What of ours an official tensor holds (a part of); None for an unknown name."""
        found = self.read(official)
        return None if found is None else [template.format(**found[1]) for template in found[0].ours]

    def read(self, official: str) -> tuple[NameEntry, dict[str, str]] | None:
        """The entry of an official name and what fills our templates."""
        for entry in self.entries:
            match = re.fullmatch(pattern_of(entry.official), official)
            if match:
                facts = match.groupdict()
                if "number" in facts:
                    facts["stage"] = str(int(facts["number"]) - 1)
                if entry.modality is not None:
                    facts["index"] = str(MODALITIES[entry.modality].index(facts[entry.modality]))
                return entry, facts
        return None

    def read_ours(self, name: str) -> tuple[NameEntry, int, dict[str, str]] | None:
        """The entry of one of our names, its place among the tensors of the entry, and what fills the official name."""
        for entry in self.entries:
            for place, template in enumerate(entry.ours):
                match = re.fullmatch(pattern_of(template), name)
                if match:
                    facts = match.groupdict()
                    if "stage" in facts:
                        facts["number"] = str(int(facts["stage"]) + 1)
                    if "index" in facts and entry.modality is not None:
                        facts[entry.modality] = MODALITIES[entry.modality][int(facts["index"])]
                    return entry, place, facts
        return None

    def to_ours(self, official: dict[str, Tensor], copies: int = 1) -> dict[str, Tensor]:
        """Official tensors to ours; a name that is not in the table is an error.

        Args:
            copies: for how many modalities the only official tensor serves.
        """
        parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        entries, unknown = {}, []
        for name, tensor in official.items():
            found = self.read(name)
            if found is None:
                unknown.append(name)
                continue
            entry, facts = found
            tensor = tensor.flatten(1) if entry.pixel and tensor.ndim == 4 else tensor
            pieces = [tensor] if len(entry.ours) == 1 else tensor.chunk(len(entry.ours), dim=entry.axis)
            for template, piece in zip(entry.ours, pieces, strict=True):
                ours = template.format(**facts)
                entries[ours] = entry
                parts[ours][int(facts.get("index", 0)) if entry.joins else 0] = piece
        if unknown:
            raise ValueError(f"{len(unknown)} names are no tensors of {self.subject}, e.g. {unknown[:5]}")
        return {name: joined(entries[name], [held[i] for i in sorted(held)], copies) for name, held in parts.items()}

    def to_official(self, ours: dict[str, Tensor], groups: int = 1) -> dict[str, Tensor]:
        """Our tensors to the official ones; a name that is not in the table is an error.

        Args:
            groups: how many official tensors one of ours holds where they are one behind the other.
        """
        parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        entries, unknown = {}, []
        for name, tensor in ours.items():
            found = self.read_ours(name)
            if found is None:
                unknown.append(name)
                continue
            entry, place, facts = found
            for modality, piece in enumerate(taken_apart(entry, name, tensor, groups)):
                if entry.joins and entry.modality is not None:
                    facts[entry.modality] = MODALITIES[entry.modality][modality]
                official = entry.official.format(**facts)
                entries[official] = entry
                parts[official][place] = piece[:, :, None, None] if entry.pixel and piece.ndim == 2 else piece
        if unknown:
            raise ValueError(f"{len(unknown)} of our tensors have no place in {self.subject}, e.g. {unknown[:5]}")
        return {
            name: (held[0] if len(held) == 1 else torch.cat([held[i] for i in sorted(held)], dim=entries[name].axis))
            for name, held in parts.items()
        }


def joined(entry: NameEntry, pieces: list[Tensor], copies: int) -> Tensor:
    """One of ours out of the official tensors of all modalities."""
    if not entry.joins:
        return pieces[0].contiguous()
    if entry.join == "copy":
        pieces = pieces * copies
    return torch.cat(pieces) if entry.join == "cat" else torch.stack(pieces)


def taken_apart(entry: NameEntry, name: str, tensor: Tensor, groups: int) -> list[Tensor]:
    """What one of ours holds, by modality."""
    if not entry.joins:
        return [tensor]
    pieces = list(tensor.chunk(groups) if entry.join == "cat" else tensor.unbind())
    if entry.join == "copy":
        if not tensor.is_meta and any(not torch.equal(piece, pieces[0]) for piece in pieces):
            raise ValueError(f"{name} differs between modalities; the official model has one for all")
        pieces = pieces[:1]
    elif len(pieces) > len(MODALITIES[entry.modality]):
        raise ValueError(f"expected a fusion of two modalities, the official form; {name!r} has {len(pieces)} of them")
    return [piece.contiguous() for piece in pieces]


@cache
def pattern_of(template: str) -> re.Pattern:
    """The regular expression of a template."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", pattern))


def leaves(official: str, ours: str, **options) -> NameEntry:
    """An entry of a layer: its weight and its bias."""
    return NameEntry(official + ".{leaf}", (ours + ".{leaf}",), **options)
