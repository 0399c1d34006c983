"""Encoder fusions side by side in classification: frozen encoders, their features computed once, the same seeds."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, set_seed

from vitweave.analysis.bootstrap import resampled_sums
from vitweave.analysis.fusion_comparison import mean_of, seconds_of
from vitweave.analysis.whole_files import write_whole
from vitweave.configuration.encoder_fusion_plans import cells
from vitweave.modeling.encoder_fusion.registry import ENCODER_FUSIONS
from vitweave.modeling.modeling_multi_encoder import MultiEncoderForImageClassification, MultiEncoderModel
from vitweave.modeling.options import pick
from vitweave.training.classification import train_classification
from vitweave.training.classification_data import ImageClassificationDataset, collate_classification
from vitweave.training.feature_cache import CachedFeatures, FeatureCollator, StackedSamples, cache_features
from vitweave.training.feature_keys import digest_of
from vitweave.training.retrieval_metrics import interval

PLAIN = "channel_concat"  # what every other fusion must justify itself against
ADAPTERS = "mixture_of_resolution + adapters"


@dataclass(frozen=True)
class EncoderComparisonOptions:
    """What all runs of a comparison share.

    Args:
        fusion_options: name of a fusion -> its options, beside those of `small_options`.
        adapters: also train mixture_of_resolution with its adapters between the blocks of the first encoder, which
            needs the images in every step.
        steps, batch_size, weight_decay: of every run; the last step's weights count, none is chosen.
        learning_rates: of these each row takes the one that is best on `held_out` of the training images, with seed 0
            (see `choose_rate`); it then trains on all of them.
        held_out: share of the training images.
        resamples: of the bootstrap.
    """

    fusion_options: dict[str, dict] = field(default_factory=dict)
    adapters: bool = False
    steps: int = 300
    batch_size: int = 16
    weight_decay: float = 0.05
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    held_out: float = 0.2
    resamples: int = 2000


@dataclass(frozen=True)
class Row:
    """One row of the table: which encoders in which order, and what fuses them.

    Args:
        fusion_options: all that differ from the defaults.
        online: trained on images; features kept beforehand would change.
    """

    name: str
    fusion_type: str
    encoders: tuple[int, ...]
    fusion_options: dict
    online: bool = False


class EncoderFeatures(Dataset):
    """Kept features of some of the encoders, in another order where one is asked for."""

    def __init__(self, features: CachedFeatures, encoders: Sequence[int]):
        self.features, self.encoders = features, tuple(encoders)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> StackedSamples:
        batch = self.features.__getitems__(indices).batch
        maps = batch["encoder_outputs"]["maps"]
        chosen = {"maps": tuple(maps[index] for index in self.encoders)}
        return StackedSamples({**batch, "encoder_outputs": chosen}, len(indices))


class EncoderComparison:
    """The encoders, the data and the settings of a comparison.

    Args:
        encoders: vision models; they are frozen.
        train, validation: pictures and classes, without augmentation.
        out: folder for the features, and one file per finished run.
        tower: fields of `MultiEncoderConfig` that say how the encoders see the images: image_size, image_mean,
            image_std, and `encoder_options`, one entry per encoder.
    """

    def __init__(
        self,
        encoders: Sequence[PreTrainedModel],
        train: ImageClassificationDataset,
        validation: ImageClassificationDataset,
        out: str | Path,
        options: EncoderComparisonOptions,
        tower: dict | None = None,
    ):
        self.encoders = [encoder.requires_grad_(False).eval() for encoder in encoders]
        self.images, self.out, self.options = (train, validation), Path(out), options
        self.tower = dict(tower or {})
        given = self.tower.pop("encoder_options", None) or [{}] * len(self.encoders)
        self.encoder_options = [{**entry, "frozen": True} for entry in given]
        self.source = self.build(Row("", PLAIN, tuple(range(len(self.encoders))), {}), MultiEncoderModel)
        self.features: tuple[CachedFeatures, ...] = ()
        self.keys: list[str] = []

    def build(self, row: Row, model_class: type = MultiEncoderForImageClassification) -> PreTrainedModel:
        """A tower, under a classifier or without one, around the encoders themselves."""
        labels = self.images[0].id2label
        more = {"id2label": labels} if model_class is MultiEncoderForImageClassification else {}
        return model_class.from_encoders(
            [self.encoders[index] for index in row.encoders],
            encoder_options=[self.encoder_options[index] for index in row.encoders],
            fusion_type=row.fusion_type,
            fusion_options=row.fusion_options,
            **self.tower,
            **more,
        )

    def keep_features(self) -> None:
        """Run every image through the encoders, unless an earlier comparison has."""
        train, validation = self.images
        validation = cache_features(self.source, validation, self.out / "features")  # the smaller one first
        self.features = (cache_features(self.source, train, self.out / "features"), validation)
        self.keys = [
            digest_of([part.shard(number).keys[place] for number, place in part.places.tolist()])
            for part in self.features
        ]

    def data(self, row: Row) -> tuple[Dataset, Dataset]:
        """What a row trains on and what it is measured on."""
        return self.images if row.online else tuple(EncoderFeatures(part, row.encoders) for part in self.features)

    def settings(self, row: Row) -> str:
        """What a run depends on, as one digest; of all options only those that it reads."""
        options = asdict(self.options)
        shared = {name: options[name] for name in ("steps", "batch_size", "weight_decay")}
        return digest_of({"data": self.keys, "row": asdict(row), **shared})

    def rows(self, fusions: Sequence[str]) -> list[Row]:
        """Every encoder alone, plain concatenation, and the other fusions; wrong names and sizes are refused."""
        for name in fusions:
            pick(ENCODER_FUSIONS, name, "fusion_type")
        strange = sorted(self.options.fusion_options.keys() - set(fusions))
        if strange:
            raise ValueError(f"expected options of the fusions {list(fusions)}, got some of {strange}")
        rows = [Row(name, PLAIN, (index,), {}) for index, name in enumerate(names_alone(self.encoders))]
        rows += [self.fused(name, name) for name in dict.fromkeys([PLAIN, *fusions])]
        if self.options.adapters:
            rows.append(self.fused(ADAPTERS, "mixture_of_resolution"))
        for row in rows:
            self.build(row)
        return rows

    def fused(self, name: str, fusion_type: str) -> Row:
        """The row of a fusion. Mining wants the coarsest map first, whose tokens look into the finer ones."""
        config, order = self.source.config, tuple(range(len(self.encoders)))
        if fusion_type == "patch_info_mining":
            order = tuple(sorted(order, key=lambda index: cells(config.grids[index])))
        options = small_options(fusion_type, config.in_channels[order[0]])
        options |= self.options.fusion_options.get(fusion_type, {})
        if name == ADAPTERS:
            options.pop("adapter_layers")
        return Row(name, fusion_type, order, options, online=name == ADAPTERS)


def names_alone(encoders: Sequence[PreTrainedModel]) -> list[str]:
    """A name for each encoder by itself."""
    kinds = [encoder.config.model_type for encoder in encoders]
    return [f"{kind} alone" if kinds.count(kind) == 1 else f"{kind} {index} alone" for index, kind in enumerate(kinds)]


def small_options(fusion_type: str, width: int) -> dict:
    """Options for encoders of a few million parameters and some hundred images: as wide as the first encoder, and few
    layers. Without adapters, mixture_of_resolution is the first training stage of LLaVA-HR."""
    heads = max(number for number in range(1, max(1, width // 64) + 1) if width % number == 0)
    queries = {"queries_per_encoder": 8, "width": width, "encoder_hidden_size": width, "depth": 2, "num_heads": heads}
    known = {
        "deformable": {"num_heads": heads},
        "mixture_of_resolution": {"adapter_layers": []},
        "query_former": queries,
        "sequence_concat": {"order": "append"},
        "spatial_vision_aggregator": {"vision_hidden_size": width, "depth": 1, "num_heads": heads},
    }
    return dict(known.get(fusion_type, {}))


def compare_encoder_fusions(
    encoders: Sequence[PreTrainedModel],
    train: ImageClassificationDataset,
    validation: ImageClassificationDataset,
    out: str | Path,
    fusions: Sequence[str] = tuple(ENCODER_FUSIONS),
    seeds: Sequence[int] = (0, 1, 2),
    options: EncoderComparisonOptions | None = None,
    tower: dict | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Train a classifier per fusion and seed on frozen encoders, and one on each encoder alone.

    All have the same head, a LayerNorm and a linear layer on the mean of the tokens, and the same steps. A comparison
    that was broken off, or that gets more seeds or fusions, goes on where it was: finished runs with the same settings
    and data are read from `out`.

    Args:
        encoders, train, validation, out, tower: see `EncoderComparison`.
        tell: gets a line per run.

    Returns:
        a dict per row, the encoders alone first; see `summary` and `add_differences`.
    """
    comparison = EncoderComparison(encoders, train, validation, out, options or EncoderComparisonOptions(), tower)
    rows = comparison.rows(fusions)
    comparison.keep_features()
    found = []
    for row in rows:
        rate = choose_rate(comparison, row)
        runs = [finished(comparison, row, seed, rate) for seed in seeds]
        accuracies = ", ".join(f"{run['accuracy']:.3f}" for run in runs)
        tell(f"{row.name}: accuracy {accuracies} with a learning rate of {rate:g}")
        found.append(summary(row, runs, rate, costs(comparison, row), comparison.options.resamples))
    return add_differences(found, len(encoders))


