"""What a released modality-fusion model tells: the names of its tensors, and what its config must say."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.name_table import NameTable
from vitweave.modeling.conversion.stored_tensors import StoredTensors

WRAPPER = "module."  # what DataParallel puts in front of every name


class OfficialState:
    """The tensors of a release by their official names, without the `module.` of a model saved in its wrapper.

    Attributes:
        shapes: by name, on the meta device.
    """

    def __init__(self, stored: StoredTensors):
        self.stored = stored
        self.prefix = WRAPPER if all(name.startswith(WRAPPER) for name in stored.shapes) else ""
        self.shapes = {name.removeprefix(self.prefix): tensor for name, tensor in stored.shapes.items()}

    def size(self, name: str) -> tuple[int, ...]:
        """Of a tensor that the release must hold."""
        if name not in self.shapes:
            raise ValueError(f"expected {name!r} in {self.stored.name}, whose names are {sorted(self.shapes)[:3]}, ...")
        return tuple(self.shapes[name].shape)

    def value(self, name: str) -> Tensor:
        """A tensor that the release must hold."""
        self.size(name)
        return self.stored.value(self.prefix + name)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors."""
        for name, tensor in self.stored.read():
            yield name.removeprefix(self.prefix), tensor


def nothing_dropped(names: Iterable[str]) -> dict[str, str]:
    """No tensor is left out."""
    return {}


def nothing_restored(official: dict[str, Tensor], config: ModalityFusionConfig) -> dict[str, Tensor]:
    """The official model holds what ours does."""
    return {}


@dataclass(frozen=True)
class ModalityRelease:
    """A family of released models.

    table: official names and ours.
    fields: of `ModalityFusionConfig`, all but `modalities`, as the tensors and the official code say.
    count: of the modalities.
    modalities: their usual names.
    dropped: the names of tensors without a place in ours, with the reason.
    restored: such tensors for the way back, by official name, from those that are there already.
    has_decoder: whether it segments.
    fusion_is_new: whether our model may have a fusion that the release does not hold.
    """

    table: NameTable
    fields: Callable[[OfficialState], dict]
    count: Callable[[OfficialState], int]
    modalities: tuple[str, ...] = ("rgb", "depth")
    dropped: Callable[[Iterable[str]], dict[str, str]] = nothing_dropped
    restored: Callable[[dict[str, Tensor], ModalityFusionConfig], dict[str, Tensor]] = nothing_restored
    has_decoder: bool = True
    fusion_is_new: bool = False
