"""Absurd sizes, tile counts and shapes of images are refused before the memory for them is asked for."""

import time

import numpy as np
import pytest
import torch
from memory_use import reset_peak, resident
from PIL import Image

from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.sliding_window import sliding_window_logits
from vitweave.processing.tiling import tiling_options

SMALL = Image.new("RGB", (40, 30))
LONG = Image.new("RGB", (60_000, 1))
HUGE = 10**9


def check_refused(call, message: str) -> None:
    reset_peak()
    before, start = resident("VmRSS"), time.process_time()
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert time.process_time() - start < 1
    assert resident("VmHWM") - before < 200


@pytest.mark.parametrize("size", [HUGE, {"height": HUGE, "width": HUGE}, {"height": 1, "width": HUGE}, -5, 0])
def test_absurd_sizes(size):
    check_refused(lambda: MultiEncoderImageProcessorPil(size=size)(SMALL), "expected|got|must")
    check_refused(lambda: SegmentationImageProcessorPil(size=size)(SMALL), "expected|got|must")


@pytest.mark.parametrize("size", [{"shortest_edge": 16_000}, {"shortest_edge": HUGE}])
def test_absurd_edges(size):
    check_refused(lambda: SegmentationImageProcessorPil(size=size)(LONG), "expected .*pixels")


def test_absurd_divisors():
    check_refused(lambda: SegmentationImageProcessorPil(size_divisor=HUGE)(SMALL), "as size_divisor, got 1000000000")


def test_a_long_thin_image():
    check_refused(lambda: MultiEncoderImageProcessorPil(size=32)(LONG), "1x60000 .*got 60000x60000; .*cut a very long")
    check_refused(lambda: SegmentationImageProcessorPil(size={"shortest_edge": 224})(LONG), "cut a very long image")
    pixels = MultiEncoderImageProcessorPil(size=32)(Image.new("RGB", (3000, 2)))["pixel_values"]
    assert np.asarray(pixels).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("tiles", [0, -1, 257, HUGE, 10**400, 1.5, float("nan"), "many", None, True, [3]])
def test_absurd_tile_counts(tiles):
    check_refused(lambda: tiling_options({"max_tiles": tiles}), "expected .*max_tiles")
    if tiles not in (257, HUGE, 10**400):
        check_refused(lambda: tiling_options({"min_tiles": tiles}), "expected .*min_tiles")


@pytest.mark.parametrize("tiling", [5, "many", [], {5: 1}, {"max_tile": 3}])
def test_tiling_is_a_mapping_of_known_options(tiling):
    check_refused(lambda: tiling_options(tiling), "expected tiling as a mapping|unknown tiling options")


def test_absurd_tiles():
    tiling = {"max_tiles": 256}
    check_refused(lambda: MultiEncoderImageProcessorPil(size=4096, tiling=tiling), "256 tiles of 4096x4096")


def test_absurdly_many_windows():
    image = torch.zeros(1, 1, 400, 400)
    check_refused(lambda: sliding_window_logits(lambda crops: crops, image, 2, 1), "at most 100000 windows .*399x399")
