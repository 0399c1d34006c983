"""What the stock Trainer goes on with in several processes: all of it, and in one process the same up to rounding."""

import pytest
import torch
from distributed_heads import build
from distributed_trainer import run_and_resume, trained
from processes import in_processes
from safetensors.torch import load_file


@pytest.mark.slow
def test_two_processes_resume_bit_equal_and_one_goes_on_with_their_checkpoint(tmp_path):
    in_processes(run_and_resume, tmp_path)
    whole = load_file(tmp_path / "whole-0.safetensors")
    for name in ("whole-1", "resumed-0", "resumed-1"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items()), name
    start = build("classification").state_dict()
    assert any(not torch.allclose(tensor, start[key], atol=1e-4) for key, tensor in whole.items())

    alone = trained(tmp_path / "alone", 4, tmp_path / "whole" / "checkpoint-3").state_dict()
    for key, tensor in whole.items():
        torch.testing.assert_close(alone[key], tensor, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: key + text)
