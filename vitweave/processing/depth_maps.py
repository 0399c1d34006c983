"""Depth maps: stored numbers from any source, as metres, with 0 where nothing was measured."""

import warnings
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageOps

DEPTH_MODES = ("L", "I", "I;16", "I;16B", "I;16L", "F")  # PIL modes with one number per pixel
DEPTH_SUFFIXES = (".bmp", ".npy", ".png", ".tif", ".tiff", ".webp")
DEPTH_RESAMPLES = ("nearest", "bilinear")
# Metres between which the middle of a map lies if its unit is the declared one and no depth_range says otherwise.
PLAUSIBLE_METRES = (0.01, 1000.0)
# What stored numbers usually are: metres per step, the likeliest first.
COMMON_UNITS = {"metres": 1.0, "millimetres": 0.001, "centimetres": 0.01, "1/256 m (KITTI)": 1 / 256}


def stored_depth(source) -> np.ndarray:
    """The numbers of a depth map as they are stored, (height, width).

    Args:
        source: a path (.npy, or a picture with one channel: 8 or 16 bit PNG, TIFF of 16 bit or float), a PIL picture,
            an array or a tensor.
    """
    if isinstance(source, (str, Path)):
        return read_depth_file(Path(source))
    if isinstance(source, PIL.Image.Image):
        if source.mode not in DEPTH_MODES:
            raise ValueError(
                f"expected a depth picture with one number per pixel (mode {', '.join(DEPTH_MODES)}), got mode "
                f"{source.mode!r}; a colour-coded picture of depth cannot be turned back into depth"
            )
        source = np.array(source)
    elif hasattr(source, "detach"):  # a tensor; NumPy has no bfloat16
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() and source.element_size() == 2 else source).numpy()
    if isinstance(source, np.ma.MaskedArray):
        source = source.astype(np.float64).filled(np.nan)
    array = np.asarray(source)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a depth map of shape (height, width), got {array.shape}")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers in the depth map, got {array.dtype}; 8 or 16 bit integers, or floats")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_depth_file(path: Path) -> np.ndarray:
    """`stored_depth` of a file, whole or not at all; errors name the file. Pickled arrays are refused."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"{path}: JPEG changes the numbers of a depth map; store depth as PNG, TIFF or .npy")
    try:
        if path.suffix.lower() == ".npy":
            # mapped, so that a header that promises more than the file holds is refused before memory is asked for
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("expected one array, got an archive")
            return stored_depth(np.array(array))
        with PIL.Image.open(path) as picture:
            return stored_depth(ImageOps.exif_transpose(picture))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a depth map: {error}") from error


def read_depth_map(
    source,
    scale: float = 1.0,
    offset: float = 0.0,
    invalid: float | None = 0,
    depth_range: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A depth map in metres, and the metres it holds outside of `depth_range`.

    metres = stored * scale + offset. No measurement (0 in the result) is where the stored number is `invalid` or not
    finite, and where the metres are not positive or outside the range, whose ends belong to it.

    Returns:
        metres (height, width) float32, and the values (count,) that were measured but lie outside of the range.
    """
    stored = stored_depth(source)
    measured = np.isfinite(stored) if stored.dtype.kind == "f" else np.ones(stored.shape, dtype=bool)
    if invalid is not None:
        measured &= stored != invalid
    metres = np.where(measured, stored, 0).astype(np.float64) * scale + offset
    measured &= (metres > 0) & np.isfinite(metres)
    if measured.any():
        check_unit(stored[measured], metres[measured], scale, offset, depth_range)
    metres = metres.astype(np.float32)  # before comparing: 10 m in float32 is the 10 m of the range
    inside = measured
    if depth_range is not None:
        low, high = np.float32(depth_range[0]), np.float32(depth_range[1])
        inside = measured & (metres >= low) & (metres <= high)
    return np.where(inside, metres, np.float32(0)), metres[measured & ~inside]


def check_unit(
    stored: np.ndarray, metres: np.ndarray, scale: float, offset: float, depth_range: tuple[float, float] | None
) -> None:
    """Refuse a map whose numbers contradict the declared unit.

    That is a map that lies outside of the range as a whole; one whose middle is no plausible distance, if there is no
    range; and, with a range, one whose middle is outside of it while the number type speaks for another unit: integers
    taken for metres, or floats taken for steps of a millimetre or so.

    Args:
        stored, metres: (count,) measured values before and after the unit was applied.
    """
    low, high = PLAUSIBLE_METRES if depth_range is None else depth_range
    every = max(1, len(metres) // 4096)  # the middle of some is as good as the middle of all
    middle, middle_stored = float(np.median(metres[::every])), float(np.median(stored[::every]))
    floats = stored.dtype.kind == "f"
    fits = low <= middle <= high
    tiny = floats and scale < 0.1 and middle < PLAUSIBLE_METRES[0] and low <= middle_stored <= high
    contradicts = tiny or (not fits and (scale == 1) != floats)
    found_low, found_high = float(metres.min()), float(metres.max())
    all_outside = depth_range is not None and (found_low > high or found_high < low)
    if not (all_outside or contradicts or (depth_range is None and not fits)):
        return
    likely = {
        name: unit for name, unit in COMMON_UNITS.items() if unit != scale and low <= middle_stored * unit <= high
    }
    if likely:
        name = next(iter(likely))
        advice = f"they look like {name}: set depth_scale={likely[name]:.6g}"
    else:
        advice = "set depth_scale (metres per stored step) to what the data's makers say"
    raise ValueError(
        f"the declared unit does not fit: depth_scale={scale:g} and depth_offset={offset:g} make {found_low:.4g} to "
        f"{found_high:.4g} m of the stored {stored.min():.6g} to {stored.max():.6g} ({stored.dtype}), expected about "
        f"{low:g} to {high:g} m; {advice}, or declare another depth_range if the metres are right"
    )


def warn_outside(outside: np.ndarray, measured: int, depth_range: tuple[float, float]) -> None:
    """Tell how many values lie outside of the range and what was found."""
    warnings.warn(
        f"{len(outside)} of {measured} depth values lie outside of depth_range {tuple(depth_range)} m and count as no "
        f"measurement; found {outside.min():.4g} to {outside.max():.4g} m outside of it. This is said once.",
        stacklevel=2,
    )


def bilinear_places(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper neighbour of each new pixel centre along one axis, and the weight of the upper one."""
    centres = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    lower = np.floor(centres).astype(np.int64)
    return lower, np.minimum(lower + 1, old - 1), (centres - lower).astype(np.float32)


def resize_depth_bilinear(metres: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear between the up to four measured pixels around each new pixel's centre: (height, width) -> size.

    Pixels without a measurement do not take part; where they would have had more than half of the weight, nothing is
    known of the new pixel either.
    """
    (top, bottom, down), (left, right, across) = (
        bilinear_places(old, new) for old, new in zip(metres.shape, size, strict=True)
    )

    def blend(values: np.ndarray) -> np.ndarray:
        rows = values[top] * (1 - down[:, None]) + values[bottom] * down[:, None]
        return rows[:, left] * (1 - across) + rows[:, right] * across

    weight = blend((metres > 0).astype(np.float32))
    return np.where(weight >= 0.5, blend(metres) / np.maximum(weight, 0.5), np.float32(0)).astype(np.float32)
