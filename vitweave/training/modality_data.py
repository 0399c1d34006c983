"""Aligned images of several sensors with class maps, from folders or from `datasets`, as the Trainer wants them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vitweave.training.epochs import EpochDataset
from vitweave.training.modes import evaluating
from vitweave.training.paired_data import open_picture

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".tif", ".tiff", ".webp")


class ModalityFolder(Sequence):
    """Files of one name in a folder per modality and, for training, one of class maps: `rgb/`, `depth/`, `label/`.

    A sensor whose file is missing is absent in that sample; the first modality names the samples.

    Args:
        folders: modality -> its folder below `folder`; None takes the modality's own name.
        label_folder: of the class maps; None reads none.
        names: which samples, without suffix: a list, or a text file with one name per line; None takes all.
    """

    def __init__(
        self,
        folder: str | Path,
        modalities: Sequence[str],
        folders: dict[str, str] | None = None,
        label_folder: str | None = "label",
        names: str | Path | Sequence[str] | None = None,
    ):
        self.folder, self.modalities = Path(folder), list(modalities)
        places = {name: (folders or {}).get(name, name) for name in self.modalities}
        self.files = {name: files_by_stem(self.folder / place) for name, place in places.items()}
        self.label_folder = label_folder
        self.labels = {} if label_folder is None else files_by_stem(self.folder / label_folder)
        if names is None:
            names = sorted(self.files[self.modalities[0]])
        elif isinstance(names, (str, Path)):
            names = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines() if line.strip()]
        self.names = list(names)
        lost = [name for name in self.names if not any(name in files for files in self.files.values())]
        unlabelled = [] if label_folder is None else [name for name in self.names if name not in self.labels]
        if lost or unlabelled:
            raise ValueError(
                f"expected an image and a class map of every sample in {self.folder}, but {len(lost)} have no image"
                f" {lost[:3]} and {len(unlabelled)} no map in {label_folder!r} {unlabelled[:3]}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        images = {modality: files.get(name) for modality, files in self.files.items()}
        return {"name": name, "images": images, **({"label": open_picture(self.labels[name])} if self.labels else {})}


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The files of a folder by their name without suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder {folder}; set `folders` for other names")
    found = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    if not found:
        raise FileNotFoundError(f"expected files ({', '.join(SUFFIXES)}) in {folder}, found none")
    return found


class ModalityAugmentation:
    """Random flip and crop of finished samples, the same for all modalities and the labels.

    The draw depends on `(seed, epoch, index)` alone, so a resumed run sees what the uninterrupted one saw.

    Args:
        flip: probability of a horizontal flip.
        crop_size: (height, width); None keeps the whole image. Smaller images are refused.
    """

    def __init__(self, flip: float = 0.5, crop_size: tuple[int, int] | None = None, seed: int = 0):
        self.flip, self.crop_size, self.seed = flip, crop_size, seed

    def __call__(self, sample: dict[str, torch.Tensor], epoch: int, index: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, epoch, index])
        spatial = {name: part for name, part in sample.items() if part.ndim >= 2}  # not the mask
        if self.crop_size is not None:
            height, width = sample["pixel_values"].shape[-2:]
            if height < self.crop_size[0] or width < self.crop_size[1]:
                raise ValueError(f"expected an image of at least the crop's {self.crop_size}, got {height}x{width}")
            top, left = (int(rng.integers(a - b + 1)) for a, b in zip((height, width), self.crop_size, strict=True))
            window = (..., slice(top, top + self.crop_size[0]), slice(left, left + self.crop_size[1]))
            spatial = {name: part[window] for name, part in spatial.items()}
        if rng.random() < self.flip:
            spatial = {name: part.flip(-1) for name, part in spatial.items()}
        return {**sample, **spatial}


class ModalityDataset(EpochDataset):
    """`{"pixel_values": (modalities, 3, height, width), "modality_mask": (modalities,), "labels": (height, width)}`.

    Args:
        samples: items with "images" (modality -> image or None) and "label", as `ModalityFolder` has them; or, of a
            `datasets.Dataset`, a column per modality.
        processor: a `ModalityImageProcessor` or `ModalityImageProcessorPil`.
        augmentation: called as `augmentation(sample, epoch, index)`; None for evaluation.
        keep: modalities that are not hidden; None is all. To see what a model does without a sensor.
    """

    def __init__(self, samples: Sequence, processor, augmentation=None, keep=None, label_column: str = "label"):
        if not hasattr(processor, "modalities"):
            raise ValueError(f"expected a ModalityImageProcessor, got {type(processor).__name__}")
        strange = sorted(set(keep or ()) - set(processor.modalities))
        if strange:
            raise ValueError(f"expected keep among {list(processor.modalities)}, got {strange}")
        self.samples, self.processor, self.augmentation = samples, processor, augmentation
        self.keep, self.label_column = keep, label_column
        super().__init__()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[int(index)]
        name = sample.get("name", f"sample {int(index)}")
        images = sample["images"] if "images" in sample else {key: sample.get(key) for key in self.processor.modalities}
        if self.keep is not None:
            images = {key: image if key in self.keep else None for key, image in images.items()}
        try:
            item = self.encoded(images, sample)
            if self.augmentation is not None:
                item = self.augmentation(item, self.epoch, int(index))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return item

    def encoded(self, images: dict, sample: dict) -> dict[str, torch.Tensor]:
        """One item, before augmentation, from the images that are shown and the sample they belong to."""
        encoded = self.processor(images, sample.get(self.label_column))
        return {key: encoded[key][0] for key in ("pixel_values", "modality_mask", "labels") if key in encoded}


def predict_modalities(model, processor, **images) -> torch.Tensor:
    """The class ids (height, width) of one scene, e.g. `predict_modalities(model, processor, rgb=..., depth=...)`.

    Args:
        images: modality -> image, as the processor takes them; what is left out is absent.

    Returns:
        at the size of the images given.
    """
    inputs = processor(images).to(model.device, model.dtype)
    with evaluating(model):
        outputs = model(pixel_values=inputs["pixel_values"], modality_mask=inputs["modality_mask"])
    return processor.post_process_semantic_segmentation(outputs, [processor.size_of(images)])[0]
