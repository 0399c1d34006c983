"""A stand-in for the retriever with its names: colours of tiles and words, without a transformer."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.processing.processing_figure_text import FigureTextProcessor
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.synthetic_figures import SyntheticFigures
from vitweave.training.text_tokenizer import train_tokenizer

NAMES = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


class TinyAlignment(nn.Module):
    """Tiles of a 2 x 2 and a 4 x 4 grid."""

    levels = (2, 4)

    def tile_boxes(self):
        return torch.tensor(
            [
                (row / level, column / level, (row + 1) / level, (column + 1) / level)
                for level in self.levels
                for row in range(level)
                for column in range(level)
            ]
        )


class TinyRetriever(nn.Module):
    """Images by the mean colours of their tiles, texts by the mean of their words."""

    def __init__(self, vocab_size=300, hidden=8, alignment=True):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(vocab_size, hidden)
        self.colours = nn.Linear(3, hidden, bias=False)
        self.alignment = TinyAlignment() if alignment else None
        self.config = SimpleNamespace(ranking_alpha=0.5, local_temperature=0.05)
        self.dropout = nn.Dropout(0.5)

    def encode_images(self, pixel_values, patch_mask=None):
        pooled = F.normalize(self.dropout(self.colours(pixel_values.mean((2, 3)))), dim=-1)
        if self.alignment is None:
            return pooled, None, None
        levels = [F.adaptive_avg_pool2d(pixel_values, level).flatten(2) for level in self.alignment.levels]
        tiles = self.colours(torch.cat(levels, dim=2).transpose(1, 2))
        return pooled, F.normalize(tiles, dim=-1), torch.ones(tiles.shape[:2], dtype=torch.bool)

    def encode_texts(self, input_ids, attention_mask=None, sentence_ids=None):
        words, valid = self.words(input_ids), attention_mask[..., None]
        pooled = F.normalize((words * valid).sum(1) / valid.sum(1), dim=-1)
        if self.alignment is None:
            return pooled, None, None
        members = sentence_ids[:, None] == torch.arange(int(sentence_ids.max()) + 1)[:, None]
        return pooled, F.normalize(members.float() @ words, dim=-1), members.any(dim=-1)


class ColourReader(TinyRetriever):
    """Knows which word names which colour; a sentence is one of `NAMES`."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def get_tile_features(self, pixel_values, patch_mask=None):
        levels = [F.adaptive_avg_pool2d(pixel_values, level).flatten(2) for level in self.alignment.levels]
        tiles = torch.cat(levels, dim=2).transpose(1, 2)
        masks = [F.adaptive_max_pool2d(patch_mask.view(-1, 1, 8, 8).float(), level).flatten(1) for level in (2, 4)]
        return F.normalize(tiles, dim=-1), torch.cat(masks, dim=1) > 0

    def get_sentence_features(self, input_ids, attention_mask=None, sentence_ids=None):
        count = int(sentence_ids.max()) + 1
        words = [
            [self.tokenizer.decode(row[which == index]).strip() for index in range(count)]
            for row, which in zip(input_ids, sentence_ids, strict=True)
        ]
        colours = torch.tensor([[NAMES.get(word, (128, 128, 128)) for word in row] for row in words]) / 127.5 - 1
        return F.normalize(colours, dim=-1), torch.tensor([[bool(word) for word in row] for row in words])


def tiny_processor(corpus, size=64, patch_size=8, max_length=48):
    return FigureTextProcessor(
        FigureImageProcessorPil(size=size, patch_size=patch_size), train_tokenizer(corpus, 300, max_length=max_length)
    )


def tiny_dataset(length=8, **options):
    figures = SyntheticFigures(length)
    return RetrievalDataset(figures, tiny_processor([figures.fields(i)["caption"] for i in range(length)]), **options)
