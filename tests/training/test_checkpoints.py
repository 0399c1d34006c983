"""Half-written checkpoints are found, whatever the moment the process was killed."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from vitweave.training.checkpoints import checkpoint_problem, last_complete_checkpoint


def write_checkpoint(folder, step, sharded=False):
    """The files of a Trainer checkpoint, in the order in which the Trainer writes them."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    weights = {"weight": torch.randn(8, 8), "bias": torch.zeros(8)}
    if sharded:
        for name, tensor in weights.items():
            save_file({name: tensor}, path / f"{name}.safetensors")
        index = {"weight_map": {name: f"{name}.safetensors" for name in weights}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"values": torch.arange(100)}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_missing_and_truncated_files_are_found(tmp_path, name, damage):
    checkpoint = write_checkpoint(tmp_path, 5)
    assert checkpoint_problem(checkpoint) is None
    damage(checkpoint / name)
    assert checkpoint_problem(checkpoint) is not None


def test_a_flipped_byte_in_the_optimiser_state_is_found(tmp_path):
    path = write_checkpoint(tmp_path, 5) / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "damaged" in checkpoint_problem(path.parent)


def test_a_missing_shard_is_found(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 5, sharded=True)
    assert checkpoint_problem(checkpoint) is None
    (checkpoint / "bias.safetensors").unlink()
    assert checkpoint_problem(checkpoint) == "bias.safetensors is missing"


def test_every_process_must_have_left_its_random_state(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 5)
    for rank in range(2):
        assert checkpoint_problem(checkpoint, num_processes=2) == f"rng_state_{rank}.pth is missing"
        torch.save({"values": torch.arange(3)}, checkpoint / f"rng_state_{rank}.pth")
    assert checkpoint_problem(checkpoint, num_processes=2) is None


def test_the_last_whole_checkpoint_is_chosen_and_broken_ones_are_set_aside(tmp_path, caplog):
    for step in (5, 10, 20, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()  # killed before the end
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()  # killed while being deleted
    (tmp_path / "checkpoint-of-mine").mkdir()
    with caplog.at_level(logging.WARNING, logger="vitweave.training.checkpoints"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert "trainer_state.json is missing" in caplog.text and "optimizer.pt is missing" in caplog.text
    names = sorted(path.name for path in tmp_path.iterdir())
    kept = ["checkpoint-10", "checkpoint-20", "checkpoint-of-mine"]
    assert names == sorted([*kept, "incomplete-checkpoint-100", "incomplete-checkpoint-5"])
    write_checkpoint(tmp_path, 100)
    cut(tmp_path / "checkpoint-100" / "model.safetensors")  # the same step is broken once more
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_no_checkpoint_means_a_start_from_the_beginning(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