def choose_rate(comparison: EncoderComparison, row: Row) -> float:
    """The learning rate that is best on the held-out part of the training images, tried from the lowest upwards for as
    long as a higher one helps; the loss decides between equal accuracies."""
    rates, best = sorted(comparison.options.learning_rates), None
    if len(rates) == 1:
        return rates[0]
    for rate in rates:
        tried = finished(comparison, row, 0, rate, comparison.options.held_out)
        score = (tried["accuracy"], -tried["loss"])
        if best is not None and score <= best[0]:
            break
        best = (score, rate)
    return best[1]


def finished(comparison: EncoderComparison, row: Row, seed: int, rate: float, held_out: float = 0.0) -> dict:
    """A run, from its file if there is one that was made with these settings."""
    slug = row.name.replace(" + ", "_").replace(" ", "_")
    name = f"{slug}-rate{rate:g}-" + (f"held_out{held_out:g}" if held_out else f"seed{seed}")
    path = comparison.out / "runs" / f"{name}.json"
    settings = comparison.settings(row)
    if path.is_file():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
    train, validation = comparison.data(row)
    if held_out:
        train, validation = split(train, held_out)
    found = {"settings": settings, "seed": seed, **one_run(comparison, row, seed, rate, train, validation)}
    write_whole(path, json.dumps(found))
    return found


