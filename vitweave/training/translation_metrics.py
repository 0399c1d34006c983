"""How near drawn images are to real ones: MAE, MSE, PSNR and SSIM, averaged per image and then over the images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitweave.training.image_distances import ImageDistances

TRANSLATION_METRICS = ("mae", "mse", "psnr", "ssim")
WINDOW, SIGMA = 11, 1.5  # of SSIM (doi:10.1109/TIP.2003.819861)
STABILISERS = (0.01**2, 0.03**2)
LOWEST_MSE = 1e-10  # equal images have 100 dB


def blur(maps: Tensor) -> Tensor:
    """Gaussian mean around every place whose window lies inside: (batch, channels, height - 10, width - 10)."""
    places = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    line = (-(places**2) / (2 * SIGMA**2)).exp()
    line = (line / line.sum()).expand(maps.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(maps, line, groups=maps.shape[1])
    return F.conv2d(rows, line.transpose(2, 3), groups=maps.shape[1])


def structural_similarity(drawn: Tensor, real: Tensor, measured: Tensor) -> Tensor:
    """SSIM per image, (batch,), over the windows that hold measured pixels only; NaN where there is none.

    Args:
        drawn, real: (batch, channels, height, width) in [0, 1], both 0 where nothing was measured.
        measured: of the same shape, bool.
    """
    if min(drawn.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(drawn.shape[-2:])}")
    mean_drawn, mean_real = blur(drawn), blur(real)
    variance_drawn = blur(drawn * drawn) - mean_drawn**2
    variance_real = blur(real * real) - mean_real**2
    covariance = blur(drawn * real) - mean_drawn * mean_real
    first, second = STABILISERS
    similarity = (2 * mean_drawn * mean_real + first) * (2 * covariance + second)
    similarity = similarity / ((mean_drawn**2 + mean_real**2 + first) * (variance_drawn + variance_real + second))
    whole = F.max_pool2d((~measured).to(drawn.dtype), WINDOW, stride=1) == 0
    return similarity.where(whole, torch.nan).flatten(1).nanmean(dim=1)


def translation_metrics(drawn: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Figures per image, (batch,), on intensities from 0 to 1; NaN where nothing of an image was measured.

    Args:
        drawn, real: (batch, channels, height, width) in [-1, 1]; pixels that are NaN in the real image do not count.
    """
    if drawn.shape != real.shape:
        raise ValueError(f"expected drawn images as large as the real ones, got {drawn.shape} and {real.shape}")
    measured = ~real.isnan()
    drawn, real = ((images.double().where(measured, -1) + 1) / 2 for images in (drawn, real))
    difference, count = (drawn - real).flatten(1), measured.flatten(1).sum(dim=1)
    mse = difference.square().sum(dim=1) / count  # 0 / 0 = NaN
    return {
        "mae": difference.abs().sum(dim=1) / count,
        "mse": mse,
        "psnr": -10 * mse.clamp_min(LOWEST_MSE).log10(),
        "ssim": structural_similarity(drawn, real, measured),
    }


def drawn_images(outputs, labels: Tensor) -> Tensor:
    """`preprocess_logits_for_metrics` of the Trainer: the images of the ensemble."""
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


class TranslationMetrics:
    """`compute_metrics` of the Trainer with `batch_eval_metrics=True`: between batches it keeps one sum per figure.

    Args:
        distances: adds fid and kid, of the images with 0 where nothing was measured.
    """

    def __init__(self, distances: ImageDistances | None = None):
        self.distances = distances
        self.reset()

    def reset(self) -> None:
        if self.distances is not None:
            self.distances.reset()
        self.sums = dict.fromkeys(TRANSLATION_METRICS, 0.0)
        self.counts = dict.fromkeys(TRANSLATION_METRICS, 0)

    def update(self, drawn: Tensor, real: Tensor) -> None:
        """Add images (batch, channels, height, width)."""
        drawn, real = torch.as_tensor(drawn), torch.as_tensor(real)
        if self.distances is not None:
            measured = ~real.isnan()
            self.distances.update((real.where(measured, -1) + 1) / 2, real=True)
            self.distances.update((drawn.where(measured, -1) + 1) / 2, real=False)
        for name, values in translation_metrics(drawn, real).items():
            self.sums[name] += values.nansum().item()
            self.counts[name] += int((~values.isnan()).sum())

    def compute(self) -> dict[str, float]:
        """mae, mse, psnr (dB) and ssim; NaN of one that no image has. With distances, fid and kid."""
        means = {name: self.sums[name] / self.counts[name] if self.counts[name] else float("nan") for name in self.sums}
        return means if self.distances is None else means | self.distances.compute()

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        self.update(prediction.predictions, prediction.label_ids)
        if not compute_result:
            return {}
        metrics = self.compute()
        self.reset()
        return metrics
