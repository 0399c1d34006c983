"""Cached features on disk: safetensors files written whole, checked when opened, and mapped."""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitweave.training.feature_keys import tensor_bytes

logger = logging.getLogger(__name__)

FORMAT = "vitweave-features-1"
KEYS = "sample_keys"  # (samples, 32), the tensor that names the samples of a shard
STALE_SECONDS = 2 * 24 * 3600  # a temporary file of another machine is given up after this
NARROWER = (torch.uint8, torch.int16, torch.int32)
_checked: dict[Path, tuple] = {}  # shards whose checksum this process has verified or written, with their file's stat


class BrokenShard(Exception):
    """A file that is no whole shard; says why."""


@dataclass
class Shard:
    """An opened shard.

    Args:
        leaves: name -> (samples, ...), mapped from the file.
        layout: `structure`, the nested dicts and lists of the items with the leaves' names at their ends, and `leaves`,
            name -> {"dtype": before storing, "order": of the axes in memory, samples first}.
        keys: the samples' keys, in order.
    """

    path: Path
    leaves: dict[str, Tensor]
    layout: dict
    keys: list[str]

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape[1:]) for name, leaf in self.leaves.items()}


def shard_name(keys: list[str]) -> str:
    """The file name of a shard: by the samples it holds, so that two processes write the same one alike."""
    return f"{hashlib.sha256(''.join(keys).encode()).hexdigest()[:32]}.safetensors"


def narrowed(leaf: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them all; others as they are."""
    if leaf.dtype not in (torch.int16, torch.int32, torch.int64) or not leaf.numel():
        return leaf
    low, high = (int(bound) for bound in leaf.aminmax())
    for dtype in NARROWER:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return leaf.to(dtype)
    return leaf


def checksum(leaves: dict[str, Tensor], layout: str) -> str:
    """SHA-256 over everything a shard says."""
    digest = hashlib.sha256(f"{FORMAT}\0{layout}\0".encode())
    for name in sorted(leaves):
        digest.update(f"{name}\0{leaves[name].dtype}\0{tuple(leaves[name].shape)}\0".encode())
        digest.update(tensor_bytes(leaves[name]))
    return digest.hexdigest()


def stat_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written anew: size, time of the last change, and inode."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def machine() -> str:
    """Eight digits for this machine and its table of process ids."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{socket.gethostname()}\0{processes}".encode()).hexdigest()[:8]


