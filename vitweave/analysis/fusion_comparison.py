"""Layer fusions side by side in retrieval: one frozen encoder, one data set, the same seeds, features computed once."""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from vitweave.analysis.whole_files import write_whole
from vitweave.modeling.encoded_images import decode_layers
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.options import pick
from vitweave.modeling.text_encoder import build_text_model
from vitweave.modeling.vision_tower import VisionTower
from vitweave.training.feature_cache import CachedFeatures, cache_features
from vitweave.training.feature_keys import digest_of, digests_of, encoder_ingredients
from vitweave.training.retrieval import train_retrieval
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import embed_dataset
from vitweave.training.retrieval_features import CachedRetrieval, FeatureSource
from vitweave.training.retrieval_metrics import bootstrap_samples, interval, retrieval_metrics, retrieval_ranks
from vitweave.training.text_tokenizer import small_text_config

BASELINE = "last_layer_cls"  # the encoder's own pooled output, without fusion
PARTS = ("pooled", "prefix", "grid", "patch_mask")  # of cached features, what every retriever reads
FUSION_PARTS = ("base_cls", "cls")


@dataclass(frozen=True)
class ComparisonOptions:
    """What all runs of a comparison share.

    Args:
        layers: of the encoder, as in `LayerFusionConfig`.
        fusion_options: name of a fusion -> its options.
        steps, batch_size, learning_rate, weight_decay: of every run; the last step's weights count, none is chosen.
        fusion_lr_scale: the learning rate of the fusions as a multiple of `learning_rate`.
        projection_dim: channels of the space images and texts share.
        text_size, text_layers: of the text model, which is trained from scratch.
        feature_dtype: to keep the features in, e.g. "float16"; None is exact.
        resamples: of the bootstrap.
    """

    layers: str | tuple[int, ...] = "quarters"
    fusion_options: dict[str, dict] = field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    fusion_lr_scale: float = 1.0
    projection_dim: int = 256
    text_size: int = 192
    text_layers: int = 4
    feature_dtype: str | None = None
    resamples: int = 1000


