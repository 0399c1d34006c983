"""The tensors of a released checkpoint: their shapes at once, their values file by file. Safetensors only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitweave.modeling.checkpoint_files import read_index, refuse_pickle

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Source = Mapping[str, Tensor] | str | PathLike | Sequence[str | PathLike]


class StoredTensors:
    """
    Args:
        source: tensors by name, a folder with *.safetensors, one such file, or a list of them.

    Attributes:
        shapes: by name, on the meta device; the values are not read yet.
        config: the entries of the folder's config.json, None without one.
        name: of the source, for messages.
    """

    def __init__(self, source: Source):
        self.tensors, self.files, self.config = None, [], None
        if isinstance(source, Mapping):
            self.name, self.tensors = "the tensors given", source
            self.shapes = {name: tensor.to("meta") for name, tensor in source.items()}
        else:
            self.name = str(source) if isinstance(source, str | PathLike) else f"{len(source)} files"
            self.files = self.find_files(source)
            self.shapes = self.read_headers()
        if not self.shapes:
            raise ValueError(f"expected tensors in {self.name}, got none")

    def find_files(self, source: str | PathLike | Sequence[str | PathLike]) -> list[Path]:
        """The safetensors files, in order."""
        if not isinstance(source, str | PathLike):
            files = [Path(path) for path in source]
        elif Path(source).is_dir():
            return self.files_of_folder(Path(source))
        else:
            files = [Path(source)]
        for path in files:
            if path.suffix in PICKLES:
                raise pickle_refused(path)
            if not path.is_file():
                raise FileNotFoundError(
                    f"expected a folder or a safetensors file, got {path}, which does not exist; download a"
                    " checkpoint of the Hub first (`hf download NAME --local-dir FOLDER`)"
                )
        return files

    def files_of_folder(self, folder: Path) -> list[Path]:
        """Those that the index names, or all."""
        refuse_pickle(folder, "")
        if (folder / "config.json").is_file():
            self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / INDEX).is_file():
            files = sorted({folder / name for name in read_index(folder / INDEX).values()})
            absent = [path.name for path in files if not path.is_file()]
            if absent:
                raise FileNotFoundError(f"{INDEX} in {folder} names files that are not there: {absent}")
            return files
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
            if pickles:
                raise pickle_refused(pickles[0])
            raise FileNotFoundError(f"expected *.safetensors in {folder}, found none")
        return files

    def read_headers(self) -> dict[str, Tensor]:
        """Shapes and types of all tensors; a name in two files is refused."""
        shapes, origin = {}, {}
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (a file is no dict)
                    if name in origin:
                        raise ValueError(
                            f"{name} is in both {origin[name].name} and {path.name}; give the files of one model"
                        )
                    origin[name] = path
                    piece = file.get_slice(name)
                    shapes[name] = torch.empty(piece.get_shape(), dtype=torch_dtype(name, piece), device="meta")
        return shapes

    def usual_dtype(self) -> torch.dtype:
        """The floating-point type that most values have."""
        values: dict[torch.dtype, int] = {}
        for tensor in self.shapes.values():
            if tensor.is_floating_point():
                values[tensor.dtype] = values.get(tensor.dtype, 0) + tensor.numel()
        return max(values, key=values.get) if values else torch.float32

    def value(self, name: str) -> Tensor:
        """One tensor."""
        if self.tensors is not None:
            return self.tensors[name]
        for path in self.files:
            with opened(path) as file:
                if name in file.keys():  # noqa: SIM118 (a file is no dict)
                    return file.get_tensor(name)
        raise KeyError(name)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one file after the other."""
        if self.tensors is not None:
            yield from self.tensors.items()
        for path in self.files:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (a file is no dict)
                    yield name, file.get_tensor(name)


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def torch_dtype(name: str, piece) -> torch.dtype:
    """The type of a tensor in a file; quantised ones are refused."""
    if piece.get_dtype() not in DTYPES:
        raise ValueError(f"{name} is stored as {piece.get_dtype()}; convert weights that are not quantised")
    return DTYPES[piece.get_dtype()]


def opened(path: Path):
    """A safetensors file; a damaged one is refused by name."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"expected a complete safetensors file, got a truncated or damaged one: {path} ({path.stat().st_size}"
            f" bytes): {error}. Copy or download it again (`git lfs pull` where it is a Git LFS pointer)"
        ) from error


def pickle_refused(path: Path) -> ValueError:
    """The error for weights in a pickle, which runs code when it is opened."""
    return ValueError(
        f"expected safetensors, got {path}, a pickle, which vitweave does not open. If you trust where it comes from,"
        f" save it again once: state = torch.load({path.name!r}, weights_only=True); safetensors.torch.save_file("
        f"{{name: tensor.contiguous() for name, tensor in state.items()}}, {path.with_suffix('.safetensors').name!r})."
        " If the weights are one entry of what was saved ('segmenter', 'model', 'state_dict'), read state[that entry]"
    )
