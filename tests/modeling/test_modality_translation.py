"""Image-to-image models of several sensors: shapes, absent sensors, losses, and the adversarial pair."""

import copy

import pytest
import torch
from modality_translators import (
    PYRAMIDS,
    pyramid_generator,
    sensor_images,
    target_images,
    tiny_generator,
    translation_config,
)
from model_checks import check_saved_and_loaded_equal
from transformers import AutoModel, AutoModelForImageToImage, SegformerConfig, SegformerModel, set_seed

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modeling_modality_translation import (
    ModalityAdversarialTranslator,
    ModalityDiscriminator,
    ModalityFusionForImageToImage,
)


@pytest.mark.parametrize("size", [(32, 48), (33, 46)])
def test_images_have_the_size_of_the_sensors(size):
    output = tiny_generator()(sensor_images(size=size), output_hidden_states=True)
    assert output.reconstruction.shape == (2, 3, *size)
    assert output.modality_reconstructions.shape == (2, 2, 3, *size)
    assert output.reconstruction.abs().max() < 1 and output.reconstruction.std() > 0
    assert [tuple(states.shape[:3]) for states in output.hidden_states] == [(2, 2, 32), (2, 2, 32), (2, 2, 64)]
    mean = output.modality_reconstructions.mean(dim=1)
    torch.testing.assert_close(output.reconstruction, mean)  # the ensemble's weights start equal


def test_the_last_block_of_every_stage_fuses_unless_the_config_says_otherwise():
    config = translation_config()
    model = ModalityFusionForImageToImage(config)
    model(sensor_images())
    assert list(model.exchange_ratios) == ["stage1.block1", "stage2.block0", "stage3.block0"]
    assert model.config.fusion_blocks == [1, 1, 1] and config.fusion_blocks is None
    one = tiny_generator(fusion_blocks=[2, 0, 0])
    one(sensor_images())
    assert list(one.exchange_ratios) == ["stage1.block0", "stage1.block1"]
    gemini = tiny_generator(fusion_type="gemini")
    fusing = [[block.fusion is not None for block in stage.blocks] for stage in gemini.modality_fusion.streams.stages]
    assert fusing == [[False, True], [True], [True]]


@pytest.mark.parametrize("blocks", [[1, 1], [3, 1, 1], [0, 0, 0], 9])
def test_counts_of_fusing_blocks_that_do_not_fit_are_refused(blocks):
    with pytest.raises(ValueError, match="fusion_blocks"):
        tiny_generator(fusion_blocks=blocks)


@pytest.mark.parametrize("fusion", ["token_exchange", "gemini", "addition"])
def test_an_absent_sensor_is_not_read(fusion):
    model = tiny_generator(("rgb", "depth", "event"), fusion_type=fusion)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    images, labels, found = sensor_images(modalities=3), target_images(), []
    for content in (0.5, -2.0, float("nan")):
        given = images.clone()
        given[0, 1] = content
        output = model(given, mask, labels)
        model.zero_grad()
        output.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([output.reconstruction, output.modality_reconstructions, output.loss, *gradients])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    assert not found[0][1][0, 1].any() and found[0][1][0, 0].any()


def test_one_sensor_alone_and_one_image_alone():
    model, images = tiny_generator(), sensor_images()
    mask = torch.tensor([[True, False], [True, True]])
    output = model(images, mask)
    torch.testing.assert_close(output.reconstruction[0], output.modality_reconstructions[0, 0])
    alone = model(images[1:], mask[1:]).reconstruction
    torch.testing.assert_close(alone, output.reconstruction[1:], atol=2e-6, rtol=0)
    single = tiny_generator(("depth",), fusion_type=None)
    assert single(images[:, :1], labels=target_images()).loss.isfinite()


