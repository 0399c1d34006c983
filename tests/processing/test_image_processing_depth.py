"""The depth image processors: every source to metres, units and ranges at the door, geometry shared with the image."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.modeling_outputs import DepthEstimatorOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from vitweave.processing.image_processing_depth import DepthImageProcessor
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
BACKENDS = [
    DepthImageProcessorPil,
    pytest.param(DepthImageProcessor, marks=[pytest.mark.torchvision, needs_torchvision]),
]
rng = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
MILLIMETRES = rng.integers(600, 9000, (24, 40), dtype=np.uint16)
MILLIMETRES[:3] = 0
METRES = (MILLIMETRES.astype(np.float64) * 0.001).astype(np.float32)


def labels(processor, source, image=IMAGE, **options):
    return processor(image, source, return_tensors="pt", **options)["labels"][0]


@pytest.fixture
def millimetres():
    return DepthImageProcessorPil(do_resize=False, depth_scale=0.001)


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", BACKENDS)
def test_every_source_gives_the_same_metres(processor_class, tmp_path):
    processor = processor_class(do_resize=False, depth_scale=0.001)
    picture = PIL.Image.fromarray(MILLIMETRES)
    picture.save(tmp_path / "depth.png")
    picture.save(tmp_path / "depth.tif")
    PIL.Image.fromarray(MILLIMETRES.astype(np.int32)).save(tmp_path / "wide.tif")
    PIL.Image.fromarray(MILLIMETRES.astype(np.float32)).save(tmp_path / "float.tif")
    np.save(tmp_path / "depth.npy", MILLIMETRES)
    np.save(tmp_path / "big_endian.npy", MILLIMETRES.astype(">i4"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(MILLIMETRES.astype(np.float64)))
    files = sorted(tmp_path.iterdir())
    sources = [*files, *map(str, files), picture, picture.convert("I"), MILLIMETRES, torch.from_numpy(METRES * 1000)]
    assert PIL.Image.open(tmp_path / "depth.png").mode == "I;16" and len(files) == 7
    for source in sources:
        found = labels(processor, source)
        assert found.dtype == torch.float32 and found.shape == (24, 40), source
        np.testing.assert_allclose(found.numpy(), METRES, rtol=1e-6, err_msg=str(source))
    both = processor([IMAGE, IMAGE], np.stack([MILLIMETRES, MILLIMETRES]), return_tensors="pt")
    assert both["labels"].shape == (2, 24, 40) and both["pixel_values"].shape == (2, 3, 24, 40)


def test_eight_bits_with_an_offset():
    """nyudv2 at 8 bits: metres = (value + 0.5) * 10 / 255, and 0 is a measurement."""
    stored = rng.integers(0, 256, (24, 40), dtype=np.uint8)
    stored[0, 0] = 0
    processor = DepthImageProcessorPil(
        do_resize=False, depth_scale=10 / 255, depth_offset=5 / 255, invalid_depth=None, depth_range=(0.001, 11)
    )
    expected = (stored + 0.5) * 10 / 255
    np.testing.assert_allclose(labels(processor, PIL.Image.fromarray(stored)), expected, rtol=1e-6)
    assert (labels(processor, stored, invalid_depth=0) == 0).sum() == (stored == 0).sum()


def test_invalid_values_hold_no_measurement():
    depth = METRES.copy()
    depth[5, :4] = np.nan, np.inf, -np.inf, -1
    found = labels(DepthImageProcessorPil(do_resize=False), depth)
    assert (found[5, :4] == 0).all() and (found[:3] == 0).all() and (found[6:] > 0).all()
    masked = np.ma.masked_array(METRES, mask=np.zeros_like(METRES, dtype=bool))
    masked.mask[10] = True
    assert (labels(DepthImageProcessorPil(do_resize=False), masked)[10] == 0).all()
    assert (labels(DepthImageProcessorPil(do_resize=False, invalid_depth=65535), MILLIMETRES * 0 + 65535) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_every_float_type(dtype):
    found = labels(DepthImageProcessorPil(do_resize=False), torch.full((24, 40), 2.5, dtype=dtype))
    assert (found == 2.5).all()


# --- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", BACKENDS)
def test_depth_follows_the_image_and_never_blends(processor_class):
    """A picture whose brightness tells its depth: what is still pure after the resize keeps its depth."""
    depth = np.full((30, 50), 1.0, dtype=np.float32)
    depth[10:, 20:] = 4.0
    depth[:, :5] = 0
    picture = PIL.Image.fromarray(np.repeat(((depth == 4) * 255).astype(np.uint8)[..., None], 3, axis=2))
    out = processor_class(size={"height": 12, "width": 16}, size_divisor=10)(picture, depth, return_tensors="pt")
    found, brightness = out["labels"][0], out["pixel_values"][0, 0]
    assert out["pixel_values"].shape == (1, 3, 20, 20) and found.shape == (20, 20)
    assert set(found.unique().tolist()) == {0.0, 1.0, 4.0}
    pure = (brightness.abs() == 1) & (found > 0)
    assert pure.sum() > 60 and torch.equal(found[pure], torch.where(brightness[pure] > 0, 4.0, 1.0))
    assert not found[:4].any() and not found[-4:].any() and not found[:, :2].any()  # the padding holds nothing


def test_bilinear_is_torchs_where_everything_is_measured_and_never_takes_a_hole_for_a_distance():
    depth = (rng.random((24, 40)) * 5 + 1).astype(np.float32)
    bilinear = {"size": {"height": 13, "width": 55}, "depth_resample": "bilinear"}
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(depth)[None, None], size=(13, 55), mode="bilinear", align_corners=False
    )[0, 0]
    torch.testing.assert_close(labels(DepthImageProcessorPil(**bilinear), depth), expected)
    holes = np.where(rng.random((24, 40)) < 0.3, 0, np.float32(3))
    found = labels(DepthImageProcessorPil(**bilinear), holes)
    assert torch.isclose(found, torch.tensor(3.0)).logical_or(found == 0).all()
    assert 0.1 < (found == 0).float().mean() < 0.5


@pytest.mark.torchvision
@needs_torchvision
def test_backends_agree():
    out = [
        backend(size=16, size_divisor=5, depth_scale=0.001)([IMAGE, IMAGE], [MILLIMETRES] * 2, return_tensors="pt")
        for backend in (DepthImageProcessor, DepthImageProcessorPil)
    ]
    assert torch.equal(out[0]["labels"], out[1]["labels"])
    torch.testing.assert_close(out[0]["pixel_values"], out[1]["pixel_values"], atol=0.02, rtol=0)


# --- units and ranges ------------------------------------------------------------------------------------------------


def test_values_outside_the_range_are_told_once_with_the_figures():
    processor = DepthImageProcessorPil(do_resize=False, depth_range=(0.5, 10.0))
    depth = np.full((24, 40), 10.0, dtype=np.float32)
    depth[0, :3], depth[1, 0], depth[2, 0] = 12.5, 0.25, 0
    with pytest.warns(UserWarning, match=r"4 of 959 depth values .*\(0.5, 10.0\) m .* 0.25 to 12.5 m") as told:
        found = labels(processor, depth)
    assert len(told) == 1 and (found == 10).sum() == 24 * 40 - 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels(processor, depth)
        labels(DepthImageProcessorPil(do_resize=False, depth_range=(0.5, 13)), np.maximum(depth, 0.5))
    with pytest.warns(UserWarning, match="depth values"):
        labels(DepthImageProcessorPil(do_resize=False, depth_range=(0.5, 10.0)), depth)  # another processor, once too


def test_data_loader_workers_say_it_once_together():
    processor = DepthImageProcessorPil(do_resize=False, depth_range=(0.5, 10.0))
    depth = np.full((24, 40), 9.0, dtype=np.float32)
    depth[0, 0] = 12

    class Depths(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                labels(processor, depth)
            return len(told)

    counts = [n for _ in range(2) for n in torch.utils.data.DataLoader(Depths(), batch_size=None, num_workers=1)]
    assert sum(counts) == 1 and len(counts) == 12


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (np.maximum(MILLIMETRES, 600), {}, r"stored 600 to 89\d\d \(uint16\).*millimetres: set depth_scale=0.001"),
        (MILLIMETRES, {"depth_range": (0.01, 10)}, "millimetres: set depth_scale=0.001"),
        (METRES, {"depth_scale": 0.001}, "metres: set depth_scale=1"),
        (METRES, {"depth_scale": 0.001, "depth_range": (0.0001, 10)}, "metres: set depth_scale=1"),
        (METRES * 1000, {}, "millimetres"),
        (METRES + 100, {"depth_range": (0.01, 80)}, "does not fit"),
        (np.where(MILLIMETRES > 620, MILLIMETRES, 5), {"depth_range": (0.01, 10)}, "millimetres"),  # not all outside
    ],
)
def test_mixed_units_are_refused_with_advice(depth, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        labels(DepthImageProcessorPil(do_resize=False, **options), depth)
    assert "depth_scale" in str(refused.value) and "depth_range" in str(refused.value)


def test_unusual_distances_pass_once_they_are_declared():
    close, far = np.full((24, 40), 0.004, np.float32), np.full((24, 40), 5000.0, np.float32)
    for depth, depth_range in [(close, (0.001, 0.1)), (far, (1, 9000))]:
        assert labels(DepthImageProcessorPil(do_resize=False, depth_range=depth_range), depth).all()
        with pytest.raises(ValueError, match="declared unit"):
            labels(DepthImageProcessorPil(do_resize=False), depth)


def test_a_map_without_a_measurement_passes(millimetres):
    assert not labels(millimetres, np.zeros((24, 40), np.uint16)).any()
    assert not labels(millimetres, np.full((24, 40), np.nan), depth_range=(1, 2)).any()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor_class", BACKENDS)
@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (MILLIMETRES[:20], {}, "image 24x40 and depth map 20x40"),
        ([MILLIMETRES, MILLIMETRES], {}, "1 images and 2 depth maps"),
        (IMAGE, {}, "mode 'RGB'"),
        (IMAGE.convert("P"), {}, "mode 'P'"),
        (np.zeros((24, 40, 3), np.uint8), {}, "24 depth maps"),
        ([np.zeros((24, 40, 1), np.uint8)], {}, r"\(24, 40, 1\)"),
        (np.zeros((24, 40), bool), {}, "bool"),
        (np.zeros((24, 40), complex), {}, "complex"),
        ([np.full((24, 40), None)], {}, "object"),
        (np.zeros((0, 40), np.float32), {}, r"\(0, 40\)"),
        (MILLIMETRES, {"depth_scale": 0.0}, "positive depth_scale"),
        (MILLIMETRES, {"depth_offset": float("nan")}, "finite depth_offset"),
        (MILLIMETRES, {"depth_range": (5, 1)}, "nearest, farthest"),
        (MILLIMETRES, {"depth_range": (1,)}, "nearest, farthest"),
        (MILLIMETRES, {"depth_resample": "cubic"}, r"'cubic'; known: \['bilinear', 'nearest'\]"),
        (MILLIMETRES, {"do_pad": True}, "DepthAugmentation"),
    ],
)
def test_bad_input_is_refused(processor_class, depth, options, message):
    with pytest.raises(ValueError, match=message):
        processor_class(do_resize=False, depth_scale=0.001)(IMAGE, depth, **options)


@pytest.mark.parametrize("options", [{"depth_scale": -1}, {"depth_range": [3, 2]}, {"depth_resample": "area"}])
def test_bad_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match="depth_"):
        DepthImageProcessorPil(**options)


def test_bad_files_are_refused_and_named(tmp_path, millimetres):
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", depth=MILLIMETRES)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    np.save(tmp_path / "short.npy", MILLIMETRES)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-100])
    with open(tmp_path / "huge.npy", "wb") as file:  # promises 200 TB
        header = {"descr": "<u2", "fortran_order": False, "shape": (10**7, 10**7)}
        np.lib.format.write_array_header_1_0(file, header)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "empty.png").write_bytes(b"")
    PIL.Image.fromarray(MILLIMETRES).save(tmp_path / "short.png")
    (tmp_path / "short.png").write_bytes((tmp_path / "short.png").read_bytes()[:300])
    IMAGE.convert("L").save(tmp_path / "lossy.jpg")
    IMAGE.save(tmp_path / "colour.png")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=path.name):
            labels(millimetres, path)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        labels(millimetres, tmp_path / "none.png")


# --- saving and post-processing --------------------------------------------------------------------------------------

SETTINGS = {"depth_scale": 0.001, "depth_offset": 0.5, "invalid_depth": None, "depth_range": (0.5, 9), "size": 40}


@pytest.mark.parametrize("backend", ["pil", pytest.param("torchvision", marks=needs_torchvision), None])
def test_the_auto_class_opens_a_saved_processor_of_the_right_task(tmp_path, backend):
    torchvision = backend == "torchvision" or (backend is None and is_torchvision_available())
    DepthImageProcessorPil(**SETTINGS).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is (DepthImageProcessor if torchvision else DepthImageProcessorPil)
    assert (loaded.depth_scale, loaded.depth_offset, loaded.invalid_depth) == (0.001, 0.5, None)
    assert tuple(loaded.depth_range) == (0.5, 9) and loaded.size["height"] == 40
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "preprocessor_config.json").read_text() == (
        tmp_path / "preprocessor_config.json"
    ).read_text()
    SegmentationImageProcessorPil().save_pretrained(tmp_path)
    assert "Segmentation" in type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)).__name__


def test_the_torchvision_processor_says_what_to_use_without_torchvision():
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ImportError, match="DepthImageProcessorPil"):
        DepthImageProcessor()


def test_post_processing_cuts_the_padding_off(millimetres):
    """A model that returns the padded labels gives the depth back at the original size."""
    millimetres.size_divisor = 14
    out = millimetres(IMAGE, MILLIMETRES, return_tensors="pt")
    assert out["labels"].shape == (1, 28, 42)
    outputs = DepthEstimatorOutput(predicted_depth=out["labels"])
    (found,) = millimetres.post_process_depth_estimation(outputs, [(24, 40)])
    np.testing.assert_array_equal(found["predicted_depth"], out["labels"][0, 2:26, 1:41])
    (kept,) = millimetres.post_process_depth_estimation(outputs)
    assert kept["predicted_depth"].shape == (28, 42)
    with pytest.raises(ValueError, match="2 for 1 images"):
        millimetres.post_process_depth_estimation(outputs, [(4, 4)] * 2)
    with pytest.raises(ValueError, match=r"\(1, 1, 28, 42\)"):
        millimetres.post_process_depth_estimation(DepthEstimatorOutput(predicted_depth=out["labels"][:, None]))


def test_the_pipeline_gives_depth_at_the_size_of_the_image():
    from transformers import DPTConfig, DPTForDepthEstimation
    from transformers.pipelines.depth_estimation import DepthEstimationPipeline

    tiny = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    tiny |= {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "image_size": 32, "patch_size": 8}
    config = DPTConfig(**tiny, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3])
    processor = DepthImageProcessorPil(size={"height": 32, "width": 32})
    found = DepthEstimationPipeline(DPTForDepthEstimation(config).eval(), image_processor=processor)(IMAGE)
    assert found["predicted_depth"].shape == (24, 40) and found["depth"].size == (40, 24)
