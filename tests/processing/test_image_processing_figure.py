"""The figure processors: the whole figure on a white canvas, and a mask that says which patches it covers."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from vitweave.processing.figure_steps import covered_patches, figure_box
from vitweave.processing.image_processing_figure import FigureImageProcessor
from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
BACKENDS = [
    FigureImageProcessorPil,
    pytest.param(FigureImageProcessor, marks=[pytest.mark.torchvision, needs_torchvision]),
]
SMALL = {"size": 32, "patch_size": 8, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
both_backends = pytest.mark.parametrize("processor_class", BACKENDS)


def framed(width, height, border=2):
    """A grey figure with a black frame: what is cut off is seen."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    for side in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
        pixels[side] = 0
    return PIL.Image.fromarray(pixels)


@both_backends
@pytest.mark.parametrize(("width", "height"), [(320, 80), (80, 320), (100, 100), (16, 8), (500, 7)])
def test_nothing_is_cut_off_and_the_ratio_is_kept(processor_class, width, height):
    encoded = processor_class(**SMALL)(framed(width, height, max(1, height // 16)), return_tensors="pt")
    pixels = encoded["pixel_values"][0]
    top, left, high, wide = figure_box((height, width), (32, 32))
    assert pixels.shape == (3, 32, 32) and max(high, wide) == 32
    assert abs(high / wide - height / width) < 1 / wide + 1e-9
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[top : top + high, left : left + wide] = True
    assert (pixels[:, ~inside] == 1).all() and pixels[:, inside].mean() < 0.7
    assert pixels[0, top].mean() < 0.95 and pixels[0, top + high - 1].mean() < 0.95
    rows = inside.unflatten(0, (4, 8)).unflatten(2, (4, 8)).any(dim=3).any(dim=1)
    assert torch.equal(encoded["patch_mask"][0], rows.flatten()) and encoded["patch_mask"].dtype == torch.bool


def test_the_box_is_centred():
    assert figure_box((80, 320), (32, 32)) == (12, 0, 8, 32)
    assert figure_box((10, 10), (32, 64)) == (0, 16, 32, 32)
    assert figure_box((10, 12), (32, 32), do_resize=False) == (11, 10, 10, 12)
    assert covered_patches((12, 0, 8, 32), (32, 32), (8, 8)).reshape(4, 4).any(axis=1).tolist() == [0, 1, 1, 0]
    assert covered_patches((8, 0, 8, 32), (32, 32), (8, 16)).tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


@both_backends
def test_the_canvas_follows_colour_and_normalisation(processor_class):
    image = framed(64, 16)
    red = processor_class(**SMALL, pad_color=[255, 0, 51])(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(red[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    usual = processor_class(size=32, patch_size=8)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(usual[:, 0, 0], torch.ones(3))
    raw = processor_class(**SMALL, do_rescale=False, do_normalize=False)(image, return_tensors="pt")["pixel_values"]
    assert raw.max() == 255
    floats = torch.full((3, 16, 64), 0.5)
    unscaled = processor_class(**SMALL, do_rescale=False)(floats, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(unscaled[:, 0, 0], torch.ones(3))


@both_backends
def test_every_kind_of_picture(processor_class):
    processor = processor_class(**SMALL)
    clear = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert (processor(clear, return_tensors="pt")["pixel_values"] == 1).all()
    palette = framed(32, 32).quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))  # the black frame
    assert processor(palette, return_tensors="pt")["pixel_values"][0, :, 0, 0].tolist() == [1, 1, 1]
    expected = processor(framed(32, 32), return_tensors="pt")["pixel_values"]
    for picture in (framed(32, 32).convert("L"), framed(32, 32).quantize(4), np.asarray(framed(32, 32))):
        torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"], expected)
    grey = processor(np.asarray(framed(32, 32).convert("L")), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(grey, expected)
    black_and_white = PIL.Image.new("1", (32, 32), 1)
    assert (processor(black_and_white, return_tensors="pt")["pixel_values"] == 1).all()


@both_backends
def test_sixteen_bits_and_opacity_in_arrays_are_refused(processor_class):
    deep = PIL.Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"8-bit picture.*'I;16'"):
        processor_class(**SMALL)(deep)
    with pytest.raises(ValueError, match=r"0 to 255.*int32.*40000.*divide a 16-bit figure by 257"):
        processor_class(**SMALL)(np.full((8, 8, 3), 40000, dtype=np.int32))
    with pytest.raises(ValueError, match="got an array with 4"):
        processor_class(**SMALL)(np.zeros((8, 8, 4), dtype=np.uint8))


@both_backends
def test_a_batch_equals_its_items(processor_class):
    processor = processor_class(**SMALL)
    figures = [framed(64, 16), framed(16, 64), framed(50, 33)]
    together = processor(figures, return_tensors="pt")
    for index, figure in enumerate(figures):
        alone = processor(figure, return_tensors="pt")
        for name in ("pixel_values", "patch_mask"):
            assert torch.equal(together[name][index], alone[name][0])


@pytest.mark.torchvision
@needs_torchvision
def test_both_backends_agree():
    first, second = (
        made(**SMALL)(framed(320, 80, 8), return_tensors="pt")
        for made in (FigureImageProcessor, FigureImageProcessorPil)
    )
    assert torch.equal(first["patch_mask"], second["patch_mask"])
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"], atol=2 / 255, rtol=0)


@both_backends
def test_saved_and_loaded(processor_class, tmp_path):
    processor = processor_class(size={"height": 32, "width": 64}, patch_size=[8, 16], pad_color=[250, 250, 250])
    processor.save_pretrained(tmp_path)
    backend = "pil" if processor_class is FigureImageProcessorPil else "torchvision"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is processor_class
    first, second = (one(framed(40, 30), return_tensors="pt") for one in (processor, loaded))
    assert first["patch_mask"].shape == (1, 16) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 30}, "30x30 and patches of 8x8"),
        ({"do_center_crop": True, "crop_size": 16}, "cut axes"),
        ({"do_pad": False}, "always padded"),
        ({"size": {"shortest_edge": 32}}, "height"),
        ({"pad_color": [1, 2]}, "3 of them"),
        ({"pad_color": 300}, "0 to 255"),
        ({"do_resize": False}, "40x40.*does not fit on 32x32"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FigureImageProcessorPil(**{**SMALL, **options})(framed(40, 40))
    with pytest.raises(ValueError, match=message):
        FigureImageProcessorPil(**SMALL)(framed(40, 40), **options)
