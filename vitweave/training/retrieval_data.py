"""Images with texts as a retriever wants them: one caption drawn per epoch, sentences kept, batches padded."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vitweave.processing.sentences import split_sentences
from vitweave.training.epochs import EpochDataset
from vitweave.training.retrieval_records import name_of, open_records

# text column -> the column with its sentences; a record without it has its text split by the processor's rule
SENTENCE_COLUMNS = {"caption": "sentences", "description": "description_sentences"}
PADDING = {"attention_mask": 0, "sentence_ids": -1}


def text_id(text: str) -> int:
    """A number that is equal for equal texts, in every process: 63 bits."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def candidate_texts(
    record: Mapping, columns: Sequence[str], sentence_columns: Mapping[str, str]
) -> list[str | list[str]]:
    """Every text of a record: a text, or the list of its sentences where the record has them.

    A column with a list holds several texts (as Flickr8k's five captions).
    """
    found = []
    for column in columns:
        value = record.get(column)
        sentences = record.get(sentence_columns.get(column, ""))
        if isinstance(value, str) and value.strip() and sentences:
            found.append(list(sentences))
        elif isinstance(value, str):
            found.append(value)
        elif value is not None:
            found += list(value)
    return [text for text in found if "".join(text).strip()]


def corpus_of(
    records: Sequence[Mapping],
    columns: Sequence[str] = ("caption",),
    sentence_columns: Mapping[str, str] = SENTENCE_COLUMNS,
) -> list[str]:
    """All texts of records, to train a tokenizer on, which a dataset needs before it can be made."""
    read = records.fields if hasattr(records, "fields") else records.__getitem__
    found = (text for index in range(len(records)) for text in candidate_texts(read(index), columns, sentence_columns))
    return [text if isinstance(text, str) else " ".join(text) for text in found]


class ImagesOf(Dataset):
    """The images of a retrieval dataset, each once: what a cache of a frozen encoder's features is made from."""

    def __init__(self, dataset: "RetrievalDataset"):
        self.dataset, self.processor = dataset, dataset.processor.image_processor
        records = dataset.records
        if hasattr(records, "select_columns"):
            records = records.select_columns([dataset.image_column])
        self.samples = records if hasattr(records, "sources") or hasattr(records, "cast_column") else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.dataset.encode_image(index)


