"""Which checkpoints of an interrupted run are whole, and how to get all of one back."""

import json
import logging
import shutil
import struct
import zipfile
from pathlib import Path

from transformers import PreTrainedModel, TrainerCallback

from vitweave.modeling.pretrained import VitweavePreTrainedModel

logger = logging.getLogger(__name__)

STATE_FILES = ("optimizer.pt", "scheduler.pt")
WEIGHT_FILES = ("model.safetensors", "adapter_model.safetensors")
WEIGHT_INDEX = "model.safetensors.index.json"


def checkpoint_step(folder: Path) -> int:
    """The step in the name `checkpoint-<step>`."""
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-<step>` folders of a run, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    return sorted((path for path in found if path.name[11:].isdigit()), key=checkpoint_step)


def safetensors_problem(path: Path) -> str | None:
    """Compare the size of a safetensors file with what its header announces."""
    size = path.stat().st_size
    if size < 8:
        return f"{path.name} is truncated"
    with path.open("rb") as file:
        header_size = struct.unpack("<Q", file.read(8))[0]
        if header_size > size - 8:
            return f"{path.name} is truncated"
        header = json.loads(file.read(header_size))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return None if size == 8 + header_size + max(ends, default=0) else f"{path.name} is truncated"


def weights_problem(folder: Path) -> str | None:
    """What is wrong with the weights or the adapter of a checkpoint, in one file or in shards."""
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if (folder / WEIGHT_INDEX).is_file():
        shards = json.loads((folder / WEIGHT_INDEX).read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    if not files:
        return f"no weights ({' or '.join(WEIGHT_FILES)})"
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        return f"{missing[0]} is missing"
    return next(filter(None, map(safetensors_problem, files)), None)


def archive_problem(path: Path) -> str | None:
    """Check a torch archive by its zip directory and checksums, without unpickling anything."""
    if not path.is_file():
        return f"{path.name} is missing"
    if not zipfile.is_zipfile(path):
        return f"{path.name} is truncated"
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    return f"{path.name} is damaged at {damaged}" if damaged else None


def checkpoint_problem(folder: str | Path, num_processes: int = 1) -> str | None:
    """Why the Trainer could not resume exactly from this checkpoint, or None if it is whole.

    The Trainer writes `trainer_state.json` last, so its presence says that a killed process had finished the others;
    the sizes and checksums find files that a power failure or a half-done deletion spoiled.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
        if state["global_step"] != checkpoint_step(folder):
            return f"trainer_state.json is of step {state['global_step']}"
        random_states = ["rng_state.pth"]
        if num_processes > 1:
            random_states = [f"rng_state_{rank}.pth" for rank in range(num_processes)]
        archives = [folder / name for name in (*STATE_FILES, *random_states)]
        return weights_problem(folder) or next(filter(None, map(archive_problem, archives)), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (KeyError, ValueError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        return f"cannot be read ({error})"


def set_aside(folder: Path, problem: str) -> None:
    """Rename a broken checkpoint, so that no later resume or checkpoint rotation counts it as a good one."""
    target = folder.with_name(f"incomplete-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    logger.warning(f"{folder} is not a whole checkpoint ({problem}); it is ignored and now called {target.name}")


def last_complete_checkpoint(output_dir: str | Path, num_processes: int = 1) -> str | None:
    """The newest whole checkpoint of a run, or None; broken ones are renamed to `incomplete-checkpoint-<step>`."""
    complete = None
    for folder in list_checkpoints(output_dir):
        problem = checkpoint_problem(folder, num_processes)
        if problem is None:
            complete = folder
        else:
            set_aside(folder, problem)
    return None if complete is None else str(complete)


def restore_weights(model, checkpoint: str | Path) -> None:
    """Load every weight of a checkpoint into a stock transformers model.

    transformers 5 saves many of its own models under their older tensor names, and the Trainer reads a checkpoint back
    with a non-strict `load_state_dict`, so that those weights stay as they were. vitweave models have no need of this.
    """
    if isinstance(model, PreTrainedModel) and not isinstance(model, VitweavePreTrainedModel):
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict())


class RestoreWeights(TrainerCallback):
    """Restores a stock model once the Trainer has loaded what it could of the checkpoint a run goes on from."""

    def __init__(self, checkpoint: str | None):
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.checkpoint is not None:
            restore_weights(model, self.checkpoint)