def split(dataset: Dataset, share: float) -> tuple[Subset, Subset]:
    """The dataset without a random share of it, the same in every run, and that share."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    count = max(1, round(share * len(dataset)))
    return Subset(dataset, sorted(order[count:])), Subset(dataset, sorted(order[:count]))


def one_run(
    comparison: EncoderComparison, row: Row, seed: int, rate: float, train: Dataset, validation: Dataset
) -> dict:
    """Train one classifier: which validation images it gets right, its loss, and seconds of training."""
    set_seed(seed)
    model, options = comparison.build(row), comparison.options
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = train_classification(
            model,
            train,
            output_dir=folder,
            seed=seed,
            max_steps=options.steps,
            learning_rate=rate,
            weight_decay=options.weight_decay,
            per_device_train_batch_size=options.batch_size,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
    seconds = time.perf_counter() - start
    right, loss = measured(model, validation, options.batch_size)
    return {"accuracy": mean_of(right), "loss": loss, "right": right, "seconds": seconds, **done}


@torch.no_grad()
def measured(model: PreTrainedModel, dataset: Dataset, batch_size: int) -> tuple[list[int], float]:
    """1 or 0 for every image, whether it is classified right, and the mean loss."""
    model.eval()
    right, losses = [], []
    loader = DataLoader(dataset, batch_size, collate_fn=FeatureCollator(collate_classification))
    for batch in loader:
        inputs = {name: batch[name] for name in ("pixel_values", "encoder_outputs") if name in batch}
        logits = model(**to_device(inputs, model.device)).logits.float().cpu()
        losses.append(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"))
        right += (logits.argmax(dim=1) == batch["labels"]).int().tolist()
    return right, torch.cat(losses).mean().item()


def to_device(value, device: torch.device):
    """Tensors in nested dicts and tuples, on a device."""
    if isinstance(value, dict):
        return {name: to_device(part, device) for name, part in value.items()}
    return tuple(to_device(part, device) for part in value) if isinstance(value, tuple) else value.to(device)


@torch.no_grad()
def costs(comparison: EncoderComparison, row: Row, images: int = 32, rounds: int = 5) -> dict:
    """Parameters of the fusion, adapters included, and the median of its milliseconds per image behind the encoders."""
    model = comparison.build(row).eval().multi_encoder
    features = EncoderFeatures(comparison.features[1], row.encoders)
    count = min(images, len(features))
    kept = to_device(features.__getitems__(list(range(count))).batch["encoder_outputs"], model.device)
    read, adapters = model.kept(kept, None), getattr(model.fusion, "adapters", ())

    def fuse():
        for adapter in adapters:
            adapter(*read.maps)
        model.fusion(read)

    times = sorted(seconds_of(fuse, model.device) for _ in range(rounds + 1))
    parameters = sum(parameter.numel() for parameter in model.fusion.parameters())
    return {"parameters": parameters, "milliseconds": 1000 * times[rounds // 2] / count}


def summary(row: Row, runs: list[dict], rate: float, cost: dict, resamples: int) -> dict:
    """A row's runs together.

    Returns:
        name, encoders, accuracy (mean of the seeds) with low and high (95 % bootstrap over the validation images, of
        that mean), seeds (a dict per seed), the learning rate, train_loss, seconds of a run, the fusion's parameters
        and milliseconds; samples of the bootstrap.
    """
    right = torch.tensor([run["right"] for run in runs], dtype=torch.float64).mean(dim=0)  # (images,)
    samples = resampled_sums(right[:, None], resamples)[:, 0] / len(right)
    low, high = interval(samples)
    facts = {"name": row.name, "encoders": list(row.encoders), "fusion_options": row.fusion_options}
    return {
        **facts,
        "accuracy": right.mean().item(),
        "low": low,
        "high": high,
        "seeds": [{name: run[name] for name in ("seed", "accuracy")} for run in runs],
        "learning_rate": rate,
        "train_loss": mean_of(run["train_loss"] for run in runs),
        "seconds": mean_of(run["seconds"] for run in runs),
        **cost,
        "samples": samples,
    }


def add_differences(rows: list[dict], num_encoders: int) -> list[dict]:
    """To the fused rows their difference to the better encoder alone and to plain concatenation, image by image."""
    best = max(rows[:num_encoders], key=lambda row: row["accuracy"])
    for row in rows[num_encoders:]:
        row["differences"] = {}
        for peer, other in (("alone", best), ("concat", rows[num_encoders])):
            if row is not other:
                low, high = interval(row["samples"] - other["samples"])
                gain = row["accuracy"] - other["accuracy"]
                row["differences"][peer] = {"accuracy": gain, "low": low, "high": high}
    for row in rows:
        row.pop("samples")
    return rows