class RetrievalDataset(EpochDataset):
    """`pixel_values`, `patch_mask`, `input_ids`, `attention_mask`, `sentence_ids`, `caption_ids` per record.

    Args:
        records: anything with a length whose items are dicts of an image and texts: `RetrievalRecords`, a
            `datasets.Dataset`, a list.
        processor: a `FigureTextProcessor`.
        text_columns: where texts are taken from, e.g. `("caption", "description")`.
        draw: one of a record's texts is drawn per epoch, as a pure function of (seed, epoch, index); False takes the
            first, for evaluation.
        truncation: cut texts that are longer than the tokenizer's `model_max_length`, said once; False refuses them.
    """

    def __init__(
        self,
        records: Sequence[Mapping],
        processor,
        text_columns: Sequence[str] = ("caption",),
        sentence_columns: Mapping[str, str] | None = None,
        draw: bool = False,
        seed: int = 0,
        truncation: bool = True,
        image_column: str = "image",
    ):
        self.records, self.processor, self.text_columns = records, processor, tuple(text_columns)
        self.sentence_columns = dict(SENTENCE_COLUMNS if sentence_columns is None else sentence_columns)
        self.draw, self.seed, self.truncation, self.image_column = draw, seed, truncation, image_column
        known = getattr(records, "column_names", None)
        missing = [name for name in (image_column, *self.text_columns) if known is not None and name not in known]
        if missing:
            raise ValueError(f"there is no column {missing}; known: {known}; set image_column and text_columns")
        if not self.text_columns:
            raise ValueError("expected at least one text column, got none")
        self._check_texts()
        super().__init__()

    @classmethod
    def from_source(
        cls,
        source: str | Path,
        processor,
        split: str | None = None,
        where: Mapping[str, Any] | None = None,
        on_missing: str = "error",
        **options,
    ) -> "RetrievalDataset":
        """From a jsonl file, a folder with `captions.jsonl`, or a `datasets` id; `options` are those of the class.

        Args:
            on_missing: "error" names missing image files, "skip" goes on without them (files only).
        """
        files = Path(source).exists() or str(source).endswith(".jsonl")
        image_column = options.get("image_column", "image")
        reading = {"on_missing": on_missing, "image_column": image_column} if files else {}
        return cls(open_records(source, split, where, **reading), processor, **options)

    def _check_texts(self) -> None:
        """Refuse records without a text, by name, before anything is computed."""
        empty = [self.name(index) for index in range(len(self.records)) if not self.texts(index)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(self.records)} records have an empty caption (columns "
                f"{list(self.text_columns)}), among them {empty[:3]}; give them a text or leave them out"
            )

    def fields(self, index: int) -> Mapping:
        """A record, without its image where the source can do so."""
        if hasattr(self.records, "fields"):
            return self.records.fields(index)
        if getattr(self, "_without_images", None) is None:
            source = self.records
            has_columns = hasattr(source, "select_columns")
            kept = [name for name in getattr(source, "column_names", []) if name != self.image_column]
            self._without_images = source.select_columns(kept) if has_columns else source
        return self._without_images[index]

    def name(self, index: int) -> str:
        """What messages call a record."""
        return name_of(self.fields(index), index)

    def texts(self, index: int) -> list[str | list[str]]:
        """Every text of a record, as a text or as the list of its sentences."""
        return candidate_texts(self.fields(index), self.text_columns, self.sentence_columns)

    def sentences(self, index: int) -> list[str]:
        """The sentences of a record's first text."""
        first = self.texts(index)[0]
        return split_sentences(first) if isinstance(first, str) else first

    def text(self, index: int) -> str | list[str]:
        """The text of a record in this epoch."""
        texts = self.texts(index)
        if not self.draw:
            return texts[0]
        return texts[int(np.random.default_rng([self.seed, self.epoch, index]).integers(len(texts)))]

    def corpus(self) -> list[str]:
        """All texts, to train a tokenizer on."""
        return [
            text if isinstance(text, str) else " ".join(text)
            for index in range(len(self.records))
            for text in self.texts(index)
        ]

    def images(self) -> Dataset:
        """The images alone, as `encode_image` gives them."""
        return ImagesOf(self)

    def picture(self, index: int):
        """The image of a record."""
        return self.records[index][self.image_column]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = int(index)
        return {**self.encode_image(index), **self.encode_text(self.text(index), index)}

    def encode_image(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (channels, height, width) and `patch_mask` (patches,)."""
        try:
            encoded = self.processor(images=self.picture(index), return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{self.name(index)}: {error}") from error
        return {name: values[0] for name, values in encoded.items()}

    def encode_text(self, text: str | list[str], index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `sentence_ids` (tokens,) and `caption_ids` ()."""
        encoded = self.processor(text=[text], truncation=self.truncation, names=[self.name(index)], return_tensors="pt")
        joined = text if isinstance(text, str) else " ".join(text)
        return {**{name: values[0] for name, values in encoded.items()}, "caption_ids": torch.tensor(text_id(joined))}


class RetrievalCollator:
    """Stack samples of a `RetrievalDataset`; texts are padded to the longest (`sentence_ids` with -1)."""

    def __init__(self, tokenizer):
        if tokenizer.pad_token_id is None:
            raise ValueError("expected a tokenizer with a pad token, got none; set tokenizer.pad_token")
        self.padding = {"input_ids": tokenizer.pad_token_id, **PADDING}
        self.left = tokenizer.padding_side == "left"

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: self.join(name, [sample[name] for sample in samples]) for name in samples[0]}

    def join(self, name: str, values: list[torch.Tensor]) -> torch.Tensor:
        """(batch, ...) of one field."""
        if name not in self.padding:
            return torch.stack(values)
        longest = max(len(value) for value in values)
        rows = torch.full((len(values), longest), self.padding[name], dtype=values[0].dtype)
        for row, value in zip(rows, values, strict=True):
            start = longest - len(value) if self.left else 0
            row[start : start + len(value)] = value
        return rows
