"""The depth recipe on the real Trainer: what it returns, exact resume, images without depth, cached features."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForDepthEstimation, TrainerCallback

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.training.depth import train_depth
from vitweave.training.depth_data import DepthDataset
from vitweave.training.mirrored_samples import MirroredSamples
from vitweave.training.synthetic_shapes import SyntheticDepth

PROCESSOR = DepthImageProcessorPil(size=32)
FEW_STEPS = {
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "use_cpu": True,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


def tiny_model(**options):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    backbone = SpecializedViTConfig(**small, hidden_dropout_prob=0.1, out_indices=[1, 2], apply_layernorm=False)
    options = {"loss_options": {"sig": {"warm_up_steps": 4}}, "losses": {"sig": 1.0, "gradient": 0.5}} | options
    return DensePredictorForDepthEstimation(DensePredictorConfig(backbone_config=backbone, **options))


def data(length=5, seed=0):
    return DepthDataset(SyntheticDepth(length, seed=seed), PROCESSOR)


def run(folder, model=None, train=None, **options):
    return train_depth(model or tiny_model(), train or data(), data(3, 1), PROCESSOR, folder, **FEW_STEPS | options)


def test_metrics_carry_the_protocol_and_the_folder_opens_by_itself(tmp_path):
    metrics = run(tmp_path, protocol="nyu_eigen")
    assert {"train_loss", "loss", "nyu_eigen_abs_rel", "nyu_eigen_a1", "nyu_eigen_images"} <= metrics.keys()
    assert metrics["nyu_eigen_images"] == 3 and metrics["train_images_without_depth"] == 0
    model = AutoModelForDepthEstimation.from_pretrained(tmp_path).eval()
    pixels = torch.stack([data(3, 1)[index]["pixel_values"] for index in range(3)])
    with torch.no_grad():
        depth = model(pixels).predicted_depth
    truth = torch.stack([data(3, 1)[index]["labels"] for index in range(3)])
    rows, columns = slice(3, 31), slice(2, 30)  # the published crop at 32 x 32
    error = ((depth - truth).abs() / truth)[:, rows, columns].flatten(1).mean(1).mean()
    assert float(error) == pytest.approx(metrics["nyu_eigen_abs_rel"], rel=1e-4)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


@pytest.mark.slow
def test_a_broken_run_ends_with_the_same_bits(tmp_path):
    whole, broken, resumed = tiny_model(), tiny_model(), tiny_model()
    run(tmp_path / "whole", whole)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", broken, callbacks=[StopAt(5)])
    run(tmp_path / "broken", resumed, resume=True)
    expected = whole.state_dict()
    assert int(expected["criterion.terms.sig.training_steps"]) in (3, 6)  # the best checkpoint's
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())


class WithHoles(SyntheticDepth):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "depth": np.zeros_like(sample["depth"])} if index == 0 else sample


def test_images_without_depth_are_counted_and_harmless(tmp_path):
    model = tiny_model()
    metrics = run(tmp_path, model, DepthDataset(WithHoles(2), PROCESSOR), save_steps=6)
    assert metrics["train_images_without_depth"] == 6  # one in each of the six batches of two
    assert np.isfinite(metrics["train_loss"])
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("head_type", ["linear", "regression"])
def test_cached_features_train_the_same_weights(tmp_path, head_type):
    online, cached = (tiny_model(head_type=head_type, freeze_backbone=True) for _ in range(2))
    mirrored = DepthDataset(MirroredSamples(SyntheticDepth(5)), PROCESSOR)
    run(tmp_path / "online", online, mirrored)
    run(tmp_path / "cached", cached, mirrored, cache_features=tmp_path / "features")
    expected = online.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cached.state_dict().items())
    assert any((tmp_path / "features").rglob("*.safetensors"))


def test_mirrored_samples():
    samples = SyntheticDepth(3)
    both = MirroredSamples(samples)
    assert len(both) == 6
    np.testing.assert_array_equal(both[1]["depth"], samples[1]["depth"])
    np.testing.assert_array_equal(both[4]["depth"], samples[1]["depth"][:, ::-1])
    np.testing.assert_array_equal(np.array(both[4]["image"]), np.array(samples[1]["image"])[:, ::-1])
    with pytest.raises(IndexError):
        both[6]