def is_running(process: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_orphans(folder: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote."""
    for path in folder.glob(".*.tmp"):
        try:
            writer, process = path.name.split(".")[-3:-1]
            ours = os.name == "posix" and writer == machine()
            if (ours and not is_running(int(process))) or time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
                logger.info(f"{path} was left by a process that is gone; removed")
        except (OSError, ValueError):
            continue  # another process was faster, or the folder is read-only


def write_shard(folder: Path, keys: list[str], leaves: dict[str, Tensor], layout: dict) -> Path:
    """Write samples to `<folder>/<name by their keys>.safetensors`, which is there as a whole or not at all.

    Args:
        leaves: name -> (samples, ...).
    """
    key_tensor = torch.frombuffer(bytearray.fromhex("".join(keys)), dtype=torch.uint8).reshape(len(keys), -1)
    leaves = {**{name: narrowed(leaf).contiguous() for name, leaf in leaves.items()}, KEYS: key_tensor}
    described = json.dumps(layout, sort_keys=True)
    path = folder / shard_name(keys)
    temporary = folder / f".{path.stem}.{uuid.uuid4().hex[:8]}.{machine()}.{os.getpid()}.tmp"
    try:
        save_file(leaves, temporary, {"format": FORMAT, "layout": described, "sha256": checksum(leaves, described)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"a shard of {sum(leaf.nbytes for leaf in leaves.values())} bytes cannot be written to {folder}: {error}; "
            "what was written before it is whole and will be used; make room or set size_limit, and build again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _checked[path] = stat_of(path)
    return path


def sync_folder(folder: Path) -> None:
    """Bring a renamed entry of a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_keys(path: Path) -> list[str]:
    """The keys of a shard's samples, unchecked; [] of a file that is no shard."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(KEYS).numpy().tobytes().hex(" ", 32).split()
    except (OSError, SafetensorError, ValueError):
        return []


def open_shard(path: Path) -> Shard:
    """Map a shard, and verify its checksum when this process sees it for the first time.

    The tensors lie in the page cache, which processes share, and stay readable if the file is deleted meanwhile.
    """
    try:
        before = stat_of(path)
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError) as error:
        raise BrokenShard(f"cannot be read ({error})") from error
    if said.get("format") != FORMAT or KEYS not in leaves:
        raise BrokenShard(f"expected the format {FORMAT!r}, got {said.get('format')!r}")
    if _checked.get(path) != before:
        if checksum(leaves, said.get("layout", "")) != said.get("sha256"):
            raise BrokenShard("its checksum differs from its content")
        _checked[path] = before
    keys = leaves.pop(KEYS).numpy().tobytes().hex(" ", 32).split()
    return Shard(path, leaves, json.loads(said["layout"]), keys)


def open_or_remove(path: Path) -> Shard | None:
    """A shard, or None where the file is gone or broken; a broken one is named in the log and removed."""
    try:
        return open_shard(path)
    except FileNotFoundError:
        return None  # evicted by another process
    except BrokenShard as problem:
        logger.warning(f"{path} is not a whole shard of features: {problem}; it is removed and its samples rebuilt")
        try:
            path.unlink(missing_ok=True)
        except OSError:
            logger.warning(f"{path} cannot be removed; it is ignored")
        return None


def mark_used(paths: list[Path]) -> None:
    """Write down that shards were used now: their access time decides what is evicted first."""
    for path in paths:
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            continue  # read-only, or evicted just now


def number_of_bytes(size: int | str | None) -> int | None:
    """20_000, "20GB" or "1.5 GiB" as a number of bytes."""
    if size is None or isinstance(size, int):
        return size
    units = {"B": 0, "KB": 1, "MB": 2, "GB": 3, "TB": 4}
    text = size.strip().upper().replace("IB", "B")
    base = 1024 if "IB" in size.upper() else 1000
    number = text.rstrip("KMGTB ")
    unit = text.removeprefix(number).strip() or "B"
    try:
        return int(float(number) * base ** units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"expected a size like 20000000, '20GB' or '1.5GiB', got {size!r}") from None


def make_room(root: Path, folder: Path, new: int, limit: int | None, keep: set[Path]) -> None:
    """See that `new` bytes fit below `limit` and on the disk, or refuse before anything is computed.

    The least recently used go first: those of other encoders, then those of `folder` that are not in `keep`.
    """
    if limit is not None:
        evict(root, folder, new, limit, keep)
    free = shutil.disk_usage(folder).free
    if free < new:
        raise OSError(f"{new} bytes of features are to be written to {folder}, where {free} are free; make room")


def evict(root: Path, folder: Path, new: int, limit: int, keep: set[Path]) -> None:
    """Remove least recently used shards until `new` bytes fit below `limit`."""
    sizes = {}
    for path in root.glob("*/*.safetensors"):
        try:
            stat = path.stat()
        except OSError:
            continue
        sizes[path] = (path.parent == folder, stat.st_atime_ns, stat.st_size)
    kept = sum(size for path, (_, _, size) in sizes.items() if path in keep)
    if kept + new > limit:
        raise ValueError(
            f"the features of this run need {kept + new} bytes, size_limit allows {limit}; raise it, store them in a "
            "smaller dtype (torch.float16), or cache fewer layers"
        )
    surplus = sum(size for _, _, size in sizes.values()) + new - limit
    for path in sorted(sizes.keys() - keep, key=sizes.get):
        if surplus <= 0:
            break
        path.unlink(missing_ok=True)
        surplus -= sizes[path][2]
        logger.info(f"{path} was the least recently used; removed to keep below {limit} bytes")
        remove_if_empty(path.parent, folder)


def remove_if_empty(folder: Path, in_use: Path) -> None:
    """Remove the folder of an encoder of which nothing is left."""
    if folder == in_use or any(folder.glob("*.safetensors")) or any(folder.glob(".*.tmp")):
        return
    try:
        (folder / "encoder.json").unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # another process writes there
