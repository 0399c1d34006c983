"""Records of images and their texts, from a jsonl file, a folder of pictures or `datasets`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from vitweave.training.paired_data import IMAGE_SUFFIXES, open_picture

logger = logging.get_logger(__name__)

ON_MISSING = ("error", "skip")


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """The objects of a file with one JSON object per line; empty lines are passed over."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a jsonl file of records, there is no {path}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
            yield record


def matches(record: Mapping, where: Mapping[str, Any]) -> bool:
    """Whether a record has these values; a list in `where` means any of its values."""
    return all(record.get(name) in (want if isinstance(want, list) else [want]) for name, want in where.items())


class RetrievalRecords(Sequence):
    """Records as dicts with an `image` (a picture, read when asked for) and the other fields of their source.

    Args:
        records: dicts; their image is a path.
        folder: what relative paths start from.
        where: keep only records with these values, e.g. `{"split": "train", "mini": True}`.
        on_missing: what to do with records whose image file is not there: "error" names them, "skip" leaves them out,
            counts them and says so; `skipped` has their names.
    """

    def __init__(
        self,
        records: Sequence[Mapping],
        folder: str | Path = ".",
        where: Mapping[str, Any] | None = None,
        on_missing: str = "error",
        image_column: str = "image",
    ):
        if on_missing not in ON_MISSING:
            raise ValueError(f"unknown on_missing {on_missing!r}; known: {list(ON_MISSING)}")
        self.folder, self.image_column = Path(folder), image_column
        all_records = list(records)
        chosen = [record for record in all_records if matches(record, where or {})]
        if not chosen:
            raise ValueError(f"expected records with {where}, found none among {len(all_records)}")
        without = [index for index, record in enumerate(chosen) if not record.get(image_column)]
        if without:
            first = without[0]
            raise ValueError(
                f"{len(without)} records have no {image_column!r}, the first is {name_of(chosen[first], first)} with "
                f"{sorted(chosen[first])}; set image_column"
            )
        lost = [index for index, record in enumerate(chosen) if not self.path_of(record).is_file()]
        self.skipped = [name_of(chosen[index], index) for index in lost]
        if lost:
            self._report(chosen[lost[0]], len(chosen), on_missing)
        gone = set(lost)
        self.records = [dict(record) for index, record in enumerate(chosen) if index not in gone]

    def _report(self, first: Mapping, total: int, on_missing: str) -> None:
        """Stop, or say what was left out."""
        message = (
            f"{len(self.skipped)} of {total} images are missing: {', '.join(self.skipped[:3])}"
            f"{', ...' if len(self.skipped) > 3 else ''} (the first as {self.path_of(first)})"
        )
        if on_missing == "error":
            raise FileNotFoundError(f"{message}; on_missing='skip' goes on without them")
        if len(self.skipped) == total:
            raise FileNotFoundError(f"{message}; none is left")
        logger.warning(f"{message}; going on without them")

    @classmethod
    def from_jsonl(cls, path: str | Path, **options) -> "RetrievalRecords":
        """One JSON object per line; image paths are relative to the file."""
        return cls(list(read_jsonl(path)), Path(path).parent, **options)

    @classmethod
    def from_folder(cls, folder: str | Path, **options) -> "RetrievalRecords":
        """All pictures below a folder, sorted by path; they have no text, so they can be indexed but not trained on."""
        folder = Path(folder)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"expected pictures ({', '.join(IMAGE_SUFFIXES)}) below {folder}, found none")
        records = [{"id": str(path.relative_to(folder)), "image": str(path.relative_to(folder))} for path in paths]
        return cls(records, folder, **options)

    def path_of(self, record: Mapping) -> Path:
        return self.folder / record[self.image_column]

    @property
    def column_names(self) -> list[str]:
        """Every field that a record has."""
        return sorted({name for record in self.records for name in record})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        """The record, its image opened, its path as `path`, its name as `name`."""
        return {**self.fields(index), self.image_column: open_picture(self.path_of(self.records[index]))}

    def sources(self, index: int) -> dict[str, Path]:
        """The file of the record's image."""
        return {"image": self.path_of(self.records[index])}

    def fields(self, index: int) -> dict:
        """The record without opening its image."""
        record = self.records[index]
        return {**record, "path": str(self.path_of(record)), "name": name_of(record, index)}


def name_of(record: Mapping, index: int) -> str:
    """What messages call a record."""
    return str(record.get("id") or record.get("name") or f"record {index}")


def open_records(
    source: str | Path, split: str | None = None, where: Mapping | None = None, **options
) -> Sequence[dict]:
    """Records of a jsonl file, of a folder (its `captions.jsonl` if there is one), or of a `datasets` id.

    Args:
        split: of a `datasets` id the split to load, of a jsonl file the value of the field `split`.
        where: further fields to choose by.
        options: of `RetrievalRecords`; a `datasets` id takes none.
    """
    path = Path(source)
    path = path / "captions.jsonl" if (path / "captions.jsonl").is_file() else path
    if path.is_file():
        chosen = {**({} if split is None else {"split": split}), **(where or {})}
        return RetrievalRecords.from_jsonl(path, where=chosen, **options)
    if path.is_dir() and any(found.suffix.lower() in IMAGE_SUFFIXES for found in path.rglob("*")):
        return RetrievalRecords.from_folder(path, where=where, **options)
    if path.suffix in (".jsonl", ".json"):
        raise FileNotFoundError(f"expected a jsonl file of records, there is no {path}")
    from datasets import load_dataset  # only here: importing the recipe must not import datasets

    records = load_dataset(str(source), split=split or "train")
    return records.filter(lambda record: matches(record, where)) if where else records
