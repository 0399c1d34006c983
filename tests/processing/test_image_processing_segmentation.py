"""The segmentation image processors: geometry shared by image and mask, refusals, post-processing."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import is_torchvision_available

from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.image_processing_segmentation import SegmentationImageProcessor
from vitweave.processing.label_maps import resize_nearest

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
BACKENDS = [
    SegmentationImageProcessorPil,
    pytest.param(SegmentationImageProcessor, marks=[pytest.mark.torchvision, needs_torchvision]),
]
rng = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
MASK = rng.integers(0, 3, (24, 40), dtype=np.uint8)


@pytest.mark.parametrize("processor_class", BACKENDS)
def test_mask_follows_the_image(processor_class):
    """A picture whose brightness is its class id: after resizing, a pixel that is still pure must keep its class."""
    mask = np.zeros((30, 50), dtype=np.uint8)
    mask[10:, 20:] = 1
    picture = PIL.Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2))
    processor = processor_class(size={"height": 12, "width": 16}, size_divisor=10)
    out = processor(picture, PIL.Image.fromarray(mask), return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 20, 20) and out["labels"].shape == (1, 20, 20)
    pure = out["pixel_values"][0, 0].abs() == 1.0
    assert pure.sum() > 100
    expected = (out["pixel_values"][0, 0] > 0).long()
    assert torch.equal(out["labels"][0][pure], expected[pure])
    # centred padding: 4 rows above and below, 2 columns left and right
    assert (out["labels"][0][:4] == 255).all() and (out["labels"][0][-4:] == 255).all()
    assert (out["labels"][0][:, :2] == 255).all() and not (out["labels"][0][4:16, 2:18] == 255).any()


@pytest.mark.parametrize("processor_class", BACKENDS)
@pytest.mark.parametrize(
    "size", [{"shortest_edge": 12}, {"max_height": 18, "max_width": 18}, {"height": 9, "width": 7}]
)
def test_every_kind_of_size_serves_image_and_mask(processor_class, size):
    out = processor_class(size=size)(IMAGE, MASK, return_tensors="pt")
    assert out["pixel_values"].shape[-2:] == out["labels"].shape[-2:]
    assert out["pixel_values"].shape[-2:] in [(12, 20), (11, 18), (10, 18), (9, 7)]


def test_nearest_resize_is_that_of_pil_and_keeps_large_ids():
    for size in [(7, 13), (50, 33), (24, 40)]:
        expected = np.array(PIL.Image.fromarray(MASK).resize(size[::-1], PIL.Image.Resampling.NEAREST))
        np.testing.assert_array_equal(resize_nearest(MASK, size), expected)
    assert resize_nearest(np.array([[70000]]), (2, 2)).tolist() == [[70000, 70000], [70000, 70000]]


@pytest.mark.torchvision
@needs_torchvision
def test_backends_agree():
    results = [
        backend(size=16, size_divisor=5, do_reduce_labels=True)([IMAGE, IMAGE], [MASK, MASK], return_tensors="pt")
        for backend in (SegmentationImageProcessor, SegmentationImageProcessorPil)
    ]
    assert torch.equal(results[0]["labels"], results[1]["labels"])
    torch.testing.assert_close(results[0]["pixel_values"], results[1]["pixel_values"], atol=0.02, rtol=0)


def test_the_torchvision_processor_says_what_to_use_without_torchvision():
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="SegmentationImageProcessorPil"):
        SegmentationImageProcessor()


@pytest.mark.parametrize("processor_class", BACKENDS)
def test_normalisation_defaults_to_minus_one_to_one(processor_class):
    white = PIL.Image.new("RGB", (4, 4), (255, 255, 255))
    assert torch.allclose(processor_class(size=4)(white, return_tensors="pt")["pixel_values"], torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize("processor_class", BACKENDS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_a_known_mode_become_rgb(processor_class, mode):
    out = processor_class(size=8)(IMAGE.convert("RGB").convert(mode), return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 8, 8)


def test_a_transparent_picture_shows_white():
    clear = PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (SegmentationImageProcessorPil(size=4)(clear, return_tensors="pt")["pixel_values"] == 1).all()


@pytest.mark.parametrize("processor_class", BACKENDS)
def test_four_channels_are_refused_until_they_are_named(processor_class):
    four = rng.integers(0, 256, (12, 12, 4), dtype=np.uint8)
    processor = processor_class(size=8)
    for image in (four, torch.from_numpy(four)):
        with pytest.raises(ValueError, match=r"RGBA.*do_convert_rgb=True"):
            processor(image)
    assert processor(four, do_convert_rgb=True, return_tensors="pt")["pixel_values"].shape == (1, 3, 8, 8)
    kept = processor(four, image_mean=[0.5] * 4, image_std=[0.5] * 4, return_tensors="pt")
    assert kept["pixel_values"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("processor_class", BACKENDS)
@pytest.mark.parametrize(
    ("image", "mask", "options", "message"),
    [
        (IMAGE, MASK[:20], {}, "image 24x40 and mask 20x40"),
        (IMAGE, MASK, {"num_labels": 2}, r"0 to 1 or 255 \(ignored\), got \[2\]"),
        (IMAGE, MASK.astype(np.float32), {}, "whole numbers"),
        (IMAGE, IMAGE, {}, "mode 'RGB'"),
        (IMAGE, [MASK, MASK], {}, "1 images and 2 masks"),
        (PIL.Image.fromarray(MASK.astype(np.uint16)), MASK, {}, "8-bit picture"),
        (np.zeros((24, 40, 1), np.uint8), MASK, {"do_convert_rgb": False}, "expected 3 channels"),
        (IMAGE, MASK, {"do_center_crop": True, "crop_size": 8}, "do_center_crop"),
    ],
)
def test_bad_input_is_refused(processor_class, image, mask, options, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=8)(image, mask, **options)


def test_misspelt_options_are_refused():
    with pytest.raises((TypeError, ValueError), match="sise"):
        SegmentationImageProcessorPil()(IMAGE, sise=8)


def test_reduced_labels_ignore_class_0_and_the_ignored():
    mask = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    image = PIL.Image.new("RGB", (4, 1))
    out = SegmentationImageProcessorPil(do_resize=False, do_reduce_labels=True)(image, mask, return_tensors="pt")
    assert out["labels"].tolist() == [[[255, 0, 1, 255]]]


def test_a_channelless_array_and_the_ignored_index_pass_the_range_check():
    mask = np.full((24, 40), 255, dtype=np.uint8)
    out = SegmentationImageProcessorPil(size=8, num_labels=2)(np.zeros((24, 40), np.uint8), mask, return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 8, 8) and (out["labels"] == 255).all()


def test_saving_keeps_the_options(tmp_path):
    SegmentationImageProcessorPil(size=40, ignore_index=0, size_divisor=14, num_labels=7).save_pretrained(tmp_path)
    loaded = SegmentationImageProcessorPil.from_pretrained(tmp_path)
    assert (loaded.size["height"], loaded.ignore_index, loaded.size_divisor, loaded.num_labels) == (40, 0, 14, 7)


def test_post_processing_cuts_the_padding_off():
    """Logits that are one-hot of the padded labels give the mask back at the original size."""
    processor = SegmentationImageProcessorPil(do_resize=False, size_divisor=14)
    labels = processor(IMAGE, MASK, return_tensors="pt")["labels"]
    logits = torch.nn.functional.one_hot(labels.clamp(max=3), 4).permute(0, 3, 1, 2).float()
    assert logits.shape[-2:] == (28, 42)
    (found,) = processor.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), [(24, 40)])
    np.testing.assert_array_equal(found.numpy(), MASK)


def test_post_processing_scores_and_lengths():
    logits = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    processor, outputs = SegmentationImageProcessorPil(size=6), SemanticSegmenterOutput(logits=logits)
    scored = processor.post_process_semantic_segmentation(outputs, [(4, 9), (3, 3)], return_segmentation_scores=True)
    assert scored[0].segmentation_scores.shape == (5, 4, 9) and scored[1].segmentation.shape == (3, 3)
    assert torch.equal(scored[0].segmentation, scored[0].segmentation_scores.argmax(0))
    with pytest.raises(ValueError, match="1 for 2 images"):
        processor.post_process_semantic_segmentation(outputs, [(4, 4)])
