"""Measure the metrics of a published model again. Nothing that a card says is executed."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch

from vitweave.hub.card import CardInfo, CardMetric, build
from vitweave.hub.checksums import sha256
from vitweave.hub.evaluations import NAME, find_evaluation
from vitweave.hub.export import load_model, load_processor


@dataclass(frozen=True)
class Recomputed:
    """A metric with its value of now, or with the reason why there is none."""

    metric: CardMetric
    value: float | None = None
    reason: str = ""

    @property
    def difference(self) -> float:
        """Of now minus published."""
        return self.value - self.metric.value


def check_data(card: CardInfo, data: Mapping[str, Path]) -> dict[str, bool]:
    """Refuse data that are not those of the card; name -> whether the card knows their SHA-256."""
    named = sorted({metric.dataset for metric in card.metrics})
    for name, path in data.items():
        if name not in named:
            raise ValueError(f"the card has no metric on data named {name!r}; it has {named}")
        if not path.exists():
            raise FileNotFoundError(f"expected the data of {name!r} in {path}, there is nothing")
        expected = card.data_sha256.get(name)
        found = sha256(path) if expected else None
        if found != expected:
            raise ValueError(
                f"{path} is another data set than {name!r} of the card: SHA-256 {found}, the card says {expected};"
                " the metrics hold for the card's data only"
            )
    return {name: name in card.data_sha256 for name in data}


def recompute(folder: Path, metrics: Sequence[CardMetric], data: Mapping[str, Path]) -> Iterator[Recomputed]:
    """Every metric of a card, in its order, measured again where that can be done.

    Args:
        folder: model and processor; they are loaded by the installed classes, their own code is not run.
        data: data set -> its folder or file, which `check_data` has seen.
    """
    values = Counter(map(_measured, metrics))
    obstacles = [_obstacle(metric, values[_measured(metric)], data) for metric in metrics]
    evaluated = None if all(obstacles) else _Evaluated(folder)
    for metric, obstacle in zip(metrics, obstacles, strict=True):
        yield Recomputed(metric, reason=obstacle) if obstacle else evaluated.measure(metric, data[metric.dataset])


def _obstacle(metric: CardMetric, values: int, data: Mapping[str, Path]) -> str:
    """Why the card, which has so many values of it, or the command do not allow to measure it; empty if they do."""
    if metric.dataset not in data:
        return f"its data were not given, --data {metric.dataset}=PATH"
    if metric.options is None:
        return "the card says that only the command measures it"
    if metric.split is None or not NAME.fullmatch(metric.split):
        return f"the card names no part of the data, but {metric.split!r:.50}"
    if values > 1:
        return "the card has several values of it, so they are not all this model's"
    return ""


def _measured(metric: CardMetric) -> tuple[str, str]:
    """What and how a metric measures; equal for one measurement of several models."""
    return metric.type, _evaluation_key(metric)


def _evaluation_key(metric: CardMetric) -> str:
    return json.dumps([metric.dataset, metric.split, metric.options], sort_keys=True)


class _Evaluated:
    """A loaded model, and what its evaluations gave: metrics of one evaluation share it."""

    def __init__(self, folder: Path):
        self.model, self.processor = load_model(folder), load_processor(folder)
        if self.processor is None:
            raise ValueError(f"{folder} holds no processor, without which no image can be read as the model wants it")
        self.model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        self.kind = find_evaluation(self.model)
        self.found: dict[str, dict[str, float]] = {}

    def measure(self, metric: CardMetric, path: Path) -> Recomputed:
        if self.kind is None:
            return Recomputed(metric, reason=f"there is no evaluation of a {type(self.model).__name__}")
        key = _evaluation_key(metric)
        if key not in self.found:
            evaluate = build(self.kind, metric.options, f"options of metric {metric.type!r}")
            values = evaluate(self.model, self.processor, path, metric.split)
            self.found[key] = {name: float(value) for name, value in values.items() if isinstance(value, Real)}
        if metric.type not in self.found[key]:
            return Recomputed(metric, reason=f"its evaluation gives other metrics: {', '.join(self.found[key])}")
        return Recomputed(metric, self.found[key][metric.type])
