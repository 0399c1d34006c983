"""Damaged and hostile safetensors, written over a saved model: one function per trick."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weights."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(folder: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def change_first(folder: Path, **changes) -> None:
    header, data = read(folder)
    name = next(name for name in header if name != "__metadata__")
    header[name] |= changes
    write(folder, header, data)


def cut(kept: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[: int(len(raw) * kept)])

    return damage


def lying_length(length: int) -> Callable[[Path], None]:
    return lambda folder: write(folder, *read(folder), length=length)


def offsets(first: int, last: int) -> Callable[[Path], None]:
    return lambda folder: change_first(folder, data_offsets=[first, last])


def dtype(name: object) -> Callable[[Path], None]:
    return lambda folder: change_first(folder, dtype=name)


def shape(sizes: object) -> Callable[[Path], None]:
    return lambda folder: change_first(folder, shape=sizes)


def overlapping(folder: Path) -> None:
    header, data = read(folder)
    names = [name for name in header if name != "__metadata__"]
    for name in names[1:]:
        header[name] = header[names[0]]
    write(folder, header, data)


def duplicate_keys(folder: Path) -> None:
    header, data = read(folder)
    entry = json.dumps(header).encode()[1:-1]
    write(folder, b"{" + entry + b"," + entry + b"}", data)


def huge_header(folder: Path) -> None:
    _, data = read(folder)
    write(folder, b'{"a":"' + b"x" * 120_000_000 + b'"}', data)


def nested_header(folder: Path) -> None:
    _, data = read(folder)
    write(folder, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data)


def listed_header(folder: Path) -> None:
    write(folder, b"[]", b"")


def other_names(folder: Path) -> None:
    header, data = read(folder)
    write(folder, {name if name == "__metadata__" else f"evil.{name}": entry for name, entry in header.items()}, data)


def nothing_inside(folder: Path) -> None:
    write(folder, {"__metadata__": {"format": "pt"}}, b"")


def many_tensors(folder: Path) -> None:
    header, data = read(folder)
    header |= {f"extra.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
    write(folder, header, data)


def other_format(folder: Path) -> None:
    header, data = read(folder)
    write(folder, header | {"__metadata__": {"format": "evil"}}, data)


def no_file(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<html>404</html>" * 100)


def index(entries: object) -> Callable[[Path], None]:
    """An index in place of the file, which moves to another name inside the folder."""

    def damage(folder: Path) -> None:
        header, _ = read(folder)
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        names = [name for name in header if name != "__metadata__"]
        found = entries(folder, names) if callable(entries) else entries
        (folder / INDEX).write_text(found if isinstance(found, str) else json.dumps(found))

    return damage


def outside(folder: Path, names: list[str]) -> dict:
    """The shards lie beside the folder."""
    (folder / "model-00001-of-00001.safetensors").rename(folder.parent / "stolen.safetensors")
    return {"metadata": {}, "weight_map": dict.fromkeys(names, "../stolen.safetensors")}


def absolute(folder: Path, names: list[str]) -> dict:
    (folder / "model-00001-of-00001.safetensors").rename(folder.parent / "stolen.safetensors")
    return {"metadata": {}, "weight_map": dict.fromkeys(names, str(folder.parent / "stolen.safetensors"))}


def pickled(folder: Path, names: list[str]) -> dict:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}


def linked(folder: Path) -> None:
    """A link out of the folder is the user's own doing (the Hub's cache is made of them): it is followed."""
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


REFUSED = {
    **{f"cut to {kept}": cut(kept) for kept in (0.0, 0.0001, 0.01, 0.2, 0.5, 0.999)},
    **{f"header length {n}": lying_length(n) for n in (0, 1, 2, 10**6, 2**31, 2**63, 2**64 - 1)},
    **{
        f"offsets {a}:{b}": offsets(a, b)
        for a, b in ((0, 10**15), (10**15, 10**15 + 4), (4, 0), (0, 4), (2**63, 2**64 - 1))
    },
    **{f"dtype {name!r}": dtype(name) for name in ("I64", "F64", "BOOL", "F7", "", "F8_E4M3", 5, "C64")},
    **{f"shape {sizes!r}": shape(sizes) for sizes in ([], [-1], [2**62, 4], [0], "x", [1] * 1000)},
    "overlapping": overlapping,
    "duplicate keys": duplicate_keys,
    "huge header": huge_header,
    "nested header": nested_header,
    "header is a list": listed_header,
    "other names": other_names,
    "nothing inside": nothing_inside,
    "a web page": no_file,
    "index of nothing": index({}),
    "index without metadata": index(lambda folder, names: {"weight_map": {"x": "missing.safetensors"}}),
    "index is a list": index([]),
    "index is no JSON": index("{"),
    "index is nested": index("[" * 100_000),
    "weight_map is a list": index({"metadata": {}, "weight_map": ["a"]}),
    "weight_map of numbers": index(lambda folder, names: {"metadata": {}, "weight_map": dict.fromkeys(names, 5)}),
    "missing shard": index(
        lambda folder, names: {"metadata": {}, "weight_map": dict.fromkeys(names, "no.safetensors")}
    ),
    "shard outside": index(outside),
    "shard at an absolute path": index(absolute),
    "shard is a pickle": index(pickled),
}
ACCEPTED = {
    "unknown format": other_format,
    "whole numbers": dtype("I32"),
    "many tensors": many_tensors,
    "linked": linked,
}
