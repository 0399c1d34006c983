"""Images with captions or conversations as a vision-language model wants them, and batches of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from vitweave.training.epochs import EpochDataset
from vitweave.training.vlm_records import VlmRecords
from vitweave.training.vlm_text import IGNORED, PROMPT, ConversationEncoder, caption_messages

IMAGE_FIELDS = ("pixel_values", "num_tiles", "image_sizes")


class VlmDataset(EpochDataset):
    """`input_ids` and `labels` (tokens,) per record, and of its images `pixel_values` (tiles, channels, height, width),
    `num_tiles` (images,) and `image_sizes` (images, 2).

    Labels are the ids of what the assistant says, -100 on everything else.

    Args:
        records: `VlmRecords`, or what these can be made of.
        processor: a `MultiEncoderVlmProcessor`.
        prompt: what is asked about the images of records with captions; with several, one is drawn per epoch. "" is
            the images alone.
        draw: one of a record's captions is drawn per epoch, as a pure function of (seed, epoch, index); False takes
            the first, for evaluation.
        max_length: longer samples lose their end, said once; None is the most the language model takes.
    """

    def __init__(
        self,
        records: Sequence[Mapping],
        processor,
        prompt: str | Sequence[str] = PROMPT,
        draw: bool = False,
        seed: int = 0,
        max_length: int | None = None,
    ):
        self.records = records if isinstance(records, VlmRecords) else VlmRecords(records)
        self.processor, self.draw, self.seed = processor, draw, seed
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not self.prompts:
            raise ValueError('expected a prompt, got none; "" asks nothing')
        self.encode_conversation = ConversationEncoder(processor, max_length)
        super().__init__()

    @classmethod
    def from_source(
        cls, source: str | Path, processor, split: str | None = None, on_missing: str = "error", **options
    ) -> "VlmDataset":
        """From a jsonl file, a folder with one, or a `datasets` id (`VlmRecords.open`); `options` are of the class."""
        reading = {"on_missing": on_missing}
        return cls(VlmRecords.open(source, split, **reading), processor, **options)

    def messages(self, index: int) -> list[dict]:
        """The conversation of a record in this epoch."""
        given = self.records.fields(index).get("messages")
        if given:
            return list(given)
        texts, prompts = self.records.texts(index), self.prompts
        if not self.draw:
            return caption_messages(prompts[0], self.count_images(index), texts[0])
        rng = np.random.default_rng([self.seed, self.epoch, index])
        text, prompt = texts[int(rng.integers(len(texts)))], prompts[int(rng.integers(len(prompts)))]
        return caption_messages(prompt, self.count_images(index), text)

    def count_images(self, index: int) -> int:
        """Images of a record; none is read."""
        return len(self.records.sources(index))

    def tiles(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Of each image of a record its tiles and its (height, width), without decoding it."""
        sizes = self.records.sizes(index)
        images = self.processor.image_processor
        return [images.count_tiles(height, width, len(sizes)) for height, width in sizes], sizes

    def encode_images(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (tiles, channels, height, width), `num_tiles` (images,) and `image_sizes` (images, 2)."""
        pictures = self.records.pictures(index)
        if not pictures:
            return {}
        try:
            encoded = self.processor.image_processor([pictures], return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{self.records.name(index)}: {error}") from error
        return {name: encoded[name] for name in IMAGE_FIELDS}

    def encode_text(self, index: int, num_tiles: Sequence[int], image_sizes: Sequence) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels` (tokens,)."""
        name = self.records.name(index)
        ids, labels = self.encode_conversation(self.messages(index), num_tiles, image_sizes, name)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def length(self, index: int) -> int:
        """Tokens of a sample, without decoding its images."""
        return len(self.encode_text(index, *self.tiles(index))["input_ids"])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = int(index)
        images = self.encode_images(index)
        num_tiles, sizes = (images[name].tolist() if images else [] for name in ("num_tiles", "image_sizes"))
        return self.encode_text(index, num_tiles, sizes) | images


class VlmCollator:
    """Texts padded to the longest at the end, all tiles one after the other; text-only samples have none.

    Returns:
        `input_ids`, `attention_mask` and `labels` (batch, tokens), -100 in the padding; where there are images
        `pixel_values` (tiles, channels, height, width), `num_tiles` (images,) and `image_sizes` (images, 2).
    """

    def __init__(self, tokenizer):
        if tokenizer.pad_token_id is None:
            raise ValueError("expected a tokenizer with a pad token, got none; set tokenizer.pad_token")
        self.pad_token_id = tokenizer.pad_token_id

    def __call__(self, samples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([torch.ones_like(one) for one in ids], 0),
            "labels": padded([sample["labels"] for sample in samples], IGNORED),
        }
        for name in IMAGE_FIELDS:
            found = [sample[name] for sample in samples if name in sample]
            if found:
                batch[name] = torch.cat(found)
        return batch


def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """(batch, longest) of (tokens,) each, filled up at the end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
