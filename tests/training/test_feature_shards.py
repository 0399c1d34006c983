"""Shards on disk: whole or not there, every flipped byte noticed, the least recently used evicted first."""

import errno
import logging
import os
import random
import time

import pytest
import torch

from vitweave.training import feature_shards
from vitweave.training.feature_shards import (
    BrokenShard,
    machine,
    make_room,
    mark_used,
    number_of_bytes,
    open_or_remove,
    open_shard,
    remove_orphans,
    shard_name,
    write_shard,
)

LAYOUT = {"structure": {"x": "x", "labels": "labels"}, "leaves": {}}
KEYS = [digit * 64 for digit in "0123"]


@pytest.fixture(autouse=True)
def nothing_checked(monkeypatch):
    """As in a process that has just started."""
    monkeypatch.setattr(feature_shards, "_checked", {})


def written(folder, keys=KEYS):
    folder.mkdir(exist_ok=True)
    leaves = {"x": torch.randn(len(keys), 3, 5), "labels": torch.arange(len(keys))}
    return write_shard(folder, keys, leaves, LAYOUT), leaves


def test_what_is_written_is_read_back(tmp_path):
    path, leaves = written(tmp_path)
    assert path.name == shard_name(KEYS) and [entry.name for entry in tmp_path.iterdir()] == [path.name]
    feature_shards._checked.clear()
    shard = open_shard(path)
    assert shard.keys == KEYS and shard.layout == LAYOUT
    assert torch.equal(shard.leaves["x"], leaves["x"])
    assert shard.leaves["labels"].dtype == torch.uint8 and shard.leaves["labels"].tolist() == [0, 1, 2, 3]
    wide = write_shard(tmp_path, KEYS[:2], {"labels": torch.tensor([-1, 2**40])}, LAYOUT)
    assert open_shard(wide).leaves["labels"].tolist() == [-1, 2**40]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path, caplog):
    path, _ = written(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    places = sorted(rng.sample(range(len(whole)), 120))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(BrokenShard):
            open_shard(path)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenShard, match="cannot be read"):
            open_shard(path)
    path.write_bytes(whole + b"\0")
    assert open_or_remove(path) is None and not path.exists()
    assert path.name in caplog.text and "removed" in caplog.text
    assert open_or_remove(path) is None  # evicted meanwhile: no error


def test_a_foreign_file_is_named_and_removed(tmp_path, caplog):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert open_or_remove(tmp_path / "model.safetensors") is None
    assert "model.safetensors" in caplog.text and "vitweave-features" in caplog.text
    assert not (tmp_path / "model.safetensors").exists()


def test_a_checked_shard_is_not_hashed_again_until_it_changes(tmp_path, monkeypatch):
    path, _ = written(tmp_path)
    monkeypatch.setattr(feature_shards, "checksum", lambda *args: "nothing")
    open_shard(path)  # written by this process
    mark_used([path])
    open_shard(path)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))
    with pytest.raises(BrokenShard, match="checksum"):
        open_shard(path)


def test_a_failed_write_leaves_nothing_and_says_what_helps(tmp_path, monkeypatch):
    before, _ = written(tmp_path)

    def full(leaves, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_shards, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written to .*No space left.*make room"):
        written(tmp_path, KEYS[:1])
    assert [entry.name for entry in tmp_path.iterdir()] == [before.name] and open_shard(before)


def test_temporary_files_of_the_dead_are_removed(tmp_path):
    process = os.fork()
    if process == 0:
        os._exit(0)
    os.waitpid(process, 0)
    dead = tmp_path / f".abc.12345678.{machine()}.{process}.tmp"
    alive = tmp_path / f".abc.12345678.{machine()}.{os.getppid()}.tmp"
    elsewhere = tmp_path / f".abc.12345678.ffffffff.{process}.tmp"
    old = tmp_path / ".abc.12345678.ffffffff.1.tmp"
    for path in (dead, alive, elsewhere, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    remove_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, elsewhere])


def used(path, seconds_ago):
    os.utime(path, ns=(time.time_ns() - seconds_ago * 10**9, path.stat().st_mtime_ns))


def test_the_least_recently_used_of_other_encoders_go_first(tmp_path, caplog):
    ours, other, third = tmp_path / "ours", tmp_path / "other", tmp_path / "third"
    kept, idle = written(ours)[0], written(ours, KEYS[:3])[0]
    old, recent, single = written(other)[0], written(other, KEYS[:2])[0], written(third, KEYS[:1])[0]
    (third / "encoder.json").write_text("{}")
    for path, seconds in ((kept, 900), (idle, 800), (old, 500), (single, 400), (recent, 300)):
        used(path, seconds)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    caplog.set_level(logging.INFO)
    make_room(tmp_path, ours, 100, total + 100, {kept})
    assert all(path.exists() for path in (kept, idle, old, recent, single))
    make_room(tmp_path, ours, 101, total + 100, {kept})
    assert not old.exists() and recent.exists() and single.exists() and old.name in caplog.text
    mark_used([single])
    make_room(tmp_path, ours, 1, kept.stat().st_size + idle.stat().st_size + single.stat().st_size + 1, {kept})
    assert not recent.exists() and not other.exists() and single.exists()
    make_room(tmp_path, ours, 100, kept.stat().st_size + 100, {kept})
    assert list(tmp_path.rglob("*")) == [ours, kept]
    with pytest.raises(ValueError, match=rf"need {kept.stat().st_size + 101} bytes.*float16"):
        make_room(tmp_path, ours, 101, kept.stat().st_size + 100, {kept})
    assert kept.exists()


def test_a_full_disk_is_noticed_before_the_build(tmp_path):
    with pytest.raises(OSError, match=r"9999999999999999 bytes .* are free; make room"):
        make_room(tmp_path, tmp_path, 9999999999999999, None, set())


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, None), (7, 7), ("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("10 mb", 10**7), ("8", 8)],
)
def test_sizes(size, expected):
    assert number_of_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "many", "3 furlongs", "GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="expected a size like"):
        number_of_bytes(size)
