"""What `vitweave inspect` opens: the model, its processor and the images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.13's top-level name needs torchvision
from transformers.utils import logging

logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Turns one picture into pixel values (1, channels, height, width), and says how."""

    description: str
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    apply: Callable[[Image.Image], Tensor]

    def undo(self, pixel_values: Tensor) -> Tensor:
        """(channels, height, width) -> (height, width, channels) in [0, 1], to be shown."""
        picture = pixel_values.float().cpu().permute(1, 2, 0)
        if self.mean is None or self.std is None:
            low, high = picture.min(), picture.max()
            return (picture - low) / (high - low).clamp_min(1e-12)
        return (picture * torch.tensor(self.std) + torch.tensor(self.mean)).clamp(0, 1)


def open_model(name: str | Path) -> nn.Module:
    """A vision model from a folder or the Hub, in eval mode.

    Of a vision-language model its vision tower, of a segmentation model its backbone.
    """
    config = AutoConfig.from_pretrained(name)
    # a masked autoencoder is measured on all of its patches
    options = {"mask_ratio": 0.0} if hasattr(config, "mask_ratio") else {}
    known = type(config) in AutoModel._model_mapping
    auto_class = AutoModel if known else AutoModelForSemanticSegmentation
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a task head left out and a pooler not in the file are of no interest here
    try:
        model, loading = auto_class.from_pretrained(name, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in loading["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[:3]}; measuring random "
            "weights would mean nothing. Check that it holds a complete checkpoint of this model type"
        )
    inner = [getattr(model, part, None) for part in ("vision_model", "backbone")]
    return next((part for part in inner if isinstance(part, nn.Module)), model).eval()


def open_preprocessing(name: str | Path | None, model: nn.Module) -> Preprocessing:
    """The image processor saved with the model, else resizing to the config's image size and ImageNet normalisation."""
    if name is not None:
        try:
            return from_processor(AutoImageProcessor.from_pretrained(name))
        except (OSError, ValueError):
            logger.warning(f"{name} has no image processor that can be read; using default preprocessing")
    size = getattr(model.config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)

    def apply(picture: Image.Image) -> Tensor:
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
        return ((values / 255 - mean) / std).permute(2, 0, 1).unsqueeze(0)

    description = f"default: resized to {height}x{width}, ImageNet mean and standard deviation"
    return Preprocessing(description, IMAGENET_MEAN, IMAGENET_STD, apply)


def from_processor(processor) -> Preprocessing:
    """Use any transformers image processor."""

    def apply(picture: Image.Image) -> Tensor:
        return processor(images=picture, return_tensors="pt")["pixel_values"]

    normalised = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalised else (None, None)
    return Preprocessing(type(processor).__name__, mean, std, apply)


def find_images(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Image files among files and folders (searched with their sub-folders), in sorted order."""
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    found = []
    for source in map(Path, sources):
        if not source.exists():
            raise FileNotFoundError(f"expected an image file or a folder of images, got {source}, which does not exist")
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found.append(source)
    if not found:
        raise ValueError(f"no images in {[str(source) for source in sources]}; looked for {', '.join(IMAGE_SUFFIXES)}")
    return found


def load_image(image: str | Path | Image.Image) -> Image.Image:
    """Open one picture as RGB, turned upright as its EXIF data says."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read {image} as an image: {error}") from error


def pixel_batches(images: list, preprocessing: Preprocessing, batch_size: int = 8) -> Iterator[Tensor]:
    """Preprocessed batches (batch, channels, height, width); only one batch of pictures is in memory."""
    size = None
    for start in range(0, len(images), batch_size):
        batch = []
        for image in images[start : start + batch_size]:
            values = preprocessing.apply(load_image(image))
            size = size or values.shape[1:]
            if values.shape[1:] != size:
                raise ValueError(
                    f"expected all images as (channels, height, width) = {tuple(size)} like the first, but "
                    f"{preprocessing.description} gave {tuple(values.shape[1:])} for {image}; "
                    "let it resize and crop to one size"
                )
            batch.append(values)
        yield torch.cat(batch)
