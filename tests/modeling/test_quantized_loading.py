"""int8 weights on loading, for one model of each family, on a CPU and without a compiler."""

import pytest
import torch
from distributed_heads import HEADS, build
from torch import Tensor, nn

METHODS = {"torchao": "torchao", "quanto": "optimum.quanto"}


def int8_of(method: str):
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def stirred(name: str) -> nn.Module:
    model = build(name).eval()
    for parameter in model.parameters():  # what starts at zero would hide mistakes
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


def answer(model: nn.Module, name: str) -> Tensor:
    inputs = {key: value for key, value in HEADS[name].batch(0).items() if key not in ("labels", "num_items_in_batch")}
    with torch.no_grad():
        outputs = model(**inputs)
    for key in ("logits", "predicted_depth", "logits_per_image"):
        if outputs.get(key) is not None:
            return outputs[key]
    raise AssertionError(sorted(outputs))


def quantized_linears(model: nn.Module) -> set[str]:
    """The linear layers whose weight is no plain floating-point tensor any more."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data) is not Tensor
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HEADS)
def test_int8_weights_load_and_run(name, method, tmp_path):
    pytest.importorskip(METHODS[method], reason=f"needs {METHODS[method]}")
    model = stirred(name)
    model.save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path, quantization_config=int8_of(method)).eval()
    linears = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(quantized_linears(small)) >= 0.8 * len(linears)  # a head may stay as it is
    expected, found = answer(model, name), answer(small, name)
    spread = (expected - expected.mean()).abs().max()
    difference = (found - expected).abs().max() / spread
    assert 0 < difference < 0.05
