"""Records of a vision-language model: any number of images, and captions or a conversation about them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from transformers.utils import logging

from vitweave.training.paired_data import open_picture
from vitweave.training.retrieval_records import ON_MISSING, matches, name_of, open_records, read_jsonl

logger = logging.get_logger(__name__)

JSONL_NAMES = ("captions.jsonl", "conversations.jsonl", "metadata.jsonl")  # of a folder, the first that is there
IMAGE_FIELDS = ("images", "image", "file_name")
TEXT_FIELDS = ("caption", "captions", "text")
ON_ITS_SIDE = (5, 6, 7, 8)  # values of the EXIF orientation
ORIENTATION = 0x0112


def entries_of(record: Mapping, image_fields: Sequence[str] = IMAGE_FIELDS) -> list:
    """The images of a record as its source has them, paths or pictures; none for a record of text alone."""
    found = next((record[name] for name in image_fields if record.get(name)), None)
    if found is None:
        said = [message["content"] for message in record.get("messages") or []]
        parts = [part for content in said if not isinstance(content, str) for part in content]
        return [part.get("path") or part["image"] for part in parts if part.get("path") or part.get("image")]
    return list(found) if isinstance(found, (list, tuple)) else [found]


def texts_of(record: Mapping, text_fields: Sequence[str] = TEXT_FIELDS) -> list[str]:
    """Every caption of a record that is not empty."""
    found = next((record[name] for name in text_fields if record.get(name)), [])
    found = [found] if isinstance(found, str) else list(found)
    return [text for text in found if text and text.strip()]


class VlmRecords(Sequence):
    """Records as dicts; their images are opened when asked for.

    A record has its images (`images`, `image` or `file_name`: paths or pictures; or as `path` or `image` in the parts
    of its messages; none for text alone) and either `messages` in the form of chat templates or captions (`caption`,
    `captions` or `text`: one or several).

    Args:
        records: dicts, or a `datasets.Dataset`.
        folder: what relative paths start from.
        where: keep only records with these values.
        on_missing: what to do with records an image file of which is not there: "error" names them, "skip" leaves them
            out, counts them and says so; `skipped` has their names.
    """

    def __init__(
        self,
        records: Sequence[Mapping],
        folder: str | Path = ".",
        where: Mapping[str, Any] | None = None,
        on_missing: str = "error",
        image_fields: Sequence[str] = IMAGE_FIELDS,
        text_fields: Sequence[str] = TEXT_FIELDS,
    ):
        if on_missing not in ON_MISSING:
            raise ValueError(f"unknown on_missing {on_missing!r}; known: {list(ON_MISSING)}")
        self.folder, self.image_fields, self.text_fields = Path(folder), tuple(image_fields), tuple(text_fields)
        has_columns = hasattr(records, "remove_columns")
        if not has_columns:
            records = [dict(record) for record in records if matches(record, where or {})]
        elif where:
            records = records.filter(lambda record: matches(record, where))
        if not len(records):
            raise ValueError(f"expected records with {where}, found none")
        self.records = records
        pictures = [name for name in self.image_fields if has_columns and name in records.column_names]
        self.without_images = records.remove_columns(pictures) if has_columns else records
        self.skipped: list[str] = []
        if not has_columns:
            self.leave_out_missing(on_missing)
        self.check()

    @classmethod
    def open(
        cls, source: str | Path, split: str | None = None, where: Mapping[str, Any] | None = None, **options
    ) -> "VlmRecords":
        """Of a jsonl file, of a folder with one (`captions.jsonl`, `conversations.jsonl` or `metadata.jsonl`, there or
        in a folder named like the split), or of a `datasets` id.

        Args:
            split: of a `datasets` id the split to load; of a jsonl file the value of the field `split`, where there is
                no folder of that name.
            where: further fields to choose by.
            options: those of the class.
        """
        path, chosen = Path(source), dict(where or {})
        if path.is_dir() and split is not None and (path / split).is_dir():
            path, split = path / split, None
        path = next((path / name for name in JSONL_NAMES if (path / name).is_file()), path)
        if path.is_file() or path.suffix in (".jsonl", ".json"):
            return cls(list(read_jsonl(path)), path.parent, chosen | ({"split": split} if split else {}), **options)
        if path.is_dir():
            raise FileNotFoundError(f"expected one of {list(JSONL_NAMES)} in {path}, found none")
        return cls(open_records(source, split), where=chosen, **options)

    def leave_out_missing(self, on_missing: str) -> None:
        """Stop at image files that are not there, or go on without their records."""
        lost = {}
        for index, record in enumerate(self.records):
            absent = [path for path in self.paths(record) if not path.is_file()]
            if absent:
                lost[index] = absent[0]
        if not lost:
            return
        self.skipped = [name_of(self.records[index], index) for index in lost]
        message = (
            f"images of {len(lost)} of {len(self.records)} records are missing: {', '.join(self.skipped[:3])}"
            f"{', ...' if len(lost) > 3 else ''} (the first as {next(iter(lost.values()))})"
        )
        if on_missing == "error":
            raise FileNotFoundError(f"{message}; on_missing='skip' goes on without them")
        if len(lost) == len(self.records):
            raise FileNotFoundError(f"{message}; none is left")
        logger.warning(f"{message}; going on without them")
        self.records = self.without_images = [one for index, one in enumerate(self.records) if index not in lost]

    def check(self) -> None:
        """Refuse records without anything to say, by name."""
        for index, record in enumerate(self.without_images):
            if record.get("messages"):
                continue
            if not texts_of(record, self.text_fields):
                raise ValueError(
                    f"{name_of(record, index)} has neither messages nor a caption (fields {list(self.text_fields)}),"
                    f" only {sorted(record)}; give it one, or set text_fields"
                )
            if self.without_images is self.records and not entries_of(record, self.image_fields):
                raise ValueError(
                    f"{name_of(record, index)} has a caption but no image (fields {list(self.image_fields)}); set"
                    " image_fields, or write text without images as messages"
                )

    def paths(self, record: Mapping) -> list[Path]:
        """The files of a record's images, as far as they are files."""
        entries = entries_of(record, self.image_fields)
        return [self.folder / entry for entry in entries if isinstance(entry, (str, Path))]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return {**self.fields(index), "images": self.pictures(index), "name": self.name(index)}

    def fields(self, index: int) -> Mapping:
        """The record without opening its images."""
        return self.without_images[index]

    def name(self, index: int) -> str:
        """What messages call a record."""
        return name_of(self.fields(index), index)

    def texts(self, index: int) -> list[str]:
        """The captions of a record."""
        return texts_of(self.fields(index), self.text_fields)

    def sources(self, index: int) -> list[Path | PIL.Image.Image]:
        """What the images of a record are made from: files, or pictures where there are none."""
        entries = entries_of(self.records[index], self.image_fields)
        return [self.folder / entry if isinstance(entry, (str, Path)) else entry for entry in entries]

    def pictures(self, index: int) -> list[PIL.Image.Image]:
        """The images of a record, in their order."""
        return [open_picture(source) if isinstance(source, Path) else source for source in self.sources(index)]

    def sizes(self, index: int) -> list[tuple[int, int]]:
        """(height, width) of a record's images; of files only the header is read."""
        return [size_of(source) for source in self.sources(index)]

    def corpus(self) -> Iterator[str]:
        """All texts, to train a tokenizer on."""
        for index in range(len(self)):
            for message in self.fields(index).get("messages") or []:
                content = message["content"]
                yield content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
            yield from self.texts(index)


def size_of(source: Path | PIL.Image.Image) -> tuple[int, int]:
    """(height, width) of a picture as `open_picture` turns it."""
    if not isinstance(source, Path):
        return source.height, source.width
    try:
        with PIL.Image.open(source) as picture:
            width, height = picture.size
            on_its_side = picture.getexif().get(ORIENTATION) in ON_ITS_SIDE
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{source} cannot be read as a picture: {error}") from error
    return (width, height) if on_its_side else (height, width)
