"""Images with class maps, from folders or from `datasets`, as the Trainer wants them."""

import json
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from PIL import ImageOps
from torch.utils.data import Dataset

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class FolderSamples(Sequence):
    """Pairs of `<folder>/image/<name>.*` and `<folder>/label/<name>.png`, sorted by name."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        images, labels = (self._by_stem(self.folder / part) for part in ("image", "label"))
        if images.keys() != labels.keys():
            odd = sorted(images.keys() ^ labels.keys())
            raise ValueError(
                f"expected one label per image in {self.folder}, but {len(odd)} stand alone, among them {odd[:3]}; "
                "give image and label the same file name"
            )
        self.pairs = [(images[stem], labels[stem]) for stem in sorted(images)]

    @staticmethod
    def _by_stem(folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise FileNotFoundError(f"expected folders image/ and label/, there is no {folder}")
        found = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
        if not found:
            raise FileNotFoundError(f"expected pictures ({', '.join(IMAGE_SUFFIXES)}) in {folder}, found none")
        return found

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        image, label = self.pairs[index]
        return {"image": open_picture(image), "label": open_picture(label), "name": str(image)}


def open_picture(path: Path) -> PIL.Image.Image:
    """Read a whole picture, turned as its EXIF orientation says."""
    try:
        with PIL.Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def read_id2label(folder: str | Path) -> dict[int, str] | None:
    """Class names from `<folder>/meta.json` (`{"id2label": {"0": "sky", ...}}`), or None without that file."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        return None
    return {int(index): name for index, name in json.loads(path.read_text())["id2label"].items()}


class SegmentationDataset(Dataset):
    """`{"pixel_values": (channels, height, width), "labels": (height, width)}` per sample.

    Args:
        samples: anything with a length whose items are dicts of a picture and a class map: a `datasets.Dataset`, a
            `FolderSamples`, a list.
        processor: a segmentation image processor.
        augmentation: called as `augmentation(image, mask, epoch, index)`; None for evaluation. What it returns is not
            resized again if it crops to a fixed size.
        num_labels: refuse class ids outside [0, num_labels); the recipe fills it in from the model.
    """

    def __init__(
        self,
        samples: Sequence,
        processor,
        augmentation=None,
        num_labels: int | None = None,
        image_column: str = "image",
        label_column: str = "label",
    ):
        self.samples, self.processor, self.augmentation, self.num_labels = samples, processor, augmentation, num_labels
        self.image_column, self.label_column = image_column, label_column
        known = getattr(samples, "column_names", None) or [image_column, label_column]
        missing = [name for name in (image_column, label_column) if name not in known]
        if missing:
            raise ValueError(f"there is no column {missing}; known: {known}; set image_column and label_column")
        # shared memory, so that persistent data loader workers see the new epoch too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_folder(cls, folder: str | Path, processor, augmentation=None, **kwargs) -> "SegmentationDataset":
        """A folder with `image/` and `label/`."""
        return cls(FolderSamples(folder), processor, augmentation, **kwargs)

    @classmethod
    def from_hub(cls, name: str, split: str, processor, augmentation=None, **kwargs) -> "SegmentationDataset":
        """A dataset id or script-free folder that `datasets.load_dataset` can open."""
        from datasets import load_dataset  # only here: importing the recipe must not import datasets

        return cls(load_dataset(name, split=split), processor, augmentation, **kwargs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of this epoch, in this process and in data loader workers that already run."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[int(index)]
        name = sample.get("name", f"sample {int(index)}")
        try:
            return self._process(sample[self.image_column], sample[self.label_column], int(index))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _process(self, image, label, index: int) -> dict[str, torch.Tensor]:
        options = {"num_labels": self.num_labels} if self.num_labels else {}
        if self.augmentation is not None:
            image, label = self.augmentation(image, label, int(self._epoch), index)
            options["do_resize"] = self.augmentation.crop_size is None and self.processor.do_resize
        encoded = self.processor(image, label, return_tensors="pt", **options)
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}


def collate_segmentation(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack samples into `pixel_values` (batch, channels, height, width) and `labels` (batch, height, width)."""
    sizes = {tuple(sample["pixel_values"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in a batch, got {sorted(sizes)} (height, width); set the processor's size "
            "and do_resize=True, give the augmentation a crop_size, or use batch size 1"
        )
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("pixel_values", "labels")}
