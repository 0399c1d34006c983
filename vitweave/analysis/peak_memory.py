"""How many bytes of tensors are alive at once while a function runs.

Counted from what operations return: alike on every device, and cheap enough for every candidate of a search. What an
operation holds only inside is not seen; `benchmarks/timing.py` reads that from the allocator.
"""

import weakref
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making until nobody holds them any more.

    Args:
        known: tensors that are there anyway; their views cost nothing.
    """

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)


def peak_bytes(function: Callable[[], object], known: Sequence[Tensor] = ()) -> int:
    """The most bytes of new tensors that live at once while a function runs; what `known` holds is not counted."""
    with LiveBytes(known) as counter:
        function()
    return counter.peak
