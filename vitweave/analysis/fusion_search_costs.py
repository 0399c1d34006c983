"""What the candidates of a search cost: counted, and measured in turn on this machine; and who is within a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitweave.analysis.encoder_fusion_comparison import to_device
from vitweave.analysis.fusion_candidates import Candidate
from vitweave.analysis.fusion_comparison import seconds_of
from vitweave.analysis.fusion_search_tasks import SearchTask
from vitweave.analysis.peak_memory import peak_bytes

SCOPES = ("after", "whole")
UNITS = {"ms": "milliseconds", "mib": "mebibytes"}  # of a budget -> of a cost


@dataclass(frozen=True)
class Budget:
    """What a candidate may cost per image; None is no limit.

    Args:
        ms: milliseconds of an image, the fastest of several rounds in which all candidates take turns, so that whatever
            else the machine does hits them alike.
        mib: mebibytes: weights, the features that are read, and the most that lives at once while one image runs.
        scope: "after" counts what comes after the frozen encoders, "whole" the encoders too.
    """

    ms: float | None = None
    mib: float | None = None
    scope: str = "after"

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"expected the scope of a budget to be one of {list(SCOPES)}, got {self.scope!r}")
        wrong = {unit: limit for unit, limit in self.limits.items() if not limit > 0}
        if wrong:
            raise ValueError(f"expected a budget above zero, got {wrong}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by unit."""
        return {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}

    def holds(self, cost: dict) -> bool:
        """Whether a cost is within every limit."""
        return all(cost[UNITS[unit]] <= limit for unit, limit in self.limits.items())


def affordable(candidates: Sequence[Candidate], costs: dict[str, dict], budget: Budget) -> list[Candidate]:
    """The candidates within the budget; a budget that none keeps is refused."""
    found = [candidate for candidate in candidates if budget.holds(costs[candidate.name])]
    if found or not candidates:
        return found
    cheapest = []
    for unit, limit in budget.limits.items():
        name = min((candidate.name for candidate in candidates), key=lambda name: costs[name][UNITS[unit]])
        cheapest.append(f"{costs[name][UNITS[unit]]:.4g} {unit} ({name}, allowed {limit:g})")
    raise ValueError(
        f"expected a budget that at least one of {len(candidates)} candidates keeps; the cheapest costs"
        f" {' and '.join(cheapest)} per image, {budget.scope!r}; raise the budget, or try smaller fusions"
    )


class CostMeter:
    """Calls of every candidate on the same validation image, on its features or on its pixels.

    One image, because its time is what a user waits for, and because the shorter a call, the likelier it is to run
    without a break on a machine that does other things.
    """

    def __init__(self, task: SearchTask, scope: str):
        self.task, self.scope = task, scope
        self.samples: dict[int | None, tuple[dict, torch.Tensor]] = {}

    def inputs(self, candidate: Candidate, model: nn.Module) -> dict:
        """What the candidate's model is called with."""
        features, key = self.task.features, None if candidate.is_tower else candidate.encoders[0]
        if key not in self.samples:
            self.samples[key] = features.sample(key, 1)
        kept, pixel_values = self.samples[key]
        if self.scope == "whole":
            return {"pixel_values": pixel_values.to(model.device)}
        read = {name: kept[name] for name in features.names_read(candidate) if name in kept}
        return {"encoder_outputs": to_device(features.chooser(candidate)(read), model.device)}

    def counted(self, model: nn.Module, inputs: dict) -> dict:
        """Parameters, FLOPs and bytes of one image."""
        encoders = {id(weight) for encoder in self.task.features.encoders for weight in encoder.parameters()}
        weights = [*model.parameters(), *model.buffers()]
        own = [weight for weight in weights if self.scope == "whole" or id(weight) not in encoders]
        read = sum(part.numel() * part.element_size() for part in tensors_of(inputs))
        with torch.no_grad():
            peak = peak_bytes(lambda: model(**inputs), [*weights, *tensors_of(inputs)])
        # the fused kernels of a CPU are not counted; without gradients torch's counter fails on views of parameters
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**inputs)
        held = sum(weight.numel() * weight.element_size() for weight in own)
        return {
            "parameters": sum(weight.numel() for weight in own if isinstance(weight, nn.Parameter)),
            "gigaflops": counter.get_total_flops() / 1e9,
            "mebibytes": (held + read + peak) / 2**20,
        }

    def costs(self, candidates: Sequence[Candidate], rounds: int) -> dict[str, dict]:
        """Every candidate's cost per image, by name."""
        calls: dict[str, Callable] = {}
        found: dict[str, dict] = {}
        device = self.task.features.device
        for candidate in candidates:
            model = self.task.cost_model(candidate).to(device).eval()
            inputs = self.inputs(candidate, model)
            found[candidate.name] = self.counted(model, inputs)
            calls[candidate.name] = lambda model=model, inputs=inputs: model(**inputs)
        seconds = {name: float("inf") for name in calls}
        with torch.no_grad():
            for _ in range(rounds):
                for name, call in calls.items():
                    seconds[name] = min(seconds[name], seconds_of(call, device))
        return {name: {**cost, "milliseconds": 1000 * seconds[name]} for name, cost in found.items()}


def tensors_of(value) -> list[torch.Tensor]:
    """The tensors in nested dicts and tuples."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in tensors_of(part)]
