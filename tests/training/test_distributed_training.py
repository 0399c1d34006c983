"""Two processes learn what one learns from the joint batch, for every head."""

import pytest
import torch
from distributed_heads import HEADS, alone, build, run_heads
from processes import in_processes
from safetensors.torch import load_file


def assert_learns_as_one(name: str, folder):
    state, losses = alone(name)
    for rank in (0, 1):
        found = load_file(folder / f"{name}-{rank}.safetensors")
        torch.testing.assert_close(found["losses"], torch.tensor(losses), atol=1e-5, rtol=1e-5)
        for key, tensor in state.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, key=key: key + text)
    start = build(name).state_dict()
    assert any(not torch.allclose(tensor, start[key], atol=1e-3) for key, tensor in state.items())


@pytest.mark.slow
def test_two_ddp_processes_classify_as_one(tmp_path):
    in_processes(run_heads, tmp_path, "ddp", ["classification"])
    assert_learns_as_one("classification", tmp_path)


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def trained(request, tmp_path_factory):
    """The folder where two processes left every head."""
    folder = tmp_path_factory.mktemp(request.param)
    in_processes(run_heads, folder, request.param, list(HEADS))
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_two_processes_learn_what_one_learns_from_the_joint_batch(name, trained):
    kind, folder = trained
    assert_learns_as_one(name, folder)
    sharded = load_file(folder / f"{name}-0.safetensors")["sharded"]
    cut = [parameter for parameter in build(name).parameters() if parameter.ndim]
    assert sharded == (len(cut) if kind == "fsdp2" else 0)
