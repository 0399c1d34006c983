"""SHA-256 of every file of a published model, as `sha256sum --check SHA256SUMS` reads them."""

import hashlib
import os
import re
from pathlib import Path

SUMS_FILE = "SHA256SUMS"
UNLISTED = (SUMS_FILE, "README.md")  # the README quotes the sums, and is edited on the Hub
GUARDED = (".py", ".safetensors", ".json")  # no such file may lie beside the listed ones


def sha256(path: Path) -> str:
    """Of a file, or of a folder: of the sums and names of the files in it, those of linked folders too."""
    if path.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"expected files in {path}, found none")
        return sha256_of_sums({file.relative_to(path).as_posix(): sha256(file) for file in files})
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def sha256_of_sums(sums: dict[str, str]) -> str:
    """One number for several files: of their lines in `SHA256SUMS`."""
    return hashlib.sha256(sums_text(sums).encode()).hexdigest()


def sums_text(sums: dict[str, str]) -> str:
    """The lines of `SHA256SUMS`, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def write_sums(folder: Path) -> dict[str, str]:
    """Write `SHA256SUMS` for the files of a flat folder; name -> sum."""
    sums = {path.name: sha256(path) for path in folder.iterdir() if path.is_file() and path.name not in UNLISTED}
    (folder / SUMS_FILE).write_text(sums_text(sums), encoding="utf-8")
    return sums


def read_sums(folder: Path) -> dict[str, str]:
    """name -> sum, from `SHA256SUMS`; a name that leaves the folder is refused."""
    path = folder / SUMS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"expected {SUMS_FILE} in {folder}, found none; `vitweave export` writes it")
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/\\\x00]+)", line)
        if not match or match[2] in (".", ".."):
            raise ValueError(
                f"expected lines of 64 hexadecimal digits, two blanks and a file in {path}, got {line!r:.100}"
            )
        sums[match[2]] = match[1]
    return sums


def check_sums(folder: Path) -> dict[str, str]:
    """Refuse a folder whose files are not those that were published; name -> sum otherwise."""
    sums = read_sums(folder)
    missing = sorted(name for name in sums if not (folder / name).is_file())
    changed = sorted(name for name in sums if name not in missing and sha256(folder / name) != sums[name])
    present = {path.name for path in folder.iterdir() if path.suffix in GUARDED}
    added = sorted(present - sums.keys())
    if missing or changed or added:
        raise ValueError(
            f"expected the files of {SUMS_FILE} in {folder}, got changed {changed}, missing {missing}, added {added}:"
            " download it again, or export it again if the change was meant"
        )
    return sums


def sum_rows(sums: dict[str, str], data: dict[str, str]) -> list[tuple[str, str]]:
    """(what, sum) of weights, code and data, as a card shows them."""
    rows = [(f"`{name}`", digest) for name, digest in sorted(sums.items()) if name.endswith(".safetensors")]
    code = {name: digest for name, digest in sums.items() if name.endswith(".py")}
    rows.append((f"code ({len(code)} files, the `*.py` lines of `{SUMS_FILE}`)", sha256_of_sums(code)))
    return rows + [(f"data: {name}", digest) for name, digest in sorted(data.items())]
