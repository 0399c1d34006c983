"""Learning-rate schedules that transformers does not have."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def polynomial_schedule(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    warmup_start: float = 1e-6,
    power: float = 1.0,
    decay_from: str = "start",
) -> LambdaLR:
    """Linear warm-up from `warmup_start` times the rate, then `(1 - progress) ** power`, one step per update.

    GeminiFusion and TokenFusion count progress from the first step (`decay_from="start"`), so that the rate drops when
    the warm-up ends: 1500 steps, 1e-6, 40000 in all, power 1; from then on it stays at that of the last step. On
    DeLiVER it counts from the end of the warm-up (`"warmup"`): 10 epochs from 0.1, 201 epochs, power 0.9. transformers'
    polynomial schedule has neither the first count nor a warm-up that starts above zero.

    For a Trainer: `Trainer(..., optimizers=(optimizer, polynomial_schedule(optimizer, ...)))`.
    """
    if decay_from not in ("start", "warmup"):
        raise ValueError(f"expected decay_from to be 'start' or 'warmup', got {decay_from!r}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"expected warmup_steps from 0 to below total_steps={total_steps}, got {warmup_steps}")
    origin = warmup_steps if decay_from == "warmup" else 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_start + (1 - warmup_start) * step / warmup_steps
        step = min(step, total_steps - 1)
        return (1 - (step - origin) / (total_steps - origin)) ** power

    return LambdaLR(optimizer, factor)