def test_the_loss_is_l1_of_every_image_and_the_penalty():
    model, labels = tiny_generator(), target_images()
    labels[0, :, :5] = float("nan")
    output = model(sensor_images(), labels=labels)
    drawn = [*output.modality_reconstructions.unbind(dim=1), output.reconstruction]
    wanted = sum((images - labels).abs().nanmean() for images in drawn)
    torch.testing.assert_close(output.loss, 100 * wanted + 1e-3 * output.penalty)
    mask = torch.tensor([[True, False], [True, True]])
    output = model(sensor_images(), mask, labels)
    drawn = output.modality_reconstructions
    wanted = (drawn[:, 0] - labels).abs().nanmean() + (drawn[1, 1] - labels[1]).abs().mean()
    wanted = wanted + (output.reconstruction - labels).abs().nanmean()
    torch.testing.assert_close(output.loss, 100 * wanted + 1e-3 * output.penalty)
    nothing = torch.full_like(labels, float("nan"))
    assert model(sensor_images(), labels=nothing).loss == 1e-3 * model(sensor_images()).penalty


def test_every_parameter_learns_and_images_come_nearer():
    model, images, labels = tiny_generator(fusion_options={"threshold": 0.5}), sensor_images(), target_images()
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        if step == 0:
            idle = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.any()]
            # two equal scales of one softmax: keys' biases and the shift of the last score cancel
            assert all(name.endswith("k_proj.bias") for name in idle), idle
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = tiny_generator().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(sensor_images(), labels=target_images()).loss.backward()
        found.append([part.grad for part in model.parameters()])
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_saved_and_loaded(tmp_path):
    model = tiny_generator(fusion_type="gemini")
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    auto = AutoModelForImageToImage.from_pretrained(tmp_path)
    assert type(auto) is ModalityFusionForImageToImage and auto.config.fusion_blocks == [1, 1, 1]
    images = sensor_images()
    assert torch.equal(loaded.eval()(images).reconstruction, model(images).reconstruction)
    assert torch.equal(auto.eval()(images).reconstruction, model(images).reconstruction)


@pytest.mark.slow
def test_compiled_and_half_precision():
    model, images = tiny_generator(), sensor_images()
    mask = torch.tensor([[True, False], [True, True]])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, mask).reconstruction, model(images, mask).reconstruction)
    half = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16()).reconstruction
    assert half.dtype == torch.bfloat16
    assert (half.float() - model(images).reconstruction).abs().mean() < 0.05


def test_a_pretrained_encoder_draws_too():
    set_seed(0)
    sizes = {"hidden_sizes": [32, 32, 64, 64], "num_attention_heads": [1, 1, 2, 2], "depths": [1] * 4}
    encoder = SegformerModel(SegformerConfig(**sizes, sr_ratios=[2, 1, 1, 1]))
    model = ModalityFusionForImageToImage.from_encoder(encoder, modalities=["rgb", "thermal"], fusion_type="gemini")
    assert model(sensor_images(size=(40, 64))).reconstruction.shape == (2, 3, 40, 64)
    own, theirs = model.modality_fusion.streams.stages[0].patch_embeddings.proj, encoder.state_dict()
    assert any(torch.equal(own.weight, tensor) for tensor in theirs.values())


def test_what_cannot_be_built_or_drawn_is_refused():
    with pytest.raises(ValueError, match="drawn over its own pixels"):
        pyramid_generator("vit", ("rgb", "depth", "event"), auxiliary="max")
    with pytest.raises(ValueError, match=r"the decoder of images.*fusion_size"):
        pyramid_generator("vit", decoder_options={"fusion_size": 8})
    odd = SegformerConfig(hidden_sizes=[34, 32, 64, 64], num_attention_heads=[1, 1, 2, 2])
    with pytest.raises(ValueError, match="cannot be taken back"):
        ModalityFusionForImageToImage(ModalityFusionConfig(stream_config=odd, fusion_type=None))
    with pytest.raises(ValueError, match="expected labels"):
        tiny_generator()(sensor_images(), labels=target_images(size=(16, 16)))
    with pytest.raises(ValueError, match="auxiliary"):
        ModalityAdversarialTranslator(translation_config(("rgb", "depth", "event"), auxiliary="max"))


# Over encoders that cannot be run backwards ---------------------------------------------------------------------------

every_pyramid = pytest.mark.parametrize("stream", PYRAMIDS)


