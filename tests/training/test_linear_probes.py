"""The grid of probes: the same as training one by one, bookkeeping, and a probe that becomes a model."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    MobileNetV2Config,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.processing.crop_augmentation import ClassificationAugmentation
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.linear_probes import (
    LinearProbes,
    ProbeFigure,
    probe_kinds,
    rank,
    shuffled_batches,
    train_grids,
    train_linear_probes,
)
from vitweave.training.probe_classifier import probe_classifier
from vitweave.training.synthetic_classes import SyntheticClasses

PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TINY = {**SMALL, "image_size": 32, "patch_size": 8}
QUICK = {"steps": 20, "rates": (1e-2, 1e-1), "progress": False}


def tiny_encoder(config=None):
    torch.manual_seed(0)
    return VisionEncoder(config or ViTConfig(**TINY))


def data(length=12, seed=0, **options):
    return ImageClassificationDataset(SyntheticClasses(length, seed=seed), PROCESSOR, **options)


def test_the_grid_is_what_training_one_by_one_gives():
    torch.manual_seed(0)
    inputs, labels = {"a": torch.randn(40, 6), "b": torch.randn(40, 9)}, torch.randint(3, (40,))
    rates, options = (1e-3, 0.1, 5.0), {"steps": 30, "batch_size": 16, "seed": 4}
    grids = train_grids(inputs, labels, 3, rates, progress=False, **options)
    start = train_grids(inputs, labels, 3, rates, progress=False, **{**options, "steps": 1})
    generator = torch.Generator().manual_seed(4)
    for name, given in inputs.items():
        weights = torch.empty(3, 3, given.shape[1]).normal_(std=0.01, generator=generator)
        for index, rate in enumerate(rates):
            head = nn.Linear(given.shape[1], 3)
            head.weight.data.copy_(weights[index])
            nn.init.zeros_(head.bias)
            optimizer = torch.optim.SGD(head.parameters(), lr=rate * 16 / 256, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
            for rows in shuffled_batches(40, **{**options, "seed": 4}):
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(given[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(grids[name].weight[index], head.weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grids[name].bias[index], head.bias, rtol=1e-4, atol=1e-5)
        assert not torch.equal(grids[name].weight, start[name].weight)


def test_weights_start_at_a_hundredth():
    grid = train_grids({"a": torch.zeros(4, 512)}, torch.tensor([0, 1, 0, 1]), 2, steps=1, progress=False)["a"]
    assert grid.weight.std().item() == pytest.approx(0.01, rel=0.05) and grid.weight.shape == (13, 2, 512)


def test_every_image_comes_once_before_any_comes_again():
    batches = list(shuffled_batches(10, 4, 5, seed=1))
    assert [len(batch) for batch in batches] == [4] * 5
    seen = torch.cat(batches)
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_all_kinds_are_ranked_saved_and_loaded(tmp_path):
    probes = train_linear_probes(tiny_encoder(), data(), data(6, seed=1), tmp_path, **QUICK)
    assert len(probes.figures) == 2 * 2 * 2 and probes.best == max(probes.figures, key=lambda f: (f.accuracy, -f.loss))
    widths = {name: weight.shape for name, (weight, _) in probes.heads.items()}
    assert widths == {"last1": (3, 16), "last1_avgpool": (3, 32), "last4": (3, 64), "last4_avgpool": (3, 80)}
    record = json.loads((tmp_path / "probe.json").read_text())
    assert record["best"]["accuracy"] == probes.best.accuracy and record["id2label"]["2"] == "cross"
    loaded = LinearProbes.load(tmp_path)
    assert loaded.figures == probes.figures and loaded.id2label == SyntheticClasses.id2label
    assert all(torch.equal(a, b) for n in widths for a, b in zip(loaded.heads[n], probes.heads[n], strict=True))
    with pytest.raises(ValueError, match=r"no probe last2; known: \['last1'"):
        loaded.best_of(2, False)


def test_a_diverged_probe_is_never_the_best():
    diverged, poor = ProbeFigure(1, False, 1.0, 0.9, float("nan")), ProbeFigure(1, False, 0.1, 0.3, 1.0)
    assert sorted([diverged, poor], key=rank)[0] is poor


@pytest.mark.parametrize(
    "config",
    [
        MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32),
        ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, patch_size=4, window_size=4),
        SiglipVisionConfig(**TINY),
    ],
    ids=lambda config: config.model_type,
)
def test_encoders_without_class_token_are_probed_on_their_pooled_output(config):
    encoder = tiny_encoder(config)
    probes = train_linear_probes(encoder, data(), data(6, seed=1), **QUICK)
    assert {figure.kind.name for figure in probes.figures} == {"last1"}
    assert probes.heads["last1"][0].shape == (3, encoder.facts.pooled_size)


@pytest.mark.parametrize(
    ("config", "avgpool"),
    [
        (ViTConfig(**TINY), True),
        (ViTConfig(**TINY), False),
        (Dinov2Config(**{**SMALL, "image_size": 32, "patch_size": 8}), True),
        (CLIPVisionConfig(**TINY), False),
        (SpecializedViTConfig(**TINY, num_register_tokens=2, specialize_final_norm=True), True),
        (SpecializedViTConfig(**TINY, use_pooler=True), False),
    ],
)
def test_a_probe_becomes_a_model_with_its_logits(config, avgpool, tmp_path):
    encoder = tiny_encoder(config).eval()
    held_out = data(6, seed=1)
    probes = train_linear_probes(encoder, data(), held_out, layer_counts=(1,), **QUICK)
    model = probe_classifier(encoder, probes, avgpool)
    pixels = torch.stack([item["pixel_values"] for item in held_out])
    with torch.no_grad():
        found = encoder(pixels)
        parts = [found.cls[-1], found.patches[-1].mean(dim=1)] if avgpool else [found.cls[-1]]
        weight, bias = probes.heads["last1_avgpool" if avgpool else "last1"]
        torch.testing.assert_close(model(pixels).logits, torch.cat(parts, dim=1) @ weight.T + bias)
        accuracy = (model(pixels).logits.argmax(dim=1) == torch.tensor([0, 1, 2, 0, 1, 2])).float().mean().item()
        assert accuracy == pytest.approx(probes.best_of(1, avgpool).accuracy)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits)
    assert again.config.id2label == SyntheticClasses.id2label


def test_probes_that_fit_no_classifier_are_refused():
    probes = train_linear_probes(tiny_encoder(), data(), data(6, seed=1), layer_counts=(4,), **QUICK)
    with pytest.raises(ValueError, match=r"last layer alone, got \['last4'"):
        probe_classifier(tiny_encoder(), probes)
    encoder = tiny_encoder(CLIPVisionConfig(**TINY))
    probes = train_linear_probes(encoder, data(), data(6, seed=1), layer_counts=(1,), **QUICK)
    with pytest.raises(ValueError, match="final norm of clip_vision_model is for its pooled output only"):
        probe_classifier(encoder, probes, avgpool=True)
    encoder = tiny_encoder(BeitConfig(**TINY, use_mean_pooling=True))
    probes = train_linear_probes(encoder, data(), data(6, seed=1), layer_counts=(1,), **QUICK)
    with pytest.raises(ValueError, match="that pools it"):
        probe_classifier(encoder, probes, avgpool=False)


def test_the_encoder_is_left_as_it_was():
    encoder = tiny_encoder(MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    train_linear_probes(encoder, data(), data(6, seed=1), **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())


def test_bad_input_is_refused():
    encoder = tiny_encoder()
    with pytest.raises(ValueError, match="1 to 4 layers, got 5"):
        train_linear_probes(encoder, data(), data(seed=1), layer_counts=(5,), **QUICK)
    augmented = data(augmentation=ClassificationAugmentation(32))
    with pytest.raises(ValueError, match="augmentation=None"):
        train_linear_probes(encoder, augmented, data(seed=1), **QUICK)
    renamed = data(seed=1, id2label={0: "square", 1: "disc", 2: "cross"})
    with pytest.raises(ValueError, match="one id2label in all parts"):
        train_linear_probes(encoder, data(), renamed, **QUICK)
    one_class = [dict(SyntheticClasses(9)[index]) for index in (0, 3, 6)]
    with pytest.raises(ValueError, match="at least two classes"):
        train_linear_probes(encoder, ImageClassificationDataset(one_class, PROCESSOR), data(seed=1), **QUICK)
    with pytest.raises(ValueError, match="empty dataset"):
        train_linear_probes(encoder, data(0), data(seed=1), **QUICK)
    assert [kind.name for kind in probe_kinds(encoder, (4, 1, 1), (True,))] == ["last1_avgpool", "last4_avgpool"]
