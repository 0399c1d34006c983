"""Pictures of translations: a column per sensor, the drawn and the real image."""

import numpy as np
import PIL.Image
import torch
from modality_translators import tiny_generator

from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.translation_data import TranslationDataset, translate_modalities
from vitweave.training.translation_pictures import painted, write_translations

SENSORS = {"rgb": {"encoding": "rgb"}, "thermal": {"encoding": "thermal", "value_range": [0, 40]}}
DEPTH = {"encoding": "metres", "value_range": [0, 10], "invalid": 0}


def test_a_row_shows_sensors_drawing_and_truth(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    depth = np.full((32, 48), 7.5, dtype=np.float32)
    depth[:, :24] = 0  # not measured
    both = {"rgb": rgb, "thermal": np.full((32, 48), 10, dtype=np.float32), "depth": depth}
    samples = [{"images": both}, {"images": both | {"thermal": None}}]
    dataset = TranslationDataset(samples, ModalityImageProcessorPil(SENSORS), "depth", DEPTH)
    model = tiny_generator(list(SENSORS)).train()
    write_translations(tmp_path / "drawn.png", model, dataset, height=32, gap=2)
    assert model.training
    sheet = np.asarray(PIL.Image.open(tmp_path / "drawn.png")).astype(int)
    assert sheet.shape == (2 * (32 + 2) + 14, 4 * (48 + 2) - 2, 3)
    assert np.abs(sheet[:32, :48] - rgb).max() <= 1
    assert (sheet[2:30, 52:96] == 64).all() and (sheet[36:64, 52:96] == 255).all()  # 10 of 40 degrees; absent
    assert (sheet[2:30, 152:170] == 255).all() and (sheet[2:30, 176:196] == 191).all()  # unmeasured; 7.5 of 10 m
    item = dataset[0]
    seen = {name: item[name][None] for name in ("pixel_values", "modality_mask")}
    with torch.no_grad():
        drawn = np.asarray(painted(model.eval()(**seen).reconstruction[0]))
    assert np.abs(sheet[:32, 100:148] - drawn).max() <= 1
    write_translations(tmp_path / "half.png", model.bfloat16(), dataset, height=32, gap=2)
    half = np.asarray(PIL.Image.open(tmp_path / "half.png")).astype(int)
    assert np.abs(half[:32, 100:148] - drawn).mean() < 3
    image = translate_modalities(model, dataset.processor, **{name: both[name] for name in SENSORS})
    assert image.dtype == torch.float32 and image.shape == (3, 32, 48)
