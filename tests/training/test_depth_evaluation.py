"""Evaluation of a depth model: protocol, mirrored images, windows, modes, bad input."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vitweave.training.depth_evaluation import evaluate_depth, predict_depth
from vitweave.training.depth_metrics import DepthMetrics
from vitweave.training.depth_protocols import DEPTH_PROTOCOLS


class TinyDepth(nn.Module):
    """Depth from a convolution that is not symmetric, at the size of the input."""

    def __init__(self, kernel: int = 3):
        super().__init__()
        self.layer, self.dropout = nn.Conv2d(3, 1, kernel, padding=kernel // 2), nn.Dropout(0.5)
        self.batches = []

    def forward(self, pixel_values):
        self.batches.append(len(pixel_values))
        depth = self.dropout(self.layer(pixel_values)[:, 0])
        return SimpleNamespace(predicted_depth=depth.exp())


def items(count=5, label_size=(16, 24)):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 16, 24, generator=generator),
            "labels": torch.rand(label_size, generator=generator) * 5 - 0.5,
        }
        for _ in range(count)
    ]


def test_the_figures_are_those_of_the_metrics_and_the_modes_come_back():
    model, dataset = TinyDepth().train(), items()
    dataset[3]["labels"].zero_()
    model.dropout.eval()
    found = evaluate_depth(model, dataset, "nyu", batch_size=2, progress=False)
    assert model.training and not model.dropout.training and model.batches == [2, 2, 1]
    metrics = DepthMetrics("nyu")
    for item in dataset:
        metrics.update(predict_depth(model.eval(), item["pixel_values"][None]), item["labels"][None])
    assert found.keys() == metrics.compute().keys()
    assert (found["protocol"], found["images"], found["images_without_depth"]) == ("nyu", 4, 1)
    assert found["abs_rel"] == pytest.approx(metrics.compute()["abs_rel"], rel=1e-5)


def test_flipping_averages_with_the_mirrored_image():
    model, pixels = TinyDepth().eval(), items(1)[0]["pixel_values"][None]
    plain, mirrored = (model(pixel_values=p).predicted_depth for p in (pixels, pixels.flip(-1)))
    torch.testing.assert_close(predict_depth(model, pixels, flip=True), (plain + mirrored.flip(-1)) / 2)
    both = predict_depth(model, torch.cat([pixels, pixels.flip(-1)]), flip=True)
    torch.testing.assert_close(both[0], both[1].flip(-1))  # the flipped average does not care which one was given
    flipped = evaluate_depth(model, items(2), DEPTH_PROTOCOLS["nyu"].variant(flip=True), progress=False)
    assert flipped["protocol"] == "nyu_flip"
    assert flipped["abs_rel"] != evaluate_depth(model, items(2), "nyu", progress=False)["abs_rel"]


def test_windows_give_the_whole_of_a_pointwise_model():
    model, pixels = TinyDepth(kernel=1).eval(), items(1)[0]["pixel_values"][None]
    whole = predict_depth(model, pixels)
    for options in ({"window": 10}, {"window": (8, 12), "stride": (4, 5)}, {"window": 10, "flip": True}):
        torch.testing.assert_close(predict_depth(model, pixels, **options), whole)


def test_predictions_are_brought_to_the_size_of_the_labels():
    found = evaluate_depth(TinyDepth(), items(2, label_size=(32, 48)), "nyu_eigen", progress=False)
    assert found["images"] == 2 and found["abs_rel"] > 0


def test_a_stock_model_can_be_measured():
    from transformers import DPTConfig, DPTForDepthEstimation

    tiny = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
    tiny |= {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "image_size": 16, "patch_size": 8}
    model = DPTForDepthEstimation(DPTConfig(**tiny, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3]))
    dataset = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.rand(16, 16) + 1} for _ in range(2)]
    found = evaluate_depth(model, dataset, "affine_invariant_disparity", progress=False)
    assert 0 < found["abs_rel"] < 1 and found["images"] == 2


def test_bad_calls_are_refused():
    model, dataset = TinyDepth(), items(2)
    with pytest.raises(ValueError, match="known"):
        evaluate_depth(model, dataset, "nyu_v2")
    augmented = SimpleNamespace(augmentation=object())
    with pytest.raises(ValueError, match="augmentation=None"):
        evaluate_depth(model, augmented)
    model.config = SimpleNamespace(depth_target="disparity")
    with pytest.raises(ValueError, match="the model returns disparity, the protocol 'nyu' expects metres"):
        evaluate_depth(model, dataset, "nyu")
    assert evaluate_depth(model, dataset, "affine_invariant_disparity", progress=False)["images"] == 2
    del model.config
    dataset[1]["pixel_values"], dataset[1]["labels"] = torch.zeros(3, 8, 8), torch.zeros(8, 8)
    with pytest.raises(ValueError, match="batch size 1"):
        evaluate_depth(model, dataset, "nyu", progress=False)
    assert evaluate_depth(model, dataset, "nyu", batch_size=1, progress=False)["images_without_depth"] == 1
