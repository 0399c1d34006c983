"""Named protocols of depth evaluation: which pixels count, up to which distance, and how relative depth is aligned."""

from dataclasses import asdict, dataclass, fields, replace

import numpy as np

ALIGNMENTS = (None, "median", "least_squares")
PREDICTIONS = ("metres", "disparity")


@dataclass(frozen=True)
class DepthProtocol:
    """How depth is evaluated; the name stands beside every number measured so.

    Args:
        name: what the numbers are published under.
        crop: (top, bottom, left, right) of the counted window in an image of `crop_size`; None counts every pixel. For
            labels of another size the four bounds are scaled and rounded down, as the published KITTI code does.
        crop_size: (height, width) the crop is written for; (1, 1) for fractions of the image.
        min_depth, max_depth: metres; labels count if they lie strictly between, predictions are clamped to them.
        alignment: per image, before clamping: None, "median" (times median(label) / median(prediction)), or
            "least_squares" (scale and shift with the smallest squared error).
        prediction: what the model returns: "metres" (or depth up to scale and shift), or "disparity" (1 / depth), which
            is aligned as disparity and inverted afterwards.
        flip: average with the prediction for the mirrored image; `evaluate_depth` does that.
    """

    name: str
    crop: tuple[float, float, float, float] | None = None
    crop_size: tuple[int, int] = (1, 1)
    min_depth: float = 1e-3
    max_depth: float = 10.0
    alignment: str | None = None
    prediction: str = "metres"
    flip: bool = False

    def __post_init__(self):
        if not 0 < self.min_depth < self.max_depth:
            raise ValueError(f"expected 0 < min_depth < max_depth in metres, got {self.min_depth} and {self.max_depth}")
        for value, known in ((self.alignment, ALIGNMENTS), (self.prediction, PREDICTIONS)):
            if value not in known:
                raise ValueError(f"unknown {value!r}; known: {list(known)}")

    def variant(self, **changes) -> "DepthProtocol":
        """The protocol with other fields and a name that says so, e.g. `nyu_eigen_alignment_median`."""
        unknown = sorted(changes.keys() - {field.name for field in fields(self)})
        if unknown:
            raise ValueError(f"unknown fields {unknown}; known: {[field.name for field in fields(self)]}")
        told = {name: value for name, value in changes.items() if value != asdict(self)[name]}
        parts = [name if value is True else f"{name}_{value}" for name, value in told.items() if name != "name"]
        return replace(self, **{"name": "_".join([self.name, *parts]), **changes})

    def window(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the counted window in labels of this size."""
        if self.crop is None:
            return slice(0, height), slice(0, width)
        (top, bottom), (left, right) = (
            [int(bound * length / full) for bound in bounds]
            for bounds, length, full in zip(
                (self.crop[:2], self.crop[2:]), (height, width), self.crop_size, strict=True
            )
        )
        return slice(top, bottom), slice(left, right)

    def aligned(self, prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
        """The window of one prediction (height, width) as metres; aligned on the counted pixels of `target`."""
        if self.alignment is None and self.prediction == "metres":
            return prediction
        counted = (target > self.min_depth) & (target < self.max_depth)
        values, truth = prediction[counted].astype(np.float64), target[counted].astype(np.float64)
        disparity = self.prediction == "disparity"
        scale, shift = scale_and_shift(values, 1 / truth if disparity else truth, self.alignment)
        prediction = (prediction * scale + shift).astype(prediction.dtype)
        # far away a disparity may come out as 0 or less: that is at max_depth
        return 1 / np.maximum(prediction, prediction.dtype.type(1 / self.max_depth)) if disparity else prediction


def scale_and_shift(values: np.ndarray, truth: np.ndarray, alignment: str | None) -> tuple[float, float]:
    """Scale and shift (0 for the median) that bring `values` (count,) to `truth`; 1 and 0 for no values."""
    if alignment is None or not len(values):
        return 1.0, 0.0
    if alignment == "median":
        middle = np.median(values)
        return (float(np.median(truth) / middle), 0.0) if middle else (1.0, 0.0)
    spread = values - values.mean()
    square = spread @ spread
    scale = float(spread @ truth / square) if square else 0.0  # a constant prediction becomes the mean of the truth
    return scale, float(truth.mean() - scale * values.mean())


NYU_CROP = (45, 471, 41, 601)  # Eigen et al. 2014 (arXiv:1406.2283): rows 45:471, columns 41:601 of 480 x 640
GARG_CROP = (0.40810811, 0.99189189, 0.03594771, 0.96405229)  # Garg et al. 2016 (arXiv:1603.04992)
KITTI_EIGEN_CROP = (0.3324324, 0.91351351, 0.0359477, 0.96405229)

DEPTH_PROTOCOLS: dict[str, DepthProtocol] = {
    protocol.name: protocol
    for protocol in (
        DepthProtocol("nyu_eigen", NYU_CROP, (480, 640)),
        DepthProtocol("nyu"),
        DepthProtocol("kitti_garg", GARG_CROP, max_depth=80.0),
        DepthProtocol("kitti_eigen", KITTI_EIGEN_CROP, max_depth=80.0),
        DepthProtocol("sun_rgbd"),
        DepthProtocol("median_scaled", alignment="median"),
        DepthProtocol("affine_invariant", alignment="least_squares"),
        DepthProtocol("affine_invariant_disparity", alignment="least_squares", prediction="disparity"),
    )
}


def find_protocol(protocol: str | DepthProtocol) -> DepthProtocol:
    """A protocol by its name; one that is made already is returned."""
    if isinstance(protocol, DepthProtocol):
        return protocol
    if protocol not in DEPTH_PROTOCOLS:
        raise ValueError(
            f"unknown depth protocol {protocol!r}; known: {sorted(DEPTH_PROTOCOLS)}; variants of one are made with"
            " DEPTH_PROTOCOLS[name].variant(max_depth=5.0)"
        )
    return DEPTH_PROTOCOLS[protocol]
