"""What FSDP2 cannot cut is left whole, and only that."""

import pytest
import torch
from accelerate_configs import plugin_of
from distributed_heads import HEADS, build, wrapped
from processes import in_processes
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from vitweave.training.sharding import leave_numbers_whole


@pytest.mark.parametrize("name", ["classification", "retrieval"])
def test_only_numbers_are_left_out(name):
    model, plugin = build(name), plugin_of("fsdp2.yaml")
    leave_numbers_whole(model, plugin)
    left = [] if plugin.ignored_modules is None else [*plugin.ignored_modules[0].parameters()]
    assert left == [parameter for parameter in model.parameters() if parameter.ndim == 0]
    assert len(left) == (2 if name == "retrieval" else 0)  # of images, and of their tiles


def test_what_somebody_else_set_is_kept():
    plugin = plugin_of("fsdp2.yaml")
    plugin.ignored_modules = "text_model"
    leave_numbers_whole(build("retrieval"), plugin)
    assert plugin.ignored_modules == "text_model"
    leave_numbers_whole(build("retrieval"), None)


@pytest.mark.slow
def test_a_step_with_all_kinds_of_weights(tmp_path):
    in_processes(take_a_step, tmp_path)


def take_a_step(rank: int, folder: str):
    """Fused AdamW and clipping, as the Trainer has them, over shards and a number."""
    torch.manual_seed(0)
    model = wrapped(build("retrieval"), "fsdp2")
    start = model.logit_scale.item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(**HEADS["retrieval"].batch(0)).loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if isinstance(model.logit_scale, DTensor) or abs(model.logit_scale.item() - start) < 5e-3:
        raise ValueError(f"expected a number that has moved, got {model.logit_scale} from {start}")
    optimizer.zero_grad()
    (model.logit_scale * (rank + 1)).backward()
    if model.logit_scale.grad != 1.5:
        raise ValueError(f"expected 1.5, the mean of 1 and 2, as the gradient, got {model.logit_scale.grad}")
