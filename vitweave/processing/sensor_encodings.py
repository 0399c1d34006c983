"""What a sensor's stored numbers mean, and how they become the channels that an encoder sees."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import PIL.Image
from PIL import ImageOps

from vitweave.configuration.option_types import check_option_types
from vitweave.processing.depth_maps import stored_depth
from vitweave.processing.image_steps import channels_first

PICTURES = ("rgb", "hha", "picture")  # three channels of 0..255
MEASURES = ("metres", "inverse_depth", "thermal", "raw")  # one number per pixel
ENCODINGS = (*PICTURES, *MEASURES)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Sensor:
    """One modality of a processor.

    Args:
        encoding: "rgb" (a colour picture); "hha" (depth as three channels, arXiv:1407.5736) and "picture" (event or
            LiDAR images), which are pictures, too; "metres" (depth, linear between the ends of `value_range`),
            "inverse_depth" (disparity-like, linear in 1 / metres), "thermal" and "raw" (any other measure, linear).
        scale, offset: value = stored * scale + offset, of a measure; 0.001 for depth in millimetres.
        value_range: the values that become 0 and 1, in metres for depth; needed by every measure. Values beyond are
            clipped, and warned of once.
        invalid: the stored number that means "nothing measured", None if there is none; NaN and infinity always do.
            What was not measured becomes 0 after normalisation.
        mean, std: per channel of the encoded picture; None is ImageNet's for "rgb", and 0 and 1 otherwise.
    """

    encoding: str
    scale: float = 1.0
    offset: float = 0.0
    value_range: Sequence[float] | None = None
    invalid: float | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self):
        if self.encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {self.encoding!r}; known: {list(ENCODINGS)}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("expected both mean and std of a sensor, or neither")
        if self.mean is None:
            is_rgb = self.encoding == "rgb"
            self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if is_rgb else ((0.0,) * 3, (1.0,) * 3)
        if self.is_picture:
            return
        if self.value_range is None or len(self.value_range) != 2 or not self.value_range[0] < self.value_range[1]:
            raise ValueError(
                f"expected value_range=(lowest, highest) for the encoding {self.encoding!r}, got {self.value_range}:"
                " without it the unit of the numbers is not known"
            )
        if self.encoding == "inverse_depth" and self.value_range[0] <= 0:
            raise ValueError(f"expected a positive nearest depth for inverse_depth, got {self.value_range[0]}")
        if not self.scale:
            raise ValueError("expected a scale other than 0")

    @property
    def is_picture(self) -> bool:
        """Whether it holds three channels of 0..255."""
        return self.encoding in PICTURES

    def to_dict(self) -> dict:
        """Options as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def read_sensor(options: "dict | Sensor", name: str) -> Sensor:
    """A sensor from its options; a misspelt one or a value of another kind is refused by name."""
    if isinstance(options, Sensor):
        return options
    known = [field.name for field in fields(Sensor)]
    strange = sorted(set(options) - set(known))
    if strange:
        raise ValueError(f"the modality {name!r} has no option {strange}; its options: {known}")
    if "encoding" not in options:
        raise ValueError(f"the modality {name!r} has no encoding; known: {list(ENCODINGS)}")
    check_option_types(Sensor, options, f"the modality {name!r}")
    return Sensor(**options)


def read_values(source, sensor: Sensor, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a file, picture, array or tensor holds.

    Returns:
        a picture as (3, height, width) in 0..255 and None; or values (1, height, width) in the sensor's unit, 0 where
        nothing was measured, and (height, width) bool, True = measured.
    """
    if sensor.is_picture:
        return read_picture(source, name), None
    try:
        stored = stored_depth(source)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    measured = np.isfinite(stored) if stored.dtype.kind == "f" else np.ones(stored.shape, dtype=bool)
    if sensor.invalid is not None:
        measured &= stored != sensor.invalid
    values = np.where(measured, stored, 0).astype(np.float64) * sensor.scale + sensor.offset
    if sensor.encoding == "inverse_depth":
        measured &= values > 0
    return np.where(measured, values, 0).astype(np.float32)[None], measured


def read_picture(source, name: str) -> np.ndarray:
    """(3, height, width) float32 in 0..255; four channels are refused unless a picture says that one is opacity."""
    if isinstance(source, str) or hasattr(source, "__fspath__"):
        try:
            with PIL.Image.open(source) as picture:
                source = ImageOps.exif_transpose(picture)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{name}: {source} cannot be read as a picture: {error}") from error
    if not isinstance(source, PIL.Image.Image):
        array = source.cpu().numpy() if hasattr(source, "cpu") else np.asarray(source)
        if array.ndim == 3 and 4 in (array.shape[0], array.shape[-1]) and 3 not in (array.shape[0], array.shape[-1]):
            raise ValueError(
                f"{name}: expected 3 channels, got an array of {array.shape}: a fourth channel may be opacity or a"
                " sensor. Give every sensor by its own name, and pictures with opacity as PIL pictures"
            )
        if array.dtype.kind == "f":
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: expected finite numbers in a picture, got NaN or infinity")
            if array.max(initial=0) <= 1:
                array = array * 255
        source = array
    return channels_first(source, True, None, 3).astype(np.float32)


def encode(values: np.ndarray, measured: np.ndarray | None, sensor: Sensor) -> np.ndarray:
    """The channels that the encoder sees.

    Args:
        values, measured: from `read_values`, at the size of the output.

    Returns:
        (3, height, width) float32, normalised, 0 where nothing was measured.
    """
    if sensor.is_picture:
        channels = values / 255
    else:
        low, high = sensor.value_range
        clipped = np.clip(values, low, high)
        if sensor.encoding == "inverse_depth":
            clipped, low, high = 1 / clipped, 1 / high, 1 / low
        channels = np.repeat((clipped - low) / (high - low), 3, axis=0)
    mean, std = (np.asarray(numbers, dtype=np.float32).reshape(-1, 1, 1) for numbers in (sensor.mean, sensor.std))
    channels = ((channels - mean) / std).astype(np.float32)
    return channels if measured is None else np.where(measured, channels, np.float32(0))


def part_outside(values: np.ndarray, measured: np.ndarray | None, sensor: Sensor) -> float:
    """Which part of what was measured lies outside of the sensor's range."""
    if measured is None or not measured.any():
        return 0.0
    low, high = sensor.value_range
    inside = values[0][measured]
    return float(((inside < low) | (inside > high)).mean())


def warn_of_range(name: str, values: np.ndarray, measured: np.ndarray, sensor: Sensor, part: float) -> None:
    """Say once what was found and what was declared."""
    found = values[0][measured]
    warnings.warn(
        f"{name}: {100 * part:.0f} % of the values lie outside of value_range={tuple(sensor.value_range)}; they go from"
        f" {found.min():.4g} to {found.max():.4g}, with scale={sensor.scale:g}. If that is another unit, set scale"
        " (0.001 for millimetres to metres) or value_range. Later ones are not reported",
        stacklevel=3,
    )
