"""Figures and their captions to tensors, with the sentence every token belongs to."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from vitweave.processing.sentences import join_sentences, sentence_of_tokens

logger = logging.get_logger(__name__)

TEXT_OPTIONS = ("add_special_tokens", "pad_to_multiple_of", "padding_side")  # handed to the tokenizer


class FigureTextProcessor(ProcessorMixin):
    """A figure image processor and a fast tokenizer.

    Returns `pixel_values` and `patch_mask` for images; for captions `input_ids`, `attention_mask` and `sentence_ids`
    (batch, tokens): which sentence of its caption a token belongs to, -1 for special tokens and padding.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets, which the sentences are found by; use a fast "
                "tokenizer (AutoTokenizer gives one where there is one)"
            )
        super().__init__(image_processor, tokenizer, **kwargs)
        # shared memory, so that what one data loader worker has reported no other reports again
        self._reported = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def model_input_names(self) -> list[str]:
        return [*self.image_processor.model_input_names, "input_ids", "attention_mask", "sentence_ids"]

    def __call__(
        self,
        images=None,
        text: str | Sequence[str | Sequence[str]] | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_cut_text: bool = False,
        names: Sequence[str] | None = None,
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        **options,
    ) -> BatchFeature:
        """Encode images, captions, or both.

        Args:
            text: one caption, or a list with one entry per record: a caption, which is split into sentences, or the
                list of its sentences.
            padding: as for a tokenizer, but True where nothing is said: captions differ in length.
            truncation: what is longer than `max_length` tokens is cut off there and reported once; False refuses it.
            max_length: the most tokens of a caption, special ones included; the tokenizer's `model_max_length` if None.
            return_cut_text: adds `cut_text`, per caption what was cut off ("" if nothing was).
            names: what messages call the records; their position if None.
            text_kwargs, images_kwargs: options for one side only, as all processors of transformers take them.
            options: of the image processor; add_special_tokens, pad_to_multiple_of and padding_side of the tokenizer.
        """
        if images is None and text is None:
            raise ValueError("expected images, text or both, got neither")
        image_options, text_options = self._sort_options(options)
        image_options |= images_kwargs or {}
        sides = {"padding": padding, "truncation": truncation, "max_length": max_length}
        sides |= {"return_cut_text": return_cut_text, "names": names}
        data: dict[str, Any] = {}
        if text is not None:
            data |= self.encode_captions(text, **{**sides, **text_options, **(text_kwargs or {})})
        if images is not None:
            data |= self.image_processor(images, **image_options)
        cut = data.pop("cut_text", None)
        encoded = BatchFeature(data=data, tensor_type=return_tensors)
        if cut is not None:
            encoded["cut_text"] = cut
        return encoded

    def _sort_options(self, options: dict) -> tuple[dict, dict]:
        """Options of the image processor and of the tokenizer; any other is refused by name."""
        known = set(self.image_processor.valid_kwargs.__annotations__) if self.image_processor is not None else set()
        strange = sorted(options.keys() - known - set(TEXT_OPTIONS))
        if strange:
            raise TypeError(f"unknown options {strange}; known: {sorted(known | set(TEXT_OPTIONS))}")
        text_options = {name: value for name, value in options.items() if name in TEXT_OPTIONS}
        return {name: value for name, value in options.items() if name not in TEXT_OPTIONS}, text_options

    def encode_captions(
        self, text, padding=True, truncation=False, max_length=None, return_cut_text=False, names=None, **options
    ) -> dict[str, list]:
        """`input_ids`, `attention_mask` and `sentence_ids` as lists; the arguments are those of a call."""
        captions = [text] if isinstance(text, str) else list(text)
        names = [f"record {index}" for index in range(len(captions))] if names is None else list(names)
        if not captions or len(names) != len(captions):
            raise ValueError(f"expected one name per caption and at least one, got {len(names)} for {len(captions)}")
        joined = [join_sentences(caption, name) for caption, name in zip(captions, names, strict=True)]
        texts = [one for one, _ in joined]
        limit = max_length or self.tokenizer.model_max_length
        whole = self._tokenize(texts, **options)["input_ids"]
        too_long = [index for index, ids in enumerate(whole) if len(ids) > limit]
        if too_long and not truncation:
            first = too_long[0]
            raise ValueError(
                f"the caption of {names[first]} has {len(whole[first])} tokens, the model takes {limit}; pass "
                "truncation=True to cut it there, or give fewer sentences"
            )
        bounds = {"truncation": True, "max_length": limit} if too_long else {}
        if padding == "max_length":
            bounds["max_length"] = limit
        encoded = self._tokenize(texts, padding=padding, **bounds, **options)
        spans = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], joined, strict=True)
        sentence_ids = [sentence_of_tokens(offsets, special, ends) for offsets, special, (_, ends) in spans]
        if too_long:
            self._report_cut(whole, limit, too_long, joined, sentence_ids, names)
        data = {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"sentence_ids": sentence_ids}
        if return_cut_text:
            kept = zip(texts, encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
            data["cut_text"] = [cut_text(*one) for one in kept]
        return data

    def _tokenize(self, texts: list[str], **options):
        return self.tokenizer(
            texts,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=True,
            return_token_type_ids=False,
            verbose=False,  # lengths are told here, with names
            **options,
        )

    def _report_cut(self, whole, limit, too_long, joined, sentence_ids, names) -> None:
        """Say once how much was cut."""
        if self._reported:
            return
        self._reported.fill_(1)
        tokens = sum(len(whole[index]) - limit for index in too_long)
        sentences = sum(len(joined[index][1]) - len(set(sentence_ids[index]) - {-1}) for index in too_long)
        longest = max(too_long, key=lambda index: len(whole[index]))
        logger.warning(
            f"{len(too_long)} of {len(whole)} captions are longer than {limit} tokens and were cut: {tokens} tokens "
            f"and {sentences} whole sentences left out, the most from {names[longest]} ({len(whole[longest])} tokens). "
            "Later cuts are not reported; return_cut_text=True returns what was cut"
        )


def cut_text(text: str, offsets, special) -> str:
    """What of a text its tokens do not cover, at the end or (truncation side left) at the start."""
    kept = [span for span, skip in zip(offsets, special, strict=True) if not skip]
    if not kept:
        return text
    return (text[: kept[0][0]] + text[kept[-1][1] :]).strip()


__all__ = ["FigureTextProcessor"]
