"""A search over layers and fusions of frozen encoders under a budget, by successive halving on kept features.

All candidates within the budget train for a few steps on a part of the training images; the better half on the
held-out rest trains again for twice as many, until one is left. It is trained on all training images beside the
baselines, and only these are measured on the validation images. Every run starts anew and depends on its settings
alone, so that a search that was broken off goes on where it was and ends with the same numbers.

Short rounds favour small heads, which learn faster: where the candidates differ much in size, set `first_steps`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from vitweave.analysis.fusion_candidates import Candidate
from vitweave.analysis.fusion_comparison import mean_of
from vitweave.analysis.fusion_search_costs import Budget, CostMeter, affordable
from vitweave.analysis.fusion_search_reasons import find_reasons
from vitweave.analysis.fusion_search_tasks import SearchTask, resampled_values
from vitweave.analysis.whole_files import write_whole
from vitweave.training.feature_keys import digest_of
from vitweave.training.retrieval_metrics import interval

# fewer rank how fast a head starts, not how good it gets: its BatchNorm has not seen the features yet
FEWEST_STEPS = 24
MODEL_FILE = "fusion_search.json"  # beside the weights of the chosen model: what it was made with


@dataclass(frozen=True)
class SearchOptions:
    """How a search trains and judges.

    Args:
        steps: of the chosen candidate and the baselines, on all training images.
        first_steps: of every candidate in the first round; None is so many that the last round, of two, takes half of
            `steps`, but at least `FEWEST_STEPS`. A round of `steps` is the last, whoever is left.
        batch_size, learning_rate, weight_decay: of every run.
        held_out: share of the training images that judges the rounds, drawn at random once.
        seeds: of the final runs; the rounds use the first, and the saved model is the first's.
        budget: of a candidate; the baselines are trained whatever they cost.
        rounds: of the latency measurement.
        feature_dtype: to keep the features in, e.g. "float16"; None is exact.
        resamples: of the bootstrap over the validation images.
    """

    steps: int = 320
    first_steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    held_out: float = 0.2
    seeds: tuple[int, ...] = (0, 1)
    budget: Budget = field(default_factory=Budget)
    rounds: int = 25
    feature_dtype: str | None = None
    resamples: int = 2000

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out between 0 and 1, a share of the training images, got {self.held_out}")
        if self.steps < 1 or (self.first_steps is not None and self.first_steps < 1) or not self.seeds:
            raise ValueError(
                f"expected at least one step and one seed, got steps={self.steps}, first_steps={self.first_steps},"
                f" seeds={self.seeds}"
            )


class FusionSearch:
    """One search, its folder and its runs.

    Args:
        task: the encoders, their data, and what is trained on them.
        candidates: to choose from; `baselines` are compared with the choice, and may be among them.
        out: folder for the features, one file per run, the costs and the model.
        tell: gets a line per round.
        progress: show a bar of the training runs.
    """

    def __init__(
        self,
        task: SearchTask,
        candidates: Sequence[Candidate],
        baselines: Sequence[Candidate],
        out: str | Path,
        options: SearchOptions,
        tell: Callable[[str], None] = lambda line: None,
        progress: bool = False,
    ):
        self.task, self.options, self.out, self.tell = task, options, Path(out), tell
        self.candidates, self.baselines = list(candidates), list(baselines)
        self.facts = digest_of(task.facts())
        self.bar = tqdm(disable=not progress, unit="run", desc="search")

    def run(self) -> dict:
        """Search, train and measure.

        Returns:
            candidates (a dict each: name, its cost, whether it is within the budget, the rounds it was in), chosen,
            final (a dict each of the chosen one and the baselines: value with low and high, the mean of the seeds;
            seeds; differences of the chosen one to each), reasons.
        """
        everyone = list({one.name: one for one in [*self.candidates, *self.baselines]}.values())
        costs = self.costs(everyone)
        within = affordable(self.candidates, costs, self.options.budget)
        self.tell(f"{len(within)} of {len(self.candidates)} candidates are within the budget")
        dtype = None if self.options.feature_dtype is None else getattr(torch, self.options.feature_dtype)
        self.task.features.compute(self.out / "features", dtype)
        self.data = self.task.features.digest
        plan = round_plan(len(within), self.options.steps, self.options.first_steps)
        finals = len({*(one.name for one in self.baselines), "chosen"}) * len(self.options.seeds)
        self.bar.reset(sum(count for count, _ in plan) + finals)
        chosen, rounds = self.halve(within, plan)
        rows = self.final(chosen, costs)
        self.bar.close()
        known = {one["name"]: one for one in rounds}
        listed = [
            {**known.get(one.name, {"name": one.name, "rounds": []}), **costs[one.name], "within": one in within}
            for one in everyone
        ]
        return {
            "metric": self.task.metric,
            "lower_is_better": self.task.lower_is_better,
            "chosen": chosen.name,
            "candidates": listed,
            "final": rows,
            "reasons": find_reasons(self.task, chosen, self.model, self.candidates),
        }

    def costs(self, candidates: Sequence[Candidate]) -> dict[str, dict]:
        """What every candidate costs, measured once: a later search in this folder takes the same numbers."""
        path, scope = self.out / "costs.json", self.options.budget.scope
        kept = json.loads(path.read_text()) if path.is_file() else {}
        shared = [self.facts, self.task.features.facts()]
        keys = {one.name: f"{one.name}, {scope}, {digest_of([asdict(one), *shared])}" for one in candidates}
        missing = [one for one in candidates if keys[one.name] not in kept]
        if missing:
            found = CostMeter(self.task, scope).costs(missing, self.options.rounds)
            kept |= {keys[name]: cost for name, cost in found.items()}
            write_whole(path, json.dumps(kept, indent=1))
        return {name: kept[key] for name, key in keys.items()}

    def halve(self, candidates: list[Candidate], plan: list[tuple[int, int]]) -> tuple[Candidate, list[dict]]:
        """The last candidate left, and every candidate's results by round."""
        found = {one.name: {"name": one.name, "rounds": []} for one in candidates}
        left = candidates
        for number, (count, steps) in enumerate(plan, start=1):
            for one in left:
                value = self.finished(one, steps, self.options.seeds[0], self.options.held_out)["value"]
                found[one.name]["rounds"].append({"steps": steps, "value": value})
            left = sorted(left, key=lambda one: -self.task.score(found[one.name]["rounds"][-1]["value"]))
            best = found[left[0].name]["rounds"][-1]["value"]
            self.tell(f"round {number}: {count} candidates, {steps} steps; best {left[0].name}, {best:.4f}")
            left = left[: math.ceil(count / 2)]
        return left[0], list(found.values())

    def final(self, chosen: Candidate, costs: dict[str, dict]) -> list[dict]:
        """The chosen candidate and the baselines, trained on everything and measured on validation."""
        rows, samples = [], []
        others = [one for one in self.baselines if one.name != chosen.name]
        for one in [chosen, *others]:
            runs = [self.finished(one, self.options.steps, seed, 0.0, one is chosen) for seed in self.options.seeds]
            drawn = resampled_values(
                self.task, [torch.tensor(run["sums"], dtype=torch.float64) for run in runs], self.options.resamples
            )
            low, high = interval(drawn)
            samples.append(drawn)
            row = {"name": one.name, "value": mean_of(run["value"] for run in runs), "low": low, "high": high}
            row["seeds"] = [{"seed": run["seed"], "value": run["value"]} for run in runs]
            row |= {"within": self.options.budget.holds(costs[one.name]), **costs[one.name]}
            if rows:
                below, above = interval(samples[0] - drawn)
                row["difference"] = {"value": rows[0]["value"] - row["value"], "low": below, "high": above}
            rows.append(row)
            self.tell(f"{one.name}: {self.task.metric} {row['value']:.4f} on validation")
        return rows

    @property
    def model(self) -> Path:
        """Folder of the chosen model."""
        return self.out / "model"

    def finished(self, candidate: Candidate, steps: int, seed: int, held_out: float, keep: bool = False) -> dict:
        """A run, from its file if it was made with these settings.

        Args:
            held_out: share of the training images that it is measured on; 0 trains on all, and measures on validation.
            keep: save the first seed's model.
        """
        options = {name: getattr(self.options, name) for name in ("batch_size", "learning_rate", "weight_decay")}
        settings = digest_of(
            {"data": self.data, "candidate": asdict(candidate), "steps": steps, "seed": seed, "held_out": held_out}
            | {"task": self.facts, **options}
        )
        keep = keep and seed == self.options.seeds[0]
        path = self.out / "runs" / f"{settings[:20]}.json"
        self.bar.update()
        if path.is_file() and (not keep or self.is_kept(settings)):
            return json.loads(path.read_text())
        train, judged = self.task.data(candidate, held_out)
        arguments = {**options, "max_steps": steps}
        arguments["per_device_train_batch_size"] = arguments.pop("batch_size")
        model = self.task.train(candidate, train, seed, arguments)
        sums = self.task.sums(model, judged, self.options.batch_size)
        value = self.task.value(sums.sum(dim=0)).item()
        about = {"candidate": candidate.name, "steps": steps, "seed": seed, "held_out": held_out, "value": value}
        if keep:
            self.save(model, candidate, {**about, "settings": settings, "layers": candidate.layers})
        found = {**about, **({} if held_out else {"sums": sums.tolist()})}
        write_whole(path, json.dumps(found, indent=1))
        return found

    def is_kept(self, settings: str) -> bool:
        """Whether the saved model is the one with these settings."""
        path = self.model / MODEL_FILE
        return path.is_file() and json.loads(path.read_text())["settings"] == settings

    def save(self, model, candidate: Candidate, about: dict) -> None:
        """The trained model with its processor, and last of all what it is, which says that it is whole."""
        (self.model / MODEL_FILE).unlink(missing_ok=True)
        self.task.save(model, candidate, self.model)
        write_whole(self.model / MODEL_FILE, json.dumps(about, indent=1))


def round_plan(candidates: int, steps: int, first_steps: int | None = None) -> list[tuple[int, int]]:
    """(candidates, steps) of every round: half the candidates and twice the steps each time.

    A round of `steps`, as many as the final training takes, is the last.
    """
    counts = []
    while candidates > 1:
        counts.append(candidates)
        candidates = math.ceil(candidates / 2)
    first = max(FEWEST_STEPS, steps >> len(counts)) if first_steps is None else first_steps
    plan = [(count, min(steps, first << number)) for number, count in enumerate(counts)]
    return [entry for number, entry in enumerate(plan) if number == 0 or plan[number - 1][1] < steps]
