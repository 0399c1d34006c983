"""Inspect a vision model: measure it on images and write `report.json` and plots."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from vitweave.analysis.drift import ParameterDrift, specialization_drift
from vitweave.analysis.inputs import find_images, from_processor, open_model, open_preprocessing, pixel_batches
from vitweave.analysis.measurement import Measurement, TapStatistics, measure
from vitweave.analysis.norms import NormOutliers, cls_share, median, norm_outliers, one_role_dimensions
from vitweave.analysis.pca import PcaMaps, pca_maps
from vitweave.analysis.plots import plot_cosine, plot_dimensions, plot_drift, plot_patch_norms, plot_pca
from vitweave.analysis.whole_files import write_whole

logger = logging.get_logger(__name__)

SHOWN = 8  # images in a plot


@dataclass(frozen=True)
class InspectOptions:
    """What can be chosen about an inspection."""

    limit: int | None = None  # use only the first images
    batch_size: int = 8
    device: str | None = None  # None = cuda where there is one, for a model given by name
    tau: float = 0.9  # share above which a dimension belongs to one role
    norm_threshold: float | None = None  # None = robust, from the median
    norm_block: int | None = None  # None = last
    foreground_threshold: float | None = None  # None = PCA over all patches
    foreground_side: str = "above"
    plots: bool = True
    progress: bool = False


def inspect_model(
    model: str | Path | nn.Module,
    images: str | Path | Iterable[str | Path | Image.Image],
    out: str | Path,
    processor=None,
    options: InspectOptions | None = None,
) -> dict:
    """Measure a vanilla or specialised vision model on images.

    Args:
        model: a folder or Hub id for `AutoModel`, or a model.
        images: files, folders, or opened pictures.
        out: folder for `report.json`, `cosine.png`, `dimensions.png`, `patch_norms.png`, `pca.png` and `drift.png`.
            Without matplotlib only the JSON is written.
        processor: an image processor; None = the one saved with the model, else resizing and ImageNet normalisation.

    Returns:
        What `report.json` holds: model, model_type, vitweave_version, images, preprocessing, image_size, grid,
        num_cls_tokens, num_register_tokens, token_similarity, dimensions, patch_norms, pca, drift (each null where it
        was skipped), skipped (analysis -> reason) and plots (file names). Blocks count from 0, as in parameter names.
    """
    options = options or InspectOptions()
    images = _image_list(images)[: options.limit]
    name = None if isinstance(model, nn.Module) else str(model)
    model = open_model(name) if name is not None else model
    if name is not None or options.device is not None:
        model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    preprocessing = from_processor(processor) if processor is not None else open_preprocessing(name, model)
    pictures: list[Tensor] = []
    batches = _prepared(pixel_batches(images, preprocessing, options.batch_size), model, pictures, preprocessing)
    if options.progress:
        from tqdm.auto import tqdm  # imported late: only a progress bar

        batches = tqdm(batches, total=-(-len(images) // options.batch_size), desc="inspect", unit="batch")
    measured = measure(model, batches, norm_block=options.norm_block)
    findings = _analyse(model, measured, options)
    report = {
        "model": name or getattr(model.config, "name_or_path", "") or type(model).__name__,
        "model_type": model.config.model_type,
        "images": [str(image) if isinstance(image, (str, Path)) else f"picture {i}" for i, image in enumerate(images)],
        "preprocessing": preprocessing.description,
        "image_size": list(pictures[0].shape[:2]),
        **_as_json(measured, findings, options),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report["plots"] = []
    if options.plots:
        report["plots"] = _write_plots(folder, torch.stack(pictures), measured, findings, options, report["skipped"])
    write_whole(folder / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


@dataclass
class _Findings:
    shares: dict[str, Tensor]
    outliers: NormOutliers | None
    pca: PcaMaps | None
    drift: list[ParameterDrift]


def _image_list(images) -> list:
    if isinstance(images, (str, Path)):
        return find_images(images)
    images = [images] if isinstance(images, Image.Image) else list(images)
    if all(isinstance(image, (str, Path)) for image in images):
        return find_images(images)
    return images


def _prepared(batches: Iterator[Tensor], model: nn.Module, pictures: list, preprocessing) -> Iterator[Tensor]:
    """Move batches to the model's device and dtype, and keep the first pictures for the plots."""
    parameter = next(model.parameters())
    for batch in batches:
        pictures.extend(preprocessing.undo(values) for values in batch[: max(SHOWN - len(pictures), 0)])
        yield batch.to(parameter.device, parameter.dtype)


