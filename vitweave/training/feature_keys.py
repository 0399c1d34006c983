"""Content addresses of cached features: everything that could change a feature goes into a SHA-256."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vitweave.training.parameter_groups import find_encoder

CODE = tuple(Path(__file__).parents[1] / part for part in ("configuration", "modeling", "processing"))
DISTRIBUTIONS = ("torch", "transformers", "numpy", "pillow", "torchvision", "timm", "datasets")
# where a model was loaded from and what it was called change no feature; transformers' version is an entry of its own,
# and the type of the weights, which saving writes into a config, is told by the weights
NO_FACTS = (
    *("_name_or_path", "name_or_path", "architectures", "transformers_version", "training", "warnings_issued"),
    *("dtype", "torch_dtype"),
)
MOST_ENTRIES = 64  # longer lists are data, which the sample keys cover, not options
UNVERSIONED = ("torch", "builtins")  # foreign classes whose files need not be read: their version says it


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor in row-major order, (bytes,); no copy where it lies so in memory already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def add_to_digest(digest, value) -> None:
    """Feed a value into a hash, every part with its kind and length, so that no two values feed the same bytes.

    Args:
        value: a `Path` (the file's bytes count, not its name), a picture, an array, a tensor, bytes, a plain value, or
            dicts and sequences of them.
    """
    if isinstance(value, Path):
        kind, parts = "file" + value.suffix.lower(), [value.read_bytes()]
    elif isinstance(value, PIL.Image.Image):
        palette = (value.palette.mode, value.getpalette(value.palette.mode)) if value.palette else None
        facts = [value.size, palette, value.info.get("transparency"), value.info.get("exif")]
        kind, parts = f"picture {value.mode}", [repr(facts).encode(), value.tobytes()]
    elif isinstance(value, Tensor):
        kind, parts = f"tensor {value.dtype} {tuple(value.shape)}", [tensor_bytes(value)]
    elif isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            raise ValueError(f"expected numbers, got an array of {array.dtype}; a feature cache cannot tell it apart")
        kind, parts = f"array {array.dtype.str} {np.shape(value)}", [array.reshape(-1).view(np.uint8)]
    elif isinstance(value, (bytes, bytearray)):
        kind, parts = "bytes", [value]
    elif value is None or isinstance(value, (bool, int, float, str)):
        kind, parts = type(value).__name__, [repr(value).encode()]
    elif isinstance(value, dict):
        kind, parts = f"dict {len(value)}", []
        items = [entry for name in sorted(value, key=str) for entry in (name, value[name])]
    elif isinstance(value, (list, tuple)):
        kind, parts, items = f"sequence {len(value)}", [], value
    else:
        raise ValueError(f"expected pictures, arrays, tensors, paths or plain values, got {type(value).__name__}")
    digest.update(f"{kind}\0{[len(part) for part in parts]}\0".encode())
    for part in parts:
        digest.update(part)
    for item in items if isinstance(value, (dict, list, tuple)) else ():
        add_to_digest(digest, item)


def digest_of(value) -> str:
    """SHA-256 of a value as `add_to_digest` reads it, in hexadecimal digits."""
    digest = hashlib.sha256()
    add_to_digest(digest, value)
    return digest.hexdigest()


def plain(value) -> bool:
    """Whether a value is an option: a number, a word, a dtype, or few of them in dicts and sequences."""
    if isinstance(value, (list, tuple, dict)):
        entries = [*value, *value.values()] if isinstance(value, dict) else value
        return len(entries) <= MOST_ENTRIES and all(map(plain, entries))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def facts(thing) -> dict[str, str]:
    """The options an object carries as public attributes, with the name of its class; paths on disk are no options."""
    found = {
        name: value for name, value in getattr(thing, "__dict__", {}).items() if name[0] != "_" and name not in NO_FACTS
    }
    found = {name: repr(value) for name, value in found.items() if plain(value) and not is_location(value)}
    return {"": f"{type(thing).__module__}.{type(thing).__qualname__}", **found}


def is_location(value) -> bool:
    """Whether a word is the path of something on this disk."""
    return isinstance(value, str) and os.sep in value and os.path.exists(value)


def settled(config: dict) -> dict:
    """A config's dict without what changes no feature, sub-configs included."""
    return {
        name: settled(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in NO_FACTS
    }


def code_files(folders: Iterable[Path] = CODE) -> dict[str, Path]:
    """Every Python file of some packages by its place in them."""
    return {f"{folder.name}/{path.relative_to(folder)}": path for folder in folders for path in folder.rglob("*.py")}


def class_files(classes: Iterable[type]) -> dict[str, Path]:
    """The files that define these classes and their bases, as far as no package version vouches for them."""
    files = {}
    for cls in {base for named in classes for base in named.__mro__}:
        top = cls.__module__.split(".")[0]
        if top in UNVERSIONED or (top in sys.stdlib_module_names and top != "__main__"):
            continue
        path = Path(getattr(sys.modules.get(cls.__module__), "__file__", None) or "")
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(
                f"expected a source file of {cls.__qualname__}, so that a change of its code makes old features void, "
                "and found none; define the class in a .py file"
            )
        files[cls.__module__] = path
    return files


def versions(distributions: Iterable[str] = DISTRIBUTIONS) -> dict[str, str]:
    """Installed versions of what computes the features; packages that are absent are left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}


def arithmetic(device: torch.device) -> dict[str, str]:
    """How the device multiplies: precision switches and autocast change the bits of a feature."""
    found = {"device": device.type, "float32_matmul": torch.get_float32_matmul_precision()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "tf32": str(torch.backends.cudnn.allow_tf32)}
    if torch.is_autocast_enabled(device.type):
        found["autocast"] = str(torch.get_autocast_dtype(device.type))
    return found


def encoder_ingredients(model: nn.Module, processor=None, dtype: torch.dtype | None = None) -> dict:
    """What a feature depends on besides its image, by name; `digest_of` reads every value.

    Args:
        model: has `encode`, and `encode_options` (a dict) if `encode` reads more than its encoder.
        processor: of the dataset, if it has one.
        dtype: in which the features are stored; None = as computed.
    """
    encoder = find_encoder(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = dict(encoder.named_modules())
    pretrained = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
    configs = [module.config for module in (encoder, *pretrained.values()) if hasattr(module, "config")]
    tensors = {
        **dict(encoder.named_parameters(remove_duplicate=False)),
        **dict(encoder.named_buffers(remove_duplicate=False)),
    }
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    classes = [type(base), *map(type, modules.values()), *([] if processor is None else [type(processor)])]
    described = {} if processor is None else settled(processor.to_dict()) if hasattr(processor, "to_dict") else None
    return {
        "weights": tensors,
        "modules": {name: facts(module) for name, module in modules.items()},
        "config": json.dumps([settled(one.to_dict()) for one in configs], sort_keys=True, default=str),
        "layers": repr([getattr(encoder, name, None) for name in ("layers", "out_indices", "out_features")]),
        "options": {**facts(base), "encode": repr(sorted(getattr(base, "encode_options", {}).items()))},
        "attention": {name: str(module.config._attn_implementation) for name, module in pretrained.items()},
        "code": {**code_files(), **class_files(classes)},
        "versions": versions(),
        "arithmetic": arithmetic(device),
        "processor": json.dumps(facts(processor) if described is None else described, sort_keys=True, default=str),
        "processor_class": "" if processor is None else type(processor).__qualname__,
        "dtype": str(dtype),
    }


def digests_of(ingredients: dict) -> dict[str, str]:
    """One SHA-256 per ingredient, by which two caches can be compared."""
    return {name: digest_of(value) for name, value in ingredients.items()}


def undecoded(samples):
    """A `datasets.Dataset` that gives its pictures as the bytes of their files; anything else as it is."""
    if not hasattr(samples, "cast_column") or not getattr(samples, "features", None):
        return samples
    from datasets import Image  # the samples are of this package, so it is installed

    for name, feature in samples.features.items():
        if isinstance(feature, Image):
            samples = samples.cast_column(name, Image(decode=False))
    return samples


def is_transformed(samples) -> bool:
    """Whether a `datasets.Dataset` changes its rows on the way out."""
    return hasattr(samples, "cast_column") and samples.format["type"] is not None


class SampleKeys(torch.utils.data.Dataset):
    """The key of every sample of a dataset, without decoding a picture where its source can be had otherwise.

    A dataset of ours tells its `samples` and its `processor`. Samples with a method `sources(index)` say what a sample
    is made from, files as `Path`; those of `datasets` give the bytes of their pictures. Of any other dataset the
    finished item is hashed, `pixel_values` and all.
    """

    def __init__(self, dataset, encoder_key: str):
        self.dataset = dataset
        samples = getattr(dataset, "samples", None)
        self.from_items = samples is None or not hasattr(dataset, "processor") or is_transformed(samples)
        self.samples = dataset if self.from_items else undecoded(samples)
        parts = [dataset] if self.from_items else [dataset, samples]
        code = class_files(map(type, parts))
        self.prefix = [encoder_key, *({} if self.from_items else facts(part) for part in parts), code]
        self.prefix = digest_of(self.prefix)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        if not self.from_items and hasattr(self.samples, "sources"):
            return digest_of([self.prefix, self.samples.sources(index)])
        sample = {name: self.source(value) for name, value in self.samples[index].items()}
        return digest_of([self.prefix, sample])

    def source(self, value):
        """Of a picture as `datasets` stores it, its bytes or its file."""
        if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
            return Path(value["path"]) if value["bytes"] is None else value["bytes"]
        return value
