"""Pix2Struct's encoder on plain images, against its own image processor and model."""

import pytest
import torch
from tiny_encoders import CASES, build
from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration
from transformers.models.pix2struct.image_processing_pil_pix2struct import Pix2StructImageProcessorPil

from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.vision_encoder import VisionEncoder

NAME = "pix2struct_vision_model"
SHAPES = ((128, 128), (100, 180), (64, 24), (200, 40))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def native(model, processor, image: torch.Tensor) -> torch.Tensor:
    """(patches, hidden) of one image (3, height, width) in 0..255, without the padding."""
    inputs = processor([image], return_tensors="pt", input_data_format="channels_first")
    output = model(inputs["flattened_patches"], attention_mask=inputs["attention_mask"]).last_hidden_state
    return output[0, : int(inputs["attention_mask"].sum())]


def picture(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def facts_of(max_patches: int, patch: int = 16):
    config = build(NAME).config
    config.max_patches, config.patch_embed_hidden_size = max_patches, 3 * patch**2
    return encoder_facts(config)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_the_native_processor_and_model(shape):
    model, image = build(NAME), picture(shape)
    processor = Pix2StructImageProcessorPil(max_patches=24, patch_size={"height": 8, "width": 8})
    features = VisionEncoder(model)(image[None].float())
    expected = native(model, processor, image.numpy())
    # the processor on PIL divides by the deviation without Bessel's correction, which small pictures show
    torch.testing.assert_close(features.patches[0][0], expected, rtol=0, atol=1e-3 if min(shape) < 64 else 2e-4)
    rows, columns = features.grids[0]
    assert rows * columns == len(expected) <= 24


@pytest.mark.torchvision
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_equals_the_native_processor_on_torchvision(shape):
    pytest.importorskip("torchvision", reason="needs torchvision")
    from transformers import Pix2StructImageProcessor

    model, image = build(NAME), picture(shape)
    processor = Pix2StructImageProcessor(max_patches=24, patch_size={"height": 8, "width": 8})
    features = VisionEncoder(model)(image[None].float())
    torch.testing.assert_close(features.patches[0][0], native(model, processor, image), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_common_range_of_the_channels_does_not_matter_but_that_of_each_does():
    encoder, image = VisionEncoder(build(NAME)), picture((64, 64))[None].double()
    encoder.to(torch.float64)
    expected = encoder(image).patches[0]
    torch.testing.assert_close(encoder(image / 255).patches[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder(3 * image - 7).patches[0], expected, rtol=1e-5, atol=1e-6)
    mean, std = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    clip = (image / 255 - mean) / std
    assert (encoder(clip).patches[0] - expected).abs().max() > 1e-2
    torch.testing.assert_close(encoder((clip * std + mean) * 255).patches[0], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    encoder, pixel_values = VisionEncoder(build(NAME)), picture((40, 64))[None].float() * torch.rand(3, 1, 1, 1)
    pixel_values[1] = 7.0  # flat: its deviation is zero
    together = encoder(pixel_values).patches[0]
    assert together.isfinite().all()
    torch.testing.assert_close(together[2:], encoder(pixel_values[2:]).patches[0], rtol=1e-4, atol=1e-5)


def test_grids_within_the_budget():
    facts = facts_of(2048)
    assert facts.grid_for(1024, 1024) == facts.grid_for(300, 300) == (45, 45)  # 2025 tokens, as EAGLE reads them
    rows, columns = facts.grid_for(600, 1200)
    assert (rows, columns) == (32, 64)
    assert facts.grid_for(16, 100_000) == (1, 2048)
    assert facts_of(1).grid_for(640, 480) == (1, 1)
    config = build(NAME).config
    del config.max_patches
    assert encoder_facts(config).max_patches == 2048


def test_the_encoder_of_a_whole_model_is_taken(tmp_path):
    text = {"hidden_size": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    host = Pix2StructForConditionalGeneration(Pix2StructConfig(vision_config=CASES[NAME], text_config=text))
    assert VisionEncoder(host).model is host.encoder
    host.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"AutoModel knows no 'pix2struct_vision_model'.*give that model"):
        VisionEncoder.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"fewer than seq_len=40 rows and columns, got 1x24|1x100"):
        model = build(NAME)
        model.config.max_patches = 100
        VisionEncoder(model)(torch.zeros(1, 3, 8, 1600))
    with pytest.raises(ValueError, match=r"patch_embed_hidden_size = 3 channels x side x side.*got 100"):
        VisionEncoder({"model_type": NAME, **CASES[NAME], "patch_embed_hidden_size": 100})
    with pytest.raises(ValueError, match="expected 3 image channels, got 1"):
        VisionEncoder(build(NAME))(torch.zeros(1, 1, 32, 32))