def _analyse(model: nn.Module, measured: Measurement, options: InspectOptions) -> _Findings:
    shares = {
        tap: cls_share(statistics.abs_mean_cls, statistics.abs_mean_patch)
        for tap, statistics in measured.taps.items()
        if statistics.abs_mean_cls is not None
    }
    norms, features = measured.patch_norms, measured.features
    outliers = None if norms is None else norm_outliers(norms, options.norm_threshold)
    pca = None
    if features is not None and min(features.flatten(0, 1).shape) < 3:
        measured.skipped["pca"] = f"needs at least 3 patches in all, got {features.shape[0] * features.shape[1]}"
    elif features is not None:
        pca = pca_maps(features, measured.grid, options.foreground_threshold, options.foreground_side)
    drift = specialization_drift(model)
    if not drift:
        measured.skipped["drift"] = "the model has no specialised parameters"
    return _Findings(shares, outliers, pca, drift)


def _as_json(measured: Measurement, findings: _Findings, options: InspectOptions) -> dict:
    from vitweave import __version__

    outliers, pca = findings.outliers, findings.pca
    similarity = {tap: _similarity(statistics) for tap, statistics in measured.taps.items()}
    dimensions = {
        tap: {
            "share": [[round(x, 4) for x in row] for row in share.tolist()],
            **one_role_dimensions(share, options.tau),
        }
        for tap, share in findings.shares.items()
    }
    return {
        "vitweave_version": __version__,
        "grid": list(measured.grid),
        "num_cls_tokens": measured.layout.num_cls,
        "num_register_tokens": measured.layout.num_registers,
        "token_similarity": similarity or None,
        "dimensions": {"tau": options.tau, **dimensions} if dimensions else None,
        "patch_norms": outliers
        and {
            "block": measured.norm_block,
            "rule": "median + 3 * 1.4826 * MAD" if options.norm_threshold is None else "absolute",
            "threshold": outliers.threshold,
            "fraction_above": outliers.fraction,
            "fraction_above_per_image": outliers.mask.double().mean(dim=1).tolist(),
            "median": float(median(measured.patch_norms)),
            "max": float(measured.patch_norms.max()),
        },
        "pca": pca
        and {
            "explained_variance_ratio": pca.explained_variance_ratio.tolist(),
            "foreground_fraction": None if pca.foreground is None else float(pca.foreground.double().mean()),
        },
        "drift": [_finite(asdict(drift)) for drift in findings.drift] or None,
        "skipped": dict(measured.skipped),
    }


def _similarity(statistics: TapStatistics) -> dict:
    result = {}
    for name in ("cls_patch_cosine", "patch_patch_cosine", "cls_register_cosine"):
        values = getattr(statistics, name)
        if values is not None:
            result[name] = {"mean": values.mean(dim=1).tolist(), "per_image": values.tolist()}
    if statistics.cls_patch_cosine_std is not None:
        spread = statistics.cls_patch_cosine_std
        result["cls_patch_cosine"] |= {"std_over_patches": spread.mean(dim=1).tolist()}
        result["cls_patch_cosine"] |= {"std_over_patches_per_image": spread.tolist()}
    return result


def _finite(drift: dict) -> dict:
    return drift | {"relative": None if drift["relative"] == float("inf") else drift["relative"]}


def _write_plots(
    folder: Path, pictures: Tensor, measured: Measurement, findings: _Findings, options: InspectOptions, skipped: dict
) -> list[str]:
    jobs = {}
    if measured.taps:
        jobs["cosine.png"] = lambda path: plot_cosine(measured.taps, path)
    if findings.shares:
        jobs["dimensions.png"] = lambda path: plot_dimensions(findings.shares, options.tau, path)
    if findings.outliers:
        norms, grid, outliers = measured.patch_norms, measured.grid, findings.outliers
        jobs["patch_norms.png"] = lambda path: plot_patch_norms(
            pictures, norms, grid, outliers, measured.norm_block, path
        )
    if findings.pca:
        pca = findings.pca
        jobs["pca.png"] = lambda path: plot_pca(pictures, pca.maps, pca.explained_variance_ratio, path)
    if findings.drift:
        jobs["drift.png"] = lambda path: plot_drift(findings.drift, path)
    try:
        for file_name, draw in jobs.items():
            draw(folder / file_name)
    except ImportError as error:
        logger.warning(str(error))
        skipped["plots"] = str(error)
        return []
    return list(jobs)
