"""The epoch of a dataset whose items change from epoch to epoch."""

import torch
from torch.utils.data import Dataset


class EpochDataset(Dataset):
    """A dataset that draws its items for an epoch that the recipe tells it."""

    def __init__(self):
        # shared memory, so that persistent data loader workers see the new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn in this epoch, in this process and in data loader workers that already run."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that was told last, 0 at first."""
        return int(self._epoch)
