"""Random streams of several modalities, and what every modality fusion keeps of an absent one."""

import torch

from vitweave.modeling.modality_fusion.base import BlockInputs


def random_streams(modalities=2, batch=2, grid=(3, 5), hidden=32, seed=0) -> torch.Tensor:
    """(modalities, batch, height * width, hidden)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(modalities, batch, grid[0] * grid[1], hidden, generator=generator)


def fuse(fusion, streams: torch.Tensor, present=None) -> torch.Tensor:
    """The fused streams; `present` is a nested list (modalities, batch)."""
    present = None if present is None else torch.tensor(present)
    return fusion(streams, BlockInputs(residual=streams, grid=(1, streams.shape[2]), present=present))[0]


def check_absent_streams(fusion, streams: torch.Tensor):
    """Whatever an absent stream holds, the others' values and all gradients are the same, bit for bit; a stream that is
    alone passes unchanged."""
    modalities, batch = streams.shape[:2]
    for left_out in range(modalities):
        present = torch.ones(modalities, batch, dtype=torch.bool)
        present[left_out, 0] = False
        found = []
        for content in (1.0, -3.0, float("nan"), float("inf")):
            fusion.zero_grad()
            given = streams.clone()
            given[left_out, 0] = content
            given.requires_grad_()
            fused = fuse(fusion, given, present.tolist())
            fused[present].square().sum().backward()
            gradients = [parameter.grad for parameter in fusion.parameters() if parameter.grad is not None]
            assert gradients and not given.grad[left_out, 0].any()
            found.append([fused[present], given.grad[present], *gradients])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        alone = torch.zeros(modalities, batch, dtype=torch.bool)
        alone[left_out] = True
        given = torch.full_like(streams, float("nan"))
        given[left_out] = streams[left_out]
        assert torch.equal(fuse(fusion, given, alone.tolist())[left_out], streams[left_out])