@every_pyramid
@pytest.mark.parametrize("size", [(32, 48), (40, 33)])
def test_pyramids_draw_at_the_size_of_the_sensors(stream, size):
    model, images = pyramid_generator(stream), sensor_images(size=size)
    output = model(images)
    assert output.modality_reconstructions.shape == (2, 2, 3, *size)
    assert output.reconstruction.abs().max() < 1 and output.reconstruction.std() > 0
    assert all(name.endswith("block0") for name in model.exchange_ratios) and model.config.fusion_blocks[0] == 1
    torch.testing.assert_close(model(images.flatten(1, 2)).reconstruction, output.reconstruction)  # side by side
    alone = model(images[1:]).reconstruction
    torch.testing.assert_close(alone, output.reconstruction[1:], atol=2e-6, rtol=0)


@every_pyramid
def test_pyramids_do_not_read_an_absent_sensor(stream):
    model = pyramid_generator(stream, fusion_type="gemini")
    mask, images, found = torch.tensor([[True, False], [True, True]]), sensor_images(), []
    for content in (0.5, float("nan")):
        images[0, 1] = content
        model.zero_grad()
        output = model(images, mask, target_images())
        output.loss.backward()
        gradients = [part.grad for part in model.parameters() if part.grad is not None]
        found.append([output.reconstruction, output.modality_reconstructions, output.loss, *gradients])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert not found[0][1][0, 1].any() and found[0][1][0, 0].any()


@every_pyramid
def test_pyramids_learn_with_every_parameter(stream):
    model, images = pyramid_generator(stream, fusion_type="gemini"), sensor_images()
    labels = images.mean(dim=1).tanh()
    optimizer = torch.optim.Adam(model.train().parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = model(images, labels=labels).loss
        loss.backward()
        if step == 1:  # the fusion starts as the identity
            idle = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.any()]
            assert all(name.endswith("k_proj.bias") for name in idle), idle
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@every_pyramid
def test_pyramids_are_saved_halved_and_compiled(stream, tmp_path):
    model, images = pyramid_generator(stream, fusion_type="gemini"), sensor_images()
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    assert torch.equal(loaded.eval()(images).reconstruction, model(images).reconstruction)
    assert torch.equal(AutoModelForImageToImage.from_pretrained(tmp_path).eval()(images)[0], model(images)[0])
    half = copy.deepcopy(model).to(torch.bfloat16)(images.bfloat16()).reconstruction
    assert (half.float() - model(images).reconstruction).abs().mean() < 0.05
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images).reconstruction, model(images).reconstruction)


@every_pyramid
def test_a_pretrained_encoder_becomes_a_pyramid(stream):
    set_seed(0)
    encoder = AutoModel.from_config(PYRAMIDS[stream]())
    options = {"modalities": ["thermal"], "fusion_type": None, "decoder_hidden_size": 16}
    model = ModalityFusionForImageToImage.from_encoder(encoder, **options).eval()
    own, theirs = ([t for t in each.state_dict().values() if t.ndim == 4] for each in (model, encoder))
    assert any(torch.equal(one, two) for one in own for two in theirs if one.shape == two.shape)  # embeds patches
    assert model(sensor_images(modalities=1)).reconstruction.shape == (2, 3, 32, 48)


@every_pyramid
def test_pyramids_train_against_a_discriminator(stream):
    both = ModalityAdversarialTranslator.around(pyramid_generator(stream)).train()
    loss = both(sensor_images(), labels=target_images()).loss
    loss.backward()
    assert loss.isfinite() and both.discriminator.score.weight.grad.any()
    assert not any(part.fusion for part in both.discriminator.streams.stages)


# Discriminator --------------------------------------------------------------------------------------------------------


def test_discriminator_scores_every_present_sensor():
    set_seed(0)
    model = ModalityDiscriminator(translation_config()).eval()
    mask = torch.tensor([[True, False], [True, True]])
    images, found = sensor_images(), []
    for content in (0.0, float("nan")):
        images[0, 1] = content
        found.append(model(images, target_images(), mask))
    assert found[0].shape == (2, 2, 4, 6) and torch.equal(*found)
    assert not found[0][0, 1].any() and found[0][0, 0].any()
    logits = torch.tensor([[2.0, 0.0], [-1.0, 3.0]])[..., None, None].expand(2, 2, 4, 6)
    softplus = torch.nn.functional.softplus
    wanted = softplus(torch.tensor([-2.0, 1.0])).mean() + softplus(torch.tensor(-3.0))
    torch.testing.assert_close(model.loss(logits, True, mask), wanted)
    wanted = softplus(torch.tensor([2.0, -1.0])).mean() + softplus(torch.tensor([0.0, 3.0])).mean()
    torch.testing.assert_close(model.loss(logits, False), wanted)


