"""Aligned sensors to tensors: units, ranges, what is not there, and one geometry for all."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision
from transformers.utils import is_torchvision_available

from vitweave.processing.image_processing_modality import ModalityImageProcessor
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.processing.sensor_encodings import IMAGENET_MEAN, IMAGENET_STD

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
BACKENDS = [
    ModalityImageProcessorPil,
    pytest.param(ModalityImageProcessor, marks=[pytest.mark.torchvision, needs_torchvision]),
]
both_backends = pytest.mark.parametrize("processor_class", BACKENDS)
rng = np.random.default_rng(0)
RGB = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
DEPTH = rng.uniform(1, 9, (24, 32)).astype(np.float32)
LABELS = rng.integers(0, 5, (24, 32)).astype(np.uint8)


def depth_processor(**options) -> ModalityImageProcessorPil:
    depth = {"encoding": "metres", "value_range": [0.0, 10.0], "invalid": 0} | options
    return ModalityImageProcessorPil({"rgb": {"encoding": "rgb"}, "depth": depth})


def test_every_sensor_in_its_own_unit():
    found = depth_processor()({"rgb": RGB, "depth": DEPTH}, LABELS)
    assert found["pixel_values"].shape == (1, 2, 3, 24, 32) and found["pixel_values"].dtype == torch.float32
    picture = np.moveaxis(np.array(RGB), -1, 0) / 255
    expected = (picture - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    np.testing.assert_allclose(found["pixel_values"][0, 0], expected, atol=1e-5)
    np.testing.assert_allclose(found["pixel_values"][0, 1], np.repeat(DEPTH[None] / 10, 3, axis=0), atol=1e-6)
    assert found["modality_mask"].tolist() == [[True, True]] and torch.equal(
        found["labels"][0], torch.from_numpy(LABELS).long()
    )


@pytest.mark.parametrize(
    ("stored", "options"),
    [
        ((DEPTH * 1000).astype(np.uint16), {"scale": 0.001}),
        ((DEPTH * 20).astype(np.float32), {"scale": 0.05}),
        (DEPTH + 1, {"offset": -1.0}),
    ],
)
def test_units_agree(stored, options):
    found = depth_processor(**options)({"depth": stored})["pixel_values"]
    expected = depth_processor()({"depth": DEPTH})["pixel_values"]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_inverse_depth_is_one_at_the_nearest():
    depth = np.array([[1.0, 2.0], [4.0, 100.0]], dtype=np.float32)
    found = depth_processor(encoding="inverse_depth", value_range=[1.0, 4.0])({"depth": depth})["pixel_values"][0, 1, 0]
    torch.testing.assert_close(found, torch.tensor([[1.0, 1 / 3], [0.0, 0.0]]))


def test_what_was_not_measured_is_zero_after_normalisation():
    depth = DEPTH.copy()
    depth[0, 0], depth[0, 1], depth[0, 2] = 0, np.nan, np.inf
    found = depth_processor(mean=[0.5] * 3, std=[0.25] * 3)({"depth": depth})["pixel_values"][0, 1]
    assert found[:, 0, :3].eq(0).all() and torch.isfinite(found).all() and found[:, 0, 3].ne(0).all()


def test_absent_sensors_are_masked():
    processor = depth_processor()
    found = processor([{"rgb": RGB}, {"rgb": None, "depth": DEPTH}, {"rgb": RGB, "depth": DEPTH}])
    assert found["modality_mask"].tolist() == [[True, False], [False, True], [True, True]]
    assert found["pixel_values"][0, 1].eq(0).all() and found["pixel_values"][1, 0].eq(0).all()
    with pytest.raises(ValueError, match="none of the modalities"):
        processor({"rgb": None})


def test_files_of_all_kinds_give_the_same(tmp_path):
    millimetres = (DEPTH * 1000).astype(np.uint16)
    np.save(tmp_path / "d.npy", millimetres)
    PIL.Image.fromarray(millimetres).save(tmp_path / "d.png")
    PIL.Image.fromarray(millimetres).save(tmp_path / "d.tiff")
    RGB.save(tmp_path / "rgb.png")
    processor = depth_processor(scale=0.001)
    expected = processor({"rgb": RGB, "depth": millimetres})["pixel_values"]
    for name in ("d.npy", "d.png", "d.tiff"):
        found = processor({"rgb": tmp_path / "rgb.png", "depth": str(tmp_path / name)})["pixel_values"]
        assert torch.equal(found, expected)


def test_one_geometry_for_all():
    processor = ModalityImageProcessorPil(size={"height": 12, "width": 20}, size_divisor=16)
    found = processor({"rgb": RGB, "depth": DEPTH}, LABELS)
    assert found["pixel_values"].shape == (1, 2, 3, 16, 32) and found["labels"].shape == (1, 16, 32)
    assert found["labels"][0, 12:].eq(255).all() and found["labels"][0, :, 20:].eq(255).all()
    assert found["pixel_values"][0, :, :, 12:].eq(0).all()
    stored = set(np.unique(DEPTH / 10).round(5))
    assert set(found["pixel_values"][0, 1, 0, :12, :20].numpy().ravel().round(5)) <= stored  # nearest blends nothing
    smooth = ModalityImageProcessorPil(size={"height": 12, "width": 20}, measure_resample="bilinear")
    blended = smooth({"depth": np.full((24, 32), 3.0, dtype=np.float32)})["pixel_values"][0, 1]
    torch.testing.assert_close(blended, torch.full((3, 12, 20), 0.3))


@both_backends
def test_saved_and_opened_by_the_auto_class(processor_class, tmp_path):
    processor = processor_class(
        {
            "rgb": {"encoding": "rgb"},
            "heat": {"encoding": "thermal", "value_range": [-20, 150], "scale": 0.04, "offset": -273.15},
        }
    )
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=processor_class.backend)
    assert type(loaded) is processor_class and loaded.to_dict() == processor.to_dict()
    heat = rng.integers(6500, 9000, (24, 32)).astype(np.uint16)
    sample = {"rgb": RGB, "heat": heat}
    assert torch.equal(loaded(sample)["pixel_values"], processor(sample)["pixel_values"])


def test_another_unit_is_reported_once():
    processor = depth_processor()
    with pytest.warns(UserWarning, match=r"depth: 100 % .* scale=1.*0.001 for millimetres"):
        processor({"depth": DEPTH * 1000})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor({"depth": DEPTH * 1000})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_processor()({"rgb": RGB, "thermal": DEPTH}), "unknown modalities.*thermal"),
        (lambda: depth_processor()({"rgb": RGB, "depth": DEPTH[:10]}), "aligned images of one size"),
        (lambda: depth_processor()({"rgb": np.zeros((24, 32, 4), dtype=np.uint8)}), "fourth channel may be opacity"),
        (lambda: depth_processor()({"rgb": np.full((3, 24, 32), np.nan, dtype=np.float32)}), "NaN"),
        (lambda: depth_processor()({"depth": RGB}), "one number per pixel"),
        (lambda: depth_processor(sacle=3), "no option.*sacle"),
        (lambda: depth_processor(encoding="meters"), "unknown encoding"),
        (lambda: depth_processor(value_range=None), "value_range"),
        (lambda: ModalityImageProcessorPil(measure_resample="cubic"), "measure_resample"),
        (lambda: depth_processor()([{"rgb": RGB}, {"rgb": RGB.resize((8, 8))}]), "one size in a batch"),
    ],
)
def test_what_cannot_be_right_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_predictions_take_the_size_asked_for():
    processor = ModalityImageProcessorPil(size={"height": 12, "width": 20}, size_divisor=16)
    outputs = type("Outputs", (), {"logits": torch.randn(2, 5, 16, 32)})
    assert [tuple(one.shape) for one in processor.post_process_semantic_segmentation(outputs)] == [(12, 20)] * 2
    found = processor.post_process_semantic_segmentation(outputs, [(24, 32), (6, 5)])
    assert [tuple(one.shape) for one in found] == [(24, 32), (6, 5)]


@pytest.mark.torchvision
@needs_torchvision
@pytest.mark.parametrize(
    "options", [{}, {"size": {"height": 12, "width": 20}}, {"size": {"height": 50, "width": 40}, "size_divisor": 32}]
)
@pytest.mark.parametrize("measure_resample", ["nearest", "bilinear"])
def test_both_backends_agree(options, measure_resample, tmp_path):
    first, second = (
        made(measure_resample=measure_resample, **options)([{"rgb": RGB, "depth": DEPTH}, {"rgb": RGB}], [LABELS] * 2)
        for made in (ModalityImageProcessor, ModalityImageProcessorPil)
    )
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"], atol=1e-5, rtol=0)
    assert torch.equal(first["pixel_values"][0, 1], second["pixel_values"][0, 1])
    assert all(torch.equal(first[name], second[name]) for name in ("modality_mask", "labels"))
    ModalityImageProcessorPil(**options).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ModalityImageProcessor  # torchvision is there


def test_the_torchvision_processor_says_what_to_use_without_torchvision():
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="use ModalityImageProcessorPil"):
        ModalityImageProcessor()
