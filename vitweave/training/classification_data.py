"""Pictures with one class each, from folders or from `datasets`, as the Trainer wants them."""

import operator
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch

from vitweave.processing.image_steps import picture_to_rgb
from vitweave.training.paired_data import IMAGE_SUFFIXES, PairedDataset, open_picture


class ClassFolders(Sequence):
    """The pictures of `<folder>/<class>/*`, sorted by class and name; a class is a folder.

    Args:
        id2label: the class of each id, as of the training part, so that parts agree; None = the folders, sorted.
    """

    def __init__(self, folder: str | Path, id2label: dict[int, str] | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"expected a folder with one folder per class, there is no {self.folder}")
        found = sorted(path.name for path in self.folder.iterdir() if path.is_dir() and path.name[0] != ".")
        self.id2label = id2label or dict(enumerate(found))
        label2id = {name: index for index, name in self.id2label.items()}
        foreign = sorted(set(found) - label2id.keys())
        if foreign:
            raise ValueError(
                f"{self.folder} has folders of unknown classes {foreign[:5]}; the classes are {sorted(label2id)[:20]}"
            )
        self.files = [
            (path, label2id[name])
            for name in found
            for path in sorted((self.folder / name).rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise FileNotFoundError(
                f"expected pictures ({', '.join(IMAGE_SUFFIXES)}) in {self.folder}/CLASS/, found none"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        path, label = self.files[index]
        return {"image": open_picture(path), "label": label, "name": str(path)}

    def sources(self, index: int) -> tuple[Path, int]:
        """The file of a sample and its class, by which a feature cache knows it."""
        return self.files[index]


class ImageClassificationDataset(PairedDataset):
    """`{"pixel_values": (channels, height, width), "labels": class id}` per sample.

    Args:
        samples: anything with a length whose items are dicts of a picture and a class id: a `datasets.Dataset`, a
            `ClassFolders`, a list.
        processor: any image processor of transformers.
        augmentation: called as `augmentation(image, epoch, index)`; None for evaluation. What it returns is neither
            resized nor cropped again.
        id2label: class names by id; None = those of the samples, where they have any.
        num_labels: refuse class ids outside [0, num_labels); the recipes fill it in.
    """

    def __init__(
        self,
        samples: Sequence,
        processor,
        augmentation=None,
        id2label: dict[int, str] | None = None,
        num_labels: int | None = None,
        image_column: str = "image",
        label_column: str = "label",
    ):
        super().__init__(samples, processor, augmentation, image_column, label_column)
        self.id2label = id2label or class_names(samples, label_column)
        self.num_labels = num_labels or (len(self.id2label) if self.id2label else None)

    @classmethod
    def from_folder(
        cls, folder: str | Path, processor, augmentation=None, id2label: dict[int, str] | None = None, **kwargs
    ) -> "ImageClassificationDataset":
        """A folder with one folder per class. Give the other parts the `id2label` of the training part."""
        return cls(ClassFolders(folder, id2label), processor, augmentation, **kwargs)

    def process(self, image, label, index: int) -> dict[str, list]:
        number = self.check_label(label)
        return {"pixel_values": [self.pixel_values(image, index)], "labels": [number]}

    def check_label(self, label) -> int:
        """A class id as a number; refuses what is none."""
        try:
            number = operator.index(label)
        except TypeError as error:
            raise ValueError(f"expected a class id, got {label!r}") from error
        if number < 0 or number >= (self.num_labels or number + 1):
            known = f"from 0 to {self.num_labels - 1}" if self.num_labels else "of 0 or more"
            raise ValueError(f"expected a class id {known}, got {number}")
        return number

    def pixel_values(self, image: PIL.Image.Image, index: int) -> torch.Tensor:
        """The picture of this epoch, (channels, height, width)."""
        options = {}
        if self.augmentation is not None:
            image = self.augmentation(image, self.epoch, index)
            steps = ("do_resize", "do_center_crop")
            options = {step: False for step in steps if getattr(self.processor, step, None) is not None}
        elif isinstance(image, PIL.Image.Image):
            image = picture_to_rgb(image)
        return self.processor(image, return_tensors="pt", **options)["pixel_values"][0]


def class_names(samples, label_column: str = "label") -> dict[int, str] | None:
    """id2label of samples that know it: `id2label`, or the `ClassLabel` of a `datasets.Dataset`."""
    if getattr(samples, "id2label", None):
        return dict(samples.id2label)
    names = getattr((getattr(samples, "features", None) or {}).get(label_column), "names", None)
    return dict(enumerate(names)) if names else None


def collate_classification(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack samples into `pixel_values` (batch, channels, height, width) and `labels` (batch,)."""
    sizes = {tuple(sample["pixel_values"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"expected images of one size in a batch, got {sorted(sizes)} (height, width); let the processor resize "
            "and crop to a fixed size"
        )
    labels = torch.tensor([sample["labels"] for sample in samples], dtype=torch.int64)
    return {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples]), "labels": labels}


def open_parts(
    data: str | Path, processor, augmentation=None, names: tuple[str, str] = ("train", "validation"), **kwargs
) -> tuple[ImageClassificationDataset, ImageClassificationDataset]:
    """The training part, augmented, and the evaluation part of a folder `<data>/<name>/<class>/*` or a dataset id."""
    if Path(data).is_dir():
        train = ImageClassificationDataset.from_folder(Path(data, names[0]), processor, augmentation, **kwargs)
        kwargs["id2label"] = train.id2label
        return train, ImageClassificationDataset.from_folder(Path(data, names[1]), processor, **kwargs)
    train = ImageClassificationDataset.from_hub(str(data), names[0], processor, augmentation, **kwargs)
    return train, ImageClassificationDataset.from_hub(str(data), names[1], processor, **kwargs)
