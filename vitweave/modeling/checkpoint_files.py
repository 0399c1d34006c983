"""The files of a checkpoint: replaced as a whole, and refused with a reason when they cannot be read."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

# model.safetensors, model-00001-of-00002.safetensors, model.safetensors.index.json, each perhaps with a .variant
WEIGHTS_FILE = re.compile(r"model(?P<a>\.\w+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(?P<b>\.\w+)?\.json)?")
# What get_config_dict needs to find the same config.json as from_pretrained
HUB_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


@contextmanager
def replace_when_done(folder: Path) -> Iterator[Path]:
    """A folder to write into; when the block ends without an error its files replace those in `folder`.

    A save that fails half-way (a full disk, an interrupt) leaves the earlier checkpoint as it was. Weights move before
    the config, and weight files of an earlier save that this one did not write again are removed: transformers would
    load an old `model.safetensors` in preference to new shards.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield staging
        written = sorted(
            (path.relative_to(staging) for path in staging.rglob("*") if path.is_file()),
            key=lambda name: (not WEIGHTS_FILE.fullmatch(name.name), name.suffix == ".json", name),
        )
        outdated = outdated_weights(folder, {name.name for name in written})
        for name in written:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
        for path in outdated:
            path.unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(staging, ignore_errors=True)


def outdated_weights(folder: Path, written: set[str]) -> list[Path]:
    """Weight files in `folder` of the variants in `written` that are not written again."""
    variants = {variant_of(name) for name in written} - {None}
    return [path for path in folder.iterdir() if path.name not in written and variant_of(path.name) in variants]


def variant_of(file_name: str) -> str | None:
    """ "" for model.safetensors and its shards, ".fp16" for model.fp16.safetensors, None for any other file."""
    match = WEIGHTS_FILE.fullmatch(file_name)
    return match and (match["a"] or match["b"] or "")


def refuse_pickle(source: str | os.PathLike, subfolder: str):
    """Refuse a local folder whose only weights are pickles, which run code when they are opened."""
    folder = Path(source, subfolder)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for pattern in ("pytorch_model*.bin", "adapter_model*.bin") for path in folder.glob(pattern)
    )
    if pickles:
        raise ValueError(
            f"expected model.safetensors in {folder}, got {pickles[0]}, a pickle, which vitweave does not open. If you"
            f" trust where it comes from, convert it once: safetensors.torch.save_file(torch.load({pickles[0]!r},"
            " weights_only=True), 'model.safetensors', metadata={'format': 'pt'})"
        )


def check_indices(source: str | os.PathLike, subfolder: str) -> None:
    """Refuse a local folder whose index of shards is damaged, or names files outside of it or of another kind."""
    for path in sorted(Path(source, subfolder).glob("*.safetensors.index*.json")):
        read_index(path, ("metadata", "weight_map"))


def read_index(path: Path, needed: tuple[str, ...] = ("weight_map",)) -> dict[str, str]:
    """Tensor name -> shard of a `model.safetensors.index.json`, all of them safetensors beside it.

    Args:
        needed: the entries it must have; transformers wants both, releases may go without metadata.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got a damaged file ({error}); copy or download it again") from None
    shards = entries.get("weight_map") if isinstance(entries, dict) else None
    if not shards or not all(isinstance(entries.get(name), dict) for name in needed):
        raise ValueError(
            f'expected {{"metadata": {{...}}, "weight_map": {{tensor: file}}}} in {path}, got something else; save the'
            " model again"
        )
    for shard in set(map(str, shards.values())):
        if not re.fullmatch(r"[^/\\\x00]+\.safetensors", shard):
            raise ValueError(
                f"expected {path} to name safetensors beside it, got {shard!r:.200}: weights are neither read from"
                " other folders nor from pickles. Move the files together and name them there"
            )
    return shards


def check_shards(files: Collection[str] | None) -> None:
    """Refuse to open weights in another format than safetensors."""
    others = [str(path) for path in files or () if not str(path).endswith(".safetensors")]
    if others:
        raise ValueError(f"expected safetensors, got {others[0]}; vitweave opens no other weights")


def unreadable_weights(source: str | os.PathLike, subfolder: str, reason: SafetensorError) -> ValueError:
    """The error for weights that safetensors could not parse, with the file at fault where it is a local one."""
    at_fault = str(source)
    for path in sorted(Path(source, subfolder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            at_fault = f"{path} ({path.stat().st_size} bytes)"
            break
    return ValueError(
        f"expected complete safetensors weights, got a truncated or damaged file: {at_fault}: {reason}. Copy or"
        " download it again (force_download=True for a Hub id; `git lfs pull` where the file is a Git LFS pointer), or"
        " use another checkpoint."
    )


def stored_model_type(source: str | os.PathLike, options: dict) -> tuple[bool, str | None]:
    """Whether `source` has a config.json, and its model_type."""
    try:
        stored, _ = PreTrainedConfig.get_config_dict(source, **{k: options[k] for k in HUB_OPTIONS if k in options})
    except OSError:  # none there: from_pretrained says so, or it is the folder of an adapter
        return False, None
    except RecursionError:
        raise ValueError(f"expected a config.json in {source}, got one nested too deep to be read") from None
    if not isinstance(stored, dict):
        raise ValueError(f"expected a mapping of options in the config.json of {source}, got {stored!r:.100}")
    return True, stored.get("model_type")
