"""The weight of a linear layer where a formula reads it instead of calling the layer."""

from torch import Tensor, nn


def weight_of(linear: nn.Linear) -> Tensor:
    """(out features, in features), in floating point also where it is stored in int8."""
    weight = linear.weight
    stored_otherwise = type(weight).dequantize is not Tensor.dequantize
    return weight.dequantize() if stored_otherwise else weight
