"""The processors of encoder towers: square padding, tiles, counts and sizes beside the pixels, both backends."""

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import is_torchvision_available

from vitweave.processing.image_processing_multi_encoder import MultiEncoderImageProcessor
from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.multi_encoder_steps import logger

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
BACKENDS = [
    MultiEncoderImageProcessorPil,
    pytest.param(MultiEncoderImageProcessor, marks=[pytest.mark.torchvision, needs_torchvision]),
]
both_backends = pytest.mark.parametrize("processor_class", BACKENDS)
RAW = {"do_rescale": False, "do_normalize": False}
TILED = {"size": 28, "tiling": {"max_tiles": 6}}


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def squared(picture, side):
    """Square padding with the mean colour as LLaVA pastes it, then Pillow's bicubic."""
    colour = tuple(int(mean * 255) for mean in MultiEncoderImageProcessorPil.image_mean)
    longest = max(picture.size)
    canvas = PIL.Image.new("RGB", (longest, longest), colour)
    canvas.paste(picture, tuple((longest - length) // 2 for length in picture.size))
    return np.asarray(canvas.resize((side, side), PIL.Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (40, 40), (41, 40)])
def test_square_padding_is_that_of_the_llava_family(size):
    processor = MultiEncoderImageProcessorPil(size=28)
    picture = noise(*size)
    encoded = processor(picture, return_tensors="np")
    raw = processor(picture, return_tensors="np", **RAW)["pixel_values"][0]
    assert np.array_equal(raw, squared(picture, 28))
    mean, std = (np.array(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    np.testing.assert_allclose(encoded["pixel_values"][0], (raw / 255 - mean) / std, atol=1e-5)
    assert encoded["num_tiles"].tolist() == [1] and encoded["image_sizes"].tolist() == [[size[1], size[0]]]
    stretched = processor(picture, do_pad_square=False, return_tensors="np", **RAW)["pixel_values"][0]
    assert np.array_equal(stretched, np.asarray(picture.resize((28, 28), 3)).transpose(2, 0, 1))


def test_tiles_are_those_of_a_native_processor():
    pictures = [noise(100, 37), noise(33, 90), noise(28, 28), noise(300, 20)]
    options = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6}
    native = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, **options)(pictures, return_tensors="pt")
    own = MultiEncoderImageProcessorPil(**TILED)(pictures, return_tensors="pt")
    torch.testing.assert_close(own["pixel_values"], native["pixel_values"])
    assert own["num_tiles"].tolist() == native["num_patches"].tolist() == [4, 4, 1, 7]
    assert own["num_tiles"].dtype == own["image_sizes"].dtype == torch.int64
    assert own["image_sizes"].tolist() == [[37, 100], [90, 33], [28, 28], [20, 300]]


@both_backends
@pytest.mark.parametrize("options", [{"size": 28}, TILED])
def test_a_batch_equals_its_items(processor_class, options):
    processor = processor_class(**options)
    pictures = [noise(100, 37, 1), noise(33, 90, 2), noise(28, 28, 3)]
    together = processor(pictures, return_tensors="pt")
    tiles = together["pixel_values"].split(together["num_tiles"].tolist())
    for index, picture in enumerate(pictures):
        alone = processor(picture, return_tensors="pt")
        assert torch.equal(alone["pixel_values"], tiles[index])
        assert torch.equal(alone["image_sizes"][0], together["image_sizes"][index])


@both_backends
def test_images_of_a_sample_share_the_tiles(processor_class):
    processor = processor_class(**TILED)
    wide = noise(600, 100)
    nested = processor([[wide], [], [wide, wide], [wide] * 7], return_tensors="pt")
    assert nested["num_tiles"].tolist() == [7] + [4] * 2 + [1] * 7
    assert nested["pixel_values"].shape[0] == 22
    found = [processor.count_tiles(100, 600, images) for images in (1, 2, 7)]
    assert found == [7, 4, 1] and processor.count_tiles(100, 600, tiling={"max_tiles": 2}) == 3
    assert processor_class(size=28).count_tiles(100, 600) == 1


@both_backends
def test_every_kind_of_picture(processor_class):
    processor = processor_class(size=28, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    clear = PIL.Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    assert (processor(clear, return_tensors="pt")["pixel_values"] == 1).all()
    grey = noise(28, 28).convert("L")
    expected = processor(grey.convert("RGB"), return_tensors="pt")["pixel_values"]
    for picture in (grey, np.asarray(grey), grey.quantize(256), torch.tensor(np.asarray(grey))):
        torch.testing.assert_close(processor(picture, return_tensors="pt")["pixel_values"], expected)
    assert (processor(PIL.Image.new("1", (28, 28), 1), return_tensors="pt")["pixel_values"] == 1).all()
    palette = PIL.Image.new("P", (28, 28), 3)
    palette.putpalette([0] * 9 + [255, 0, 51])
    red = processor(palette, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(red[:, 5, 5], torch.tensor([1.0, 0.0, 0.2]))


@both_backends
def test_a_file_is_turned_as_its_exif_says(processor_class, tmp_path):
    picture = noise(40, 20)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to look at it
    picture.save(tmp_path / "turned.jpg", exif=exif)
    encoded = processor_class(size=28)(str(tmp_path / "turned.jpg"), return_tensors="pt")
    assert encoded["image_sizes"].tolist() == [[40, 20]]


@both_backends
def test_the_background_follows_the_units(processor_class):
    processor = processor_class(size=28, image_mean=[0.2, 0.4, 0.6])
    wide = np.zeros((14, 28, 3))
    whole = processor(wide.astype(np.uint8), return_tensors="pt", **RAW)["pixel_values"][0, :, 0, 0]
    assert whole.tolist() == [51, 102, 153]
    floats = processor(wide.astype(np.float32), return_tensors="pt", **RAW)["pixel_values"][0, :, 0, 0]
    torch.testing.assert_close(floats.float(), torch.tensor([0.2, 0.4, 0.6]))


@pytest.mark.torchvision
@needs_torchvision
def test_the_backends_differ_by_their_bicubic_only():
    made = [maker(**TILED, **RAW) for maker in (MultiEncoderImageProcessor, MultiEncoderImageProcessorPil)]
    first, second = (one([noise(100, 37), noise(33, 90)], return_tensors="pt") for one in made)
    assert torch.equal(first["num_tiles"], second["num_tiles"])
    difference = (first["pixel_values"].float() - second["pixel_values"].float()).abs()
    assert 0 < difference.max() <= 20 and difference.mean() < 0.5  # noise is the worst case
    whole = [one(noise(28, 28), return_tensors="pt")["pixel_values"] for one in made]
    assert torch.equal(whole[0].int(), whole[1].int())


@both_backends
def test_saved_and_loaded(processor_class, tmp_path):
    processor = processor_class(size=28, tiling={"max_tiles": 4, "thumbnail": False}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    backend = "pil" if processor_class is MultiEncoderImageProcessorPil else "torchvision"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is processor_class
    first, second = (one(noise(90, 40), return_tensors="pt") for one in (processor, loaded))
    assert first["num_tiles"].tolist() == [2] and all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.model_input_names == ["pixel_values", "num_tiles", "image_sizes"]


def test_built_from_a_tower_config():
    class Tower:
        image_size, image_mean, image_std = 56, (0.5, 0.5, 0.5), None

    processor = MultiEncoderImageProcessorPil.from_model_config(Tower(), tiling={"max_tiles": 2})
    assert processor(noise(90, 40), return_tensors="pt")["pixel_values"].shape == (3, 3, 56, 56)
    assert list(processor.image_mean) == [0.5] * 3
    assert list(processor.image_std) == list(MultiEncoderImageProcessorPil.image_std)
    Tower.image_size = [28, 56]
    flat = MultiEncoderImageProcessorPil.from_model_config(Tower())
    assert flat(noise(90, 40), return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 56)


def test_many_tiles_are_told_with_their_figures(monkeypatch):
    told = []
    monkeypatch.setattr(logger, "warning", told.append)
    processor = MultiEncoderImageProcessorPil(**TILED, max_batch_tiles=8)
    processor([noise(100, 37)] * 2)
    assert not told
    processor([noise(100, 37)] * 3)
    assert len(told) == 1 and told[0].startswith("3 images make 12 tiles of 28x28 (0 MiB of pixel values)")
    assert "max_batch_tiles=8" in told[0] and "max_tiles=6" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": {"shortest_edge": 28}}, "height"),
        ({"do_center_crop": True, "crop_size": 28}, "do_pad_square or tiling"),
        ({"tiling": {"max_tiles": 4}, "do_pad_square": True}, "stretches an image onto its grid"),
        ({"tiling": {"max_tiles": 4}, "do_resize": False}, "do_resize=True and square tiles"),
        ({"tiling": {"max_tiles": 4}, "size": {"height": 28, "width": 56}}, "square tiles.*28x56"),
        ({"tiling": {"max_tiles": 10_000}}, "at most 256, got 10000"),
        ({"tiling": {"tiles": 4}}, "unknown tiling options"),
        ({"max_batch_tiles": 0}, "max_batch_tiles of at least 1"),
        ({"do_resize": False}, "expected images of 28x28.*got 40x40"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MultiEncoderImageProcessorPil(**{"size": 28} | options)(noise(40, 20))
    with pytest.raises(ValueError, match=message):
        MultiEncoderImageProcessorPil(size=28)(noise(40, 20), **options)


@both_backends
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image, got none"),
        ([[], []], "at least one image, got none"),
        (np.zeros((0, 5, 3), dtype=np.uint8), r"at least one pixel, got \(3, 0, 5\)"),
        (PIL.Image.new("RGB", (5, 0)), r"at least one pixel, got \(3, 0, 5\)"),
        (np.zeros((8, 8, 4), dtype=np.uint8), "got an array with 4"),
        (PIL.Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)), "8-bit picture"),
        (np.full((8, 8, 3), 40000, dtype=np.int32), "0 to 255.*int32"),
    ],
)
def test_bad_images_are_refused(processor_class, images, message):
    with pytest.raises(ValueError, match=message):
        processor_class(size=28)(images)