def compare_fusions(
    encoder: PreTrainedModel,
    train: RetrievalDataset,
    validation: RetrievalDataset,
    out: str | Path,
    fusions: Sequence[str] = tuple(LAYER_FUSIONS),
    seeds: Sequence[int] = (0,),
    options: ComparisonOptions | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Train a retriever per fusion and seed on cached features of `encoder`, and one on its last layer's [CLS].

    A comparison that was broken off, or that gets more seeds or fusions, goes on where it was: finished runs with the
    same settings and data are read from `out`.

    Args:
        encoder: a vision model; it is frozen.
        train, validation: on one processor, whose tokenizer the text model is made for.
        out: folder for the features, and one file per finished run.
        tell: gets a line per run.

    Returns:
        a row per fusion, the baseline first; see `summary_row`.
    """
    options, out = options or ComparisonOptions(), Path(out)
    for name in fusions:
        pick(LAYER_FUSIONS, name, "fusion_type")
    strange = sorted(options.fusion_options.keys() - set(fusions))
    if strange:
        raise ValueError(f"expected options of the fusions {list(fusions)}, got some of {strange}")
    encoder.requires_grad_(False).eval()
    names = [BASELINE, *dict.fromkeys(fusions)]
    towers = {name: build_vision(encoder, name, options) for name in names}
    key, train, validation = with_shared_features(towers, train, validation, out / "features", options)
    settings = {"encoder": key, "data": digest_of([train.corpus(), validation.corpus()]), **asdict(options)}
    rows = []
    for name in names:
        costs = fusion_costs(towers[name], validation)
        runs = []
        for seed in seeds:
            path = out / "runs" / f"{name}-seed{seed}.json"
            found = finished_run(path, settings, name)
            if found is None:
                found = {"fusion": name, "seed": seed, **one_run(encoder, name, seed, train, validation, options)}
                write_whole(path, json.dumps({"settings": digest_of(settings_of(settings, name)), **found}))
            tell(f"{name}, seed {seed}: RSUM {found['metrics']['rsum']:.3f}")
            runs.append(found)
        rows.append(summary_row(name, runs, costs, rows[0] if rows else None, options.resamples))
    for row in rows:
        row.pop("samples")
    return rows


def settings_of(settings: dict, name: str) -> dict:
    """What a run of this fusion depends on: of the fusions' options only its own, and none without a fusion."""
    own = {"fusion_options": settings["fusion_options"].get(name)}
    return {**settings, **own, **({"fusion_lr_scale": 1.0} if name == BASELINE else {})}


def finished_run(path: Path, settings: dict, name: str) -> dict | None:
    """A run from its file, if it was made with these settings."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return found if found["settings"] == digest_of(settings_of(settings, name)) else None


def build_vision(encoder: PreTrainedModel, name: str, options: ComparisonOptions) -> PreTrainedModel:
    """The encoder itself, or under a new fusion."""
    if name == BASELINE:
        return encoder
    given = options.fusion_options.get(name)
    if (given or {}).get("norm") == "shared":
        raise ValueError('norm="shared" reads other features than the rest; compare it in a run of its own')
    return LayerFusionModel.from_encoder(encoder, layers=options.layers, fusion_type=name, fusion_options=given)


def tower_of(model: PreTrainedModel) -> VisionTower:
    """What a retriever without tiles reads the model by."""
    return VisionTower(model, levels=1, source="patches")


def with_shared_features(
    models: dict[str, PreTrainedModel],
    train: RetrievalDataset,
    validation: RetrievalDataset,
    folder: Path,
    options: ComparisonOptions,
) -> tuple[str, CachedRetrieval, CachedRetrieval]:
    """Both datasets with all that any of the models reads of the encoder, and the encoder's key."""
    towers = [tower_of(model) for model in models.values()]
    fused = next((tower for tower in towers if tower.is_fused), towers[0])
    source = FeatureSource(fused, needs=frozenset().union(*(tower.needs for tower in towers)))
    dtype = None if options.feature_dtype is None else getattr(torch, options.feature_dtype)
    validation, train = (  # the smaller one first
        CachedRetrieval(dataset, cache_features(source, dataset.images(), folder, dtype))
        for dataset in (validation, train)
    )
    # other fusions beside it may need more of the encoder's features, but change none of them
    known = digests_of(encoder_ingredients(source, getattr(train, "processor", None), dtype))
    return digest_of({name: part for name, part in known.items() if name != "options"}), train, validation


def parts_of(model: PreTrainedModel) -> list[str]:
    """Which entries of the cached features a model reads."""
    tower = tower_of(model)
    if not tower.is_fused:
        return list(PARTS)
    dense = ["patches", "base_patches"] if "patches" in tower.needs else []
    return [*PARTS, *FUSION_PARTS, *dense, *(["patch_means"] if "patch_means" in tower.needs else [])]


def one_run(
    encoder: PreTrainedModel,
    name: str,
    seed: int,
    train: CachedRetrieval,
    validation: CachedRetrieval,
    options: ComparisonOptions,
) -> dict:
    """Train one retriever; its metrics on validation, the rank of every query, and seconds of training."""
    set_seed(seed)
    config = small_text_config(
        train.processor.tokenizer, options.text_size, options.text_layers, max(1, options.text_size // 64)
    )
    text = build_text_model(config)  # first: the same for all fusions
    vision = build_vision(encoder, name, options)
    set_seed(seed)  # whatever the fusion has drawn: the projections are the same for all, too
    model = ImageTextRetrieverModel.from_encoders(
        vision, text, freeze_vision_encoder=True, projection_dim=options.projection_dim
    )
    train, validation = (dataset.only(parts_of(vision)) for dataset in (train, validation))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = train_retrieval(
            model,
            train,
            output_dir=folder,
            seed=seed,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            fusion_lr_scale=options.fusion_lr_scale,
            per_device_train_batch_size=options.batch_size,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
    seconds = time.perf_counter() - start
    images, texts = embed_dataset(model, validation)
    ranks = retrieval_ranks(images, texts)
    return {
        "metrics": {**retrieval_metrics(images, texts, None, options.resamples), **done},
        "seconds": seconds,
        "ranks": {way: found.tolist() for way, found in ranks.items()},
        "groups": {"image_to_text": images.groups.tolist(), "text_to_image": texts.groups.tolist()},
    }


@torch.no_grad()
def fusion_costs(model: PreTrainedModel, dataset: CachedRetrieval, images: int = 32, rounds: int = 5) -> dict:
    """Parameters of the fusion, and the median of its milliseconds per image on cached features."""
    tower = tower_of(model)
    if not tower.is_fused:
        return {"parameters": 0, "milliseconds": 0.0}
    features: CachedFeatures = dataset.only(parts_of(model)).features
    encoded = features.__getitems__(list(range(min(images, len(features))))).batch["encoder_outputs"]
    device = next(model.fusion.parameters()).device
    tokens = decode_layers({name: part.to(device) for name, part in encoded.items()}, tower.needs)
    model.eval()
    times = sorted(seconds_of(lambda: model.fusion(tokens), device) for _ in range(rounds + 1))
    return {
        "parameters": sum(parameter.numel() for parameter in model.fusion.parameters()),
        "milliseconds": 1000 * times[rounds // 2] / len(tokens.cls),
    }


def seconds_of(call: Callable, device: torch.device) -> float:
    """How long a call takes, the device's part of it included."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summary_row(name: str, runs: list[dict], costs: dict, baseline: dict | None, resamples: int) -> dict:
    """A fusion's runs as one row.

    Returns:
        fusion, rsum (mean of the seeds) with low and high (95 % bootstrap over the validation pairs, of that mean),
        seeds (a dict per seed: rsum, low, high), difference to the baseline with its own interval, pair by pair; the
        fusion's parameters and milliseconds per image; recall (mean of every R@k).
    """
    samples = bootstrap_samples(joined(runs, "ranks"), joined(runs, "groups"), resamples, seed=0)["rsum"]
    mean = mean_of(run["metrics"]["rsum"] for run in runs)
    low, high = interval(samples)
    row = {"fusion": name, "rsum": mean, "low": low, "high": high, **costs, "samples": samples}
    row["seeds"] = [
        {"seed": run["seed"], **{end: run["metrics"][f"rsum{end and '_' + end}"] for end in ("", "low", "high")}}
        for run in runs
    ]
    for entry in row["seeds"]:
        entry["rsum"] = entry.pop("")
    recalls = [metric for metric in runs[0]["metrics"] if "_R@" in metric and metric[-1].isdigit()]
    row["recall"] = {metric: mean_of(run["metrics"][metric] for run in runs) for metric in recalls}
    row["training_seconds"] = mean_of(run["seconds"] for run in runs)
    if baseline is not None:
        below, above = interval(samples - baseline["samples"])
        row["difference"] = {"rsum": mean - baseline["rsum"], "low": below, "high": above}
    return row


def joined(runs: list[dict], name: str) -> dict[str, Tensor]:
    """Ranks or groups of all seeds in one row; a group that is drawn is drawn with all its seeds."""
    return {way: torch.cat([torch.tensor(run[name][way]) for run in runs]) for way in runs[0][name]}


def mean_of(values: Iterable[float]) -> float:
    """The plain mean."""
    values = list(values)
    return sum(values) / len(values)
