"""What the processors of aligned sensors share: one geometry, each sensor in its own unit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from vitweave.processing.depth_maps import resize_depth_bilinear
from vitweave.processing.label_maps import read_label_map, resize_nearest
from vitweave.processing.post_processing import semantic_maps
from vitweave.processing.sensor_encodings import encode, part_outside, read_sensor, read_values, warn_of_range

RESAMPLES = ("nearest", "bilinear")
RGB_DEPTH = {"rgb": {"encoding": "rgb"}, "depth": {"encoding": "metres", "value_range": [0.0, 10.0], "invalid": 0}}


class ModalitySteps(BaseImageProcessor):
    """Named modalities to `pixel_values` (batch, modalities, 3, height, width) and `modality_mask`.

    Every image of a sample and its label map goes through the same geometry; sensors with one number per pixel are
    repeated on three channels. Which sensor is which, in what unit and range, is kept in preprocessor_config.json.

    Args:
        modalities: name -> options of `Sensor`, in the order of the model's `modalities`; or a list of the options with
            a "name" each, as they are saved (the names of a JSON object have no order).
        size: {"height", "width"} that everything is resized to; None keeps the sizes.
        size_divisor: pad at the right and the bottom to a multiple of it, as nothing measured.
        measure_resample: "nearest", or "bilinear" among the measured ones of the four neighbours.
        ignore_index: label of what is padded.
    """

    model_input_names = ["pixel_values", "modality_mask"]

    def __init__(
        self,
        modalities: Mapping[str, dict] | Sequence[dict] | None = None,
        size: dict[str, int] | None = None,
        size_divisor: int | None = None,
        measure_resample: str = "nearest",
        ignore_index: int = 255,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if measure_resample not in RESAMPLES:
            raise ValueError(f"expected measure_resample to be one of {list(RESAMPLES)}, got {measure_resample!r}")
        if size is not None and set(size) != {"height", "width"}:
            raise ValueError(f'expected size={{"height": ..., "width": ...}}, got {size}')
        if modalities is not None and not isinstance(modalities, Mapping):
            modalities = {one["name"]: {key: one[key] for key in one if key != "name"} for one in modalities}
        self.modalities = {
            name: read_sensor(options, name).to_dict() for name, options in (modalities or RGB_DEPTH).items()
        }
        self.size, self.size_divisor, self.measure_resample = size, size_divisor, measure_resample
        self.ignore_index = ignore_index
        self._warned: set[str] = set()

    def to_dict(self) -> dict[str, Any]:
        saved = super().to_dict()
        saved.pop("_warned", None)
        saved["modalities"] = [{"name": name, **options} for name, options in self.modalities.items()]
        return saved

    def __call__(self, images, segmentation_maps=None, return_tensors: str | None = "pt", **modalities) -> BatchFeature:
        return self.preprocess(images, segmentation_maps, return_tensors, **modalities)

    def preprocess(
        self,
        images: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        segmentation_maps=None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            images: a dict of modality -> image, or one per sample. A sensor that is absent is left out, or None. Images
                are paths (8 or 16 bit PNG, TIFF, .npy), PIL pictures, arrays or tensors.
            segmentation_maps: a map of class ids per sample (or one), as `SegmentationImageProcessor` takes them.

        Returns:
            pixel_values (batch, modalities, 3, height, width) float32; modality_mask (batch, modalities) bool, True =
            present; with maps, labels (batch, height, width) int64.
        """
        samples = [images] if isinstance(images, Mapping) else list(images)
        maps = None
        if segmentation_maps is not None:
            alone = isinstance(images, Mapping) and not isinstance(segmentation_maps, (list, tuple))
            maps = [segmentation_maps] if alone else list(segmentation_maps)
            if len(maps) != len(samples):
                raise ValueError(f"expected a segmentation map per sample, {len(samples)}, got {len(maps)}")
        found = [self.sample(sample, None if maps is None else maps[i], i) for i, sample in enumerate(samples)]
        sizes = sorted({pixels.shape[-2:] for pixels, _, _ in found})
        if len(sizes) > 1:
            raise ValueError(f"expected samples of one size in a batch, got {sizes}; set size, or batch them apart")
        data = {
            "pixel_values": np.stack([pixels for pixels, _, _ in found]),
            "modality_mask": np.stack([present for _, present, _ in found]),
        }
        if maps is not None:
            data["labels"] = np.stack([labels for _, _, labels in found])
        return BatchFeature(data, tensor_type=return_tensors)

    def sample(self, images: Mapping[str, Any], label_map, index: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """pixel_values (modalities, 3, height, width), modality_mask (modalities,) and labels of one sample."""
        strange = sorted(set(images) - set(self.modalities))
        if strange:
            raise ValueError(
                f"sample {index} has the unknown modalities {strange}; this processor knows {list(self.modalities)}"
            )
        read = {}
        for name, options in self.modalities.items():
            if images.get(name) is not None:
                read[name] = read_values(images[name], read_sensor(options, name), name)
        if not read:
            raise ValueError(
                f"sample {index} has none of the modalities {list(self.modalities)}; at least one is needed"
            )
        labels = None if label_map is None else np.asarray(read_label_map(label_map))
        shapes = {name: values.shape[-2:] for name, (values, _) in read.items()}
        if labels is not None:
            shapes["segmentation map"] = labels.shape
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"expected aligned images of one size in sample {index}, got (height, width) {shapes}; resize them to"
                " one grid, measures and class ids by nearest neighbour"
            )
        height, width = next(iter(shapes.values()))
        size = (height, width) if self.size is None else (self.size["height"], self.size["width"])
        padded = (
            tuple(-(-side // self.size_divisor) * self.size_divisor for side in size) if self.size_divisor else size
        )
        pixels = np.zeros((len(self.modalities), 3, *padded), dtype=np.float32)
        for position, name in enumerate(self.modalities):
            if name in read:
                pixels[position, :, : size[0], : size[1]] = self.channels(name, *read[name], size)
        if labels is not None:
            whole = np.full(padded, self.ignore_index, dtype=np.int64)
            whole[: size[0], : size[1]] = resize_nearest(labels, size)
            labels = whole
        return pixels, np.array([name in read for name in self.modalities]), labels

    def size_of(self, images: Mapping[str, Any]) -> tuple[int, int]:
        """(height, width) of the images of one sample, before they are resized."""
        name, image = next((name, image) for name, image in images.items() if image is not None)
        return read_values(image, read_sensor(self.modalities[name], name), name)[0].shape[-2:]

    def resized_picture(self, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(channels, height, width) of 0..255 to (channels, *size), bilinear with antialiasing."""
        raise NotImplementedError

    def channels(self, name: str, values: np.ndarray, measured: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
        """(3, height, width) of one modality at the given size, encoded."""
        sensor = read_sensor(self.modalities[name], name)
        if measured is None:
            if values.shape[-2:] != size:
                values = self.resized_picture(torch.from_numpy(values), size).numpy()
            return encode(values, None, sensor)
        part = part_outside(values, measured, sensor)
        if part > 0.01 and name not in self._warned:
            self._warned.add(name)
            warn_of_range(name, values, measured, sensor, part)
        if values.shape[-2:] != size:
            if self.measure_resample == "nearest":
                values, measured = (
                    resize_nearest(values[0], size)[None],
                    resize_nearest(measured.astype(np.uint8), size) > 0,
                )
            else:  # 0 stands for nothing measured there
                low = values[0].min()
                shifted = np.where(measured, values[0] - low + 1, 0).astype(np.float32)
                resized = resize_depth_bilinear(shifted, size)
                measured = resized > 0
                values = np.where(measured, resized - 1 + low, 0)[None]
        return encode(values, measured, sensor)

    def post_process_semantic_segmentation(
        self, outputs, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Class ids (height, width) per sample; at the target sizes, without what `size_divisor` padded."""
        logits = outputs.logits
        if target_sizes is not None and len(target_sizes) != logits.shape[0]:
            raise ValueError(f"expected a target size per sample, {logits.shape[0]}, got {len(target_sizes)}")
        if self.size is not None:
            logits = logits[..., : self.size["height"], : self.size["width"]]
        return semantic_maps(logits, [None] * logits.shape[0] if target_sizes is None else target_sizes)
