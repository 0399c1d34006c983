"""Projectors by name: what stands between the tokens of a vision tower and a language model."""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.modeling.options import check_options, pick


class IdentityProjector(nn.Module):
    """The tokens as they are."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        if in_features != out_features:
            raise ValueError(
                f"expected as many channels as asked for with the projector 'identity', got {in_features} instead of"
                f" {out_features}: take 'linear' or another projector"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class MlpProjector(nn.Module):
    """`mlpNx_gelu` of the LLaVA family: Linear, then N - 1 times GELU and Linear.

    The layers are `linear_1`, `linear_2`, ..., as in transformers' Llava.
    """

    def __init__(self, in_features: int, out_features: int, *, depth: int):
        super().__init__()
        if depth < 1:
            raise ValueError(f"expected a projector of at least one layer, got mlp{depth}x_gelu")
        self.depth = depth
        for number in range(1, depth + 1):
            self.add_module(f"linear_{number}", nn.Linear(in_features if number == 1 else out_features, out_features))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.linear_1(tokens)
        for number in range(2, self.depth + 1):
            tokens = getattr(self, f"linear_{number}")(F.gelu(tokens))
        return tokens


class NormMlpProjector(nn.Module):
    """`mlp1` of InternVL (arXiv:2312.14238) and LEO (arXiv:2501.06986): LayerNorm, Linear, GELU, Linear.

    The names are those of transformers' InternVL.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(tokens))))


class SqueezeExciteProjector(nn.Module):
    """`se_mlp` of Cambrian-1 (arXiv:2406.16860): channels weighted by the mean of all tokens, then an MLP.

    `w = sigmoid(excite(gelu(squeeze(mean of x))))`, `y = w * x + x`, `linear_2(gelu(linear_1(y)))`.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.squeeze = nn.Linear(in_features, in_features, bias=False)
        self.excite = nn.Linear(in_features, in_features, bias=False)
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.excite(F.gelu(self.squeeze(tokens.mean(dim=1, keepdim=True)))).sigmoid()  # (batch, 1, channels)
        return self.linear_2(F.gelu(self.linear_1(tokens * weights + tokens)))


class ResidualProjector(nn.Module):
    """The residual block of the LLaVA builders, which no released model uses.

    `z = layer_norm(x)`, `z + linear_2(gelu(linear_1(z)))`: the residual is the normalised input, as the code has it.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        if in_features != out_features:
            raise ValueError(
                f"expected as many channels as asked for with the projector 'residual', got {in_features} instead of"
                f" {out_features}"
            )
        self.layer_norm = nn.LayerNorm(in_features)
        self.linear_1 = nn.Linear(in_features, in_features)
        self.linear_2 = nn.Linear(in_features, in_features)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.layer_norm(tokens)
        return normed + self.linear_2(F.gelu(self.linear_1(normed)))


class LinearProjector(nn.Linear):
    """One Linear layer."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)


PROJECTORS: dict[str, type[nn.Module]] = {
    "identity": IdentityProjector,
    "linear": LinearProjector,
    "mlpNx_gelu": MlpProjector,  # for every N: mlp1x_gelu, mlp2x_gelu, ...
    "norm_mlp": NormMlpProjector,
    "residual": ResidualProjector,
    "se_mlp": SqueezeExciteProjector,
}


def build_projector(name: str, in_features: int, out_features: int, **options) -> nn.Module:
    """Build a projector of tokens (batch, tokens, in_features) to (batch, tokens, out_features)."""
    numbered = re.fullmatch(r"mlp(\d+)x_gelu", str(name))
    if numbered:
        name, options = "mlpNx_gelu", {"depth": int(numbered[1])} | options
    projector_class = pick(PROJECTORS, name, "projector")
    check_options(projector_class, options, given=("in_features", "out_features"), owner=f"the projector {name!r}")
    return projector_class(in_features, out_features, **options)
