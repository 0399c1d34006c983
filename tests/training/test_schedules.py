"""Learning-rate schedules: where they start, whether they drop behind the warm-up, where they end."""

import pytest
import torch

from vitweave.training.schedules import polynomial_schedule


def rates(steps: int, **options) -> list[float]:
    """What an optimiser with the rate 2 sees, update by update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, seen = polynomial_schedule(optimizer, **options), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_decay_counts_from_the_first_step_or_from_the_end_of_the_warm_up():
    options = {"warmup_steps": 4, "total_steps": 8, "warmup_start": 0.2}
    assert rates(10, **options) == pytest.approx([0.4, 0.8, 1.2, 1.6, 1.0, 0.75, 0.5, 0.25, 0.25, 0.25])
    assert rates(8, decay_from="warmup", **options)[4:] == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(8, decay_from="warmup", power=2.0, **options)[5] == pytest.approx(2 * 0.75**2)


def test_no_warm_up():
    assert rates(3, warmup_steps=0, total_steps=4) == pytest.approx([2.0, 1.5, 1.0])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="'start' or 'warmup', got 'end'"):
        rates(1, warmup_steps=1, total_steps=2, decay_from="end")
    with pytest.raises(ValueError, match="below total_steps=5, got 5"):
        rates(1, warmup_steps=5, total_steps=5)
