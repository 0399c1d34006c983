"""Random tokens of several layers, as an encoder would hand them to a layer fusion."""

import torch

from vitweave.modeling.layer_fusion.base import LayerFusion, LayerTokens


def random_tokens(
    batch: int = 2,
    layers: int = 3,
    hidden: int = 32,
    grid: tuple[int, int] = (3, 5),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    patch_mask: torch.Tensor | None = None,
) -> LayerTokens:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    patches = grid[0] * grid[1]
    return LayerTokens(
        cls=noise(batch, layers, hidden),
        patches=noise(batch, layers, patches, hidden),
        grid=grid,
        base_cls=noise(batch, hidden),
        base_patches=noise(batch, patches, hidden),
        patch_mask=patch_mask,
    )


def trained(fusion: LayerFusion, seed: int = 1) -> LayerFusion:
    """The fusion with random values in every parameter, gammas too, as if training had moved them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.3)
    return fusion
