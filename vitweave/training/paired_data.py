"""Images with the maps that belong to them (class ids, depth), from folders or from `datasets`, for the Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from PIL import ImageOps

from vitweave.training.epochs import EpochDataset

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def open_picture(path: Path) -> PIL.Image.Image:
    """Read a whole picture, turned as its EXIF orientation says."""
    try:
        with PIL.Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def place_of_part(data: Path, part: str) -> tuple[Path, Path | None]:
    """The folder of a part of a data set, and the file with its names where all parts share one folder."""
    names = data / f"{part}.txt"
    return (data, names) if names.is_file() else (data / part, None)


class PairedFolder(Sequence):
    """Pairs of files with one name in two folders, sorted by name.

    Args:
        names: which pairs, without suffix: a list, or a text file with one name per line; None takes all.
    """

    image_folders: tuple[str, ...] = ("image",)  # the first that exists
    map_folder: str
    map_suffixes: tuple[str, ...] = IMAGE_SUFFIXES

    def __init__(self, folder: str | Path, names: str | Path | Sequence[str] | None = None):
        self.folder = Path(folder)
        image_folder = next((part for part in self.image_folders if (self.folder / part).is_dir()), "image")
        images = self._by_stem(self.folder / image_folder, IMAGE_SUFFIXES)
        maps = self._by_stem(self.folder / self.map_folder, self.map_suffixes)
        if names is None:
            names = sorted(images.keys() | maps.keys())
        elif isinstance(names, (str, Path)):
            names = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines() if line.strip()]
        odd = [name for name in names if name not in images or name not in maps]
        if odd:
            raise ValueError(
                f"expected one {self.map_folder} per image in {self.folder}, but {len(odd)} stand alone, among them "
                f"{odd[:3]}; give image and {self.map_folder} the same file name"
            )
        self.pairs = [(images[name], maps[name]) for name in names]

    def _by_stem(self, folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"expected folders {' or '.join(f'{part}/' for part in self.image_folders)} and {self.map_folder}/, "
                f"there is no {folder}"
            )
        found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}
        if not found:
            raise FileNotFoundError(f"expected files ({', '.join(suffixes)}) in {folder}, found none")
        return found

    def open_map(self, path: Path) -> Any:
        """What the file of a map holds."""
        return open_picture(path)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        image, own_map = self.pairs[index]
        return {"image": open_picture(image), self.map_folder: self.open_map(own_map), "name": str(image)}

    def sources(self, index: int) -> tuple[Path, Path]:
        """The files of a sample, by whose bytes a feature cache knows it."""
        return self.pairs[index]


class PairedDataset(EpochDataset):
    """`{"pixel_values": (channels, height, width), "labels": (height, width)}` per sample.

    A subclass says which folders it reads (`folder_samples`) and how a pair becomes tensors (`process`).
    """

    folder_samples: type[PairedFolder]

    def __init__(self, samples: Sequence, processor, augmentation, image_column: str, label_column: str):
        self.samples, self.processor, self.augmentation = samples, processor, augmentation
        self.image_column, self.label_column = image_column, label_column
        known = getattr(samples, "column_names", None) or [image_column, label_column]
        missing = [name for name in (image_column, label_column) if name not in known]
        if missing:
            raise ValueError(f"there is no column {missing}; known: {known}; set image_column and label_column")
        super().__init__()

    @classmethod
    def from_folder(cls, folder: str | Path, processor, augmentation=None, names=None, **kwargs):
        """Two folders with files of the same names; `names` is a list of them, or a text file with one per line."""
        return cls(cls.folder_samples(folder, names), processor, augmentation, **kwargs)

    @classmethod
    def from_hub(cls, name: str, split: str, processor, augmentation=None, **kwargs):
        """A dataset id or script-free folder that `datasets.load_dataset` can open."""
        from datasets import load_dataset  # only here: importing the recipe must not import datasets

        return cls(load_dataset(name, split=split), processor, augmentation, **kwargs)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[int(index)]
        name = sample.get("name", f"sample {int(index)}")
        try:
            encoded = self.process(sample[self.image_column], sample[self.label_column], int(index))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}

    def augmented(self, image, own_map, index: int) -> tuple[Any, Any, dict[str, bool]]:
        """The pair in this epoch, and the processor's options: what was cropped to a size is not resized again."""
        if self.augmentation is None:
            return image, own_map, {}
        image, own_map = self.augmentation(image, own_map, self.epoch, index)
        return image, own_map, {"do_resize": self.augmentation.crop_size is None and self.processor.do_resize}

    def process(self, image, own_map, index: int) -> dict[str, torch.Tensor]:
        """Augment and encode one pair."""
        raise NotImplementedError


def collate_pairs(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples into `pixel_values` (batch, channels, height, width) and `labels` (batch, height, width), and
    whatever else they hold."""
    sizes = {tuple(sample["pixel_values"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in a batch, got {sorted(sizes)} (height, width); set the processor's size "
            "and do_resize=True, give the augmentation a crop_size, or use batch size 1"
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