def gradients_of(loss: torch.Tensor, model: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    names, parts = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parts, allow_unused=True)
    return {f"{prefix}{name}": part for name, part in zip(names, found, strict=True)}


def test_each_side_learns_from_its_own_loss(tmp_path):
    """The gradients are those of two separate steps with the other network fixed."""
    generator = tiny_generator()
    both = ModalityAdversarialTranslator.around(generator).train()
    assert both.generator is generator
    images, labels = sensor_images(), target_images()
    both(images, labels=labels).loss.backward()
    found = {name: part.grad.clone() for name, part in both.named_parameters() if part.grad is not None}

    both.zero_grad()
    judge, output = both.discriminator, generator(images, labels=labels)
    drawn = output.modality_reconstructions
    passed = output.loss + judge.loss(judge(images, drawn), True)
    wanted = gradients_of(passed, generator, "generator.")
    told = judge.loss(judge(images, labels), True) + judge.loss(judge(images, drawn.detach()), False)
    wanted |= gradients_of(told / 2, judge, "discriminator.")
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
    assert {name.partition(".")[0] for name in found} == {"generator", "discriminator"}
    check_saved_and_loaded_equal(both, tmp_path)
    both.eval()
    assert both(images, labels=labels).loss == generator(images, labels=labels).loss
    with pytest.raises(ValueError, match="checkpointing"):
        both.gradient_checkpointing_enable()


def pair(**options) -> ModalityAdversarialTranslator:
    return ModalityAdversarialTranslator.around(tiny_generator(**options))


@pytest.mark.slow
def test_a_pair_trains_compiled_and_in_half_precision():
    images, labels = sensor_images(), target_images()
    mask = torch.tensor([[True, False], [True, True]])
    one = pair(fusion_type="gemini").train()
    two = copy.deepcopy(one)
    torch.compiler.reset()
    losses = []
    for run in (one, torch.compile(two, fullgraph=True, backend="eager")):
        losses.append(run(images, mask, labels).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, part), other in zip(one.named_parameters(), two.parameters(), strict=True):
        if part.grad is not None:
            torch.testing.assert_close(other.grad, part.grad, atol=1e-5, rtol=1e-3, msg=name)
    half = copy.deepcopy(one).to(torch.bfloat16)
    half.zero_grad()
    loss = half(images.bfloat16(), mask, labels.bfloat16()).loss
    loss.backward()
    torch.testing.assert_close(loss.float(), losses[0], atol=0, rtol=0.05)
    assert all(part.grad is None or part.grad.isfinite().all() for part in half.parameters())


def test_adapters_of_a_pair_learn_on_both_sides(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base, images, labels = pair(), sensor_images(), target_images()
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    for name, part in adapted.named_parameters():
        if "lora_B" in name:
            part.data += 0.1
    adapted(pixel_values=images, labels=labels).loss.backward()
    moved = {name.split(".")[2] for name, part in adapted.named_parameters() if part.grad is not None}
    assert moved == {"generator", "discriminator"}
    idle = [
        n for n, part in adapted.named_parameters() if part.requires_grad and (part.grad is None or not part.grad.any())
    ]
    assert not idle
    adapted.save_pretrained(tmp_path)
    changed = adapted.eval()(pixel_values=images).reconstruction
    assert not torch.allclose(changed, base.eval()(images).reconstruction)
    merged = PeftModel.from_pretrained(base, tmp_path).eval().merge_and_unload()
    torch.testing.assert_close(merged(images).reconstruction, changed, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_pair_is_exported_as_it_draws():
    model, images, mask = pair().eval(), sensor_images(), torch.tensor([[True, False], [True, True]])
    batch = torch.export.Dim("batch", min=1, max=8)
    shapes = {"pixel_values": {0: batch}, "modality_mask": {0: batch}}
    given = {"pixel_values": images, "modality_mask": mask}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes)
    more, present = sensor_images(3, seed=4), torch.tensor([[True, False], [True, True], [False, True]])
    found = program.module()(pixel_values=more, modality_mask=present)
    torch.testing.assert_close(found.reconstruction, model(more, present).reconstruction, atol=1e-5, rtol=1e-5)
