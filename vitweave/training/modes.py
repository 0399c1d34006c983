"""Models for a while in another mode, and afterwards every module in the one it was in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[nn.Module]:
    """Whatever is done inside, every module is left in train or eval mode as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and no gradients inside."""
    with modes_kept(model), torch.no_grad():
        yield model.eval()
