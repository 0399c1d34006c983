"""The mosaic pointing test: a model that knows the colours wins, one that knows nothing scores as chance."""

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_retriever import NAMES, ColourReader, TinyRetriever, tiny_dataset, tiny_processor

from vitweave.training.pointing import draw_mosaic, mosaic_records, point, pointing_test, quadrant_of_tiles
from vitweave.training.retrieval_data import RetrievalDataset


def coloured(count=8, names=NAMES):
    """Plain figures of one colour whose caption names it."""
    names = [list(names)[index % len(names)] for index in range(count)]
    records = [
        {"id": str(i), "image": PIL.Image.new("RGB", (30, 20), NAMES[n]), "caption": n} for i, n in enumerate(names)
    ]
    return RetrievalDataset(records, tiny_processor(list(NAMES) * 9))


class Blind(ColourReader):
    """Sentences that have nothing to do with the figures."""

    def get_sentence_features(self, *args, **kwargs):
        sentences, mask = super().get_sentence_features(*args, **kwargs)
        return torch.randn(sentences.shape, generator=torch.Generator().manual_seed(1)), mask


def test_a_model_that_reads_colours_points_right():
    dataset = coloured()
    model = ColourReader(dataset.processor.tokenizer).train()
    metrics = pointing_test(model, dataset, rounds=3, batch_size=2, resamples=50)
    assert metrics["pointing_accuracy"] == metrics["pointing_accuracy_low"] == 1 and model.training
    assert metrics["mosaics"] == 6 and metrics["sentences"] == 24
    assert metrics["pointing_chance"] == 0.25 and 0 < metrics["pointing_entropy"] < 1


def test_a_blind_model_scores_as_chance():
    dataset = coloured(40)
    metrics = pointing_test(Blind(dataset.processor.tokenizer), dataset, rounds=20, batch_size=100)
    assert metrics["pointing_accuracy"] == pytest.approx(0.25, abs=0.05)
    assert metrics["pointing_accuracy_low"] < metrics["pointing_accuracy"] < metrics["pointing_accuracy_high"]


def test_every_figure_lies_whole_in_its_quadrant():
    processor = tiny_processor(["a"]).image_processor
    pictures = [
        PIL.Image.new("RGB", size, colour)
        for size, colour in zip(((60, 10), (10, 60), (9, 9), (99, 99)), NAMES.values(), strict=True)
    ]
    mosaic, covered = draw_mosaic(pictures, processor)
    pixels = np.asarray(mosaic).astype(int)
    assert mosaic.size == (64, 64) and covered.shape == (64,)
    corners = [(0, 0), (0, 32), (32, 0), (32, 32)]
    for (top, left), colour in zip(corners, NAMES.values(), strict=True):
        here = (pixels == colour).all(-1)
        assert here[top : top + 32, left : left + 32].sum() == here.sum() > 100
    assert covered.reshape(8, 8)[:, :4].sum() == 2 * 4 + 16 and covered.reshape(8, 8)[:4, 4:].sum() == 8
    assert covered.reshape(8, 8)[4:, 4:].all()


def test_tiles_across_quadrants_take_no_part():
    boxes = torch.tensor(
        [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 0.5), (0.75, 0.75, 1, 1), (0.3, 0, 0.6, 0.5)]
    )
    quadrants = quadrant_of_tiles(boxes)
    assert quadrants.tolist() == [-1, 0, 1, 2, 3, -1]
    cosines = torch.tensor([[9.0, 0.1, 0.3, 0.2, 8.0, 9.0]])
    valid = torch.tensor([True, True, True, True, False, True])
    hit, chance, _ = point(cosines, valid, quadrants, own=1, temperature=0.05)
    assert hit.item() and chance.item() == pytest.approx(1 / 3)
    assert not point(cosines, valid, quadrants, own=2, temperature=0.0)[0].item()


def test_records_are_dealt_once_and_equal_texts_never_meet():
    dataset = coloured(10)  # black and blue twice, red and green three times
    for seed in range(5):
        mosaics = mosaic_records(dataset, rounds=2, seed=seed)
        for chosen in mosaics:
            assert len({dataset.texts(index)[0] for index in chosen}) == 4
        assert all(sum(index in chosen for chosen in mosaics) <= 2 for index in range(10))
    assert mosaic_records(dataset, seed=1) == mosaic_records(dataset, seed=1) != mosaic_records(dataset, seed=2)
    with pytest.raises(ValueError, match="at least 4 records with different texts"):
        mosaic_records(coloured(6, ["red", "blue"]))


def test_a_model_without_tiles_is_refused():
    with pytest.raises(ValueError, match="local_loss_weight above 0"):
        pointing_test(TinyRetriever(alignment=False), tiny_dataset(4))
