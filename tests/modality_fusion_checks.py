"""Random streams, and checks that hold for every fusion of aligned modalities."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vitweave.modeling.modality_fusion.base import BlockInputs, ModalityFusion
from vitweave.modeling.modality_fusion.registry import build_modality_fusion
from vitweave.modeling.pretrained import VitweavePreTrainedModel


def random_streams(
    modalities: int = 2,
    batch: int = 3,
    grid: tuple[int, int] = (4, 6),
    hidden: int = 32,
    prefix: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, BlockInputs]:
    """Streams at the fusion and what their block tells; every other scale is small."""
    generator = torch.Generator().manual_seed(seed)
    shape = (modalities, batch, prefix + grid[0] * grid[1], hidden)
    streams, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    scales = torch.randn(modalities, hidden, generator=generator).to(dtype)
    scales[:, ::2] *= 1e-3
    return streams, BlockInputs(residual, grid, scales=scales, num_prefix_tokens=prefix)


def moved(fusion: nn.Module, seed: int = 1, by: float = 0.3) -> nn.Module:
    """The fusion with random values added to every parameter, as if training had moved them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=by)
    return fusion


def sample(streams: Tensor, inputs: BlockInputs, index: int) -> tuple[Tensor, BlockInputs]:
    """One image of the batch."""
    part = slice(index, index + 1)
    present = None if inputs.present is None else inputs.present[:, part]
    return streams[:, part], replace(inputs, residual=inputs.residual[:, part], present=present)


def every_presence(modalities: int) -> Tensor:
    """(modalities, 2^modalities - 1): one image for every set of sensors that are there."""
    sets = [kept for kept in product([False, True], repeat=modalities) if any(kept)]
    return torch.tensor(sets).T.contiguous()


def check_absent_sensors(fusion: ModalityFusion, prefix: int = 0):
    """For every set of sensors: what the absent ones hold changes nothing, and a lone stream passes unchanged."""
    present = every_presence(fusion.num_modalities)
    streams, inputs = random_streams(fusion.num_modalities, present.shape[1], prefix=prefix, hidden=fusion.hidden_size)
    outcomes = []
    for content in (0.0, 7.0, float("nan"), float("inf")):
        absent = ~present[:, :, None, None]
        seen = streams.masked_fill(absent, content).requires_grad_()
        residual = inputs.residual.masked_fill(absent, content).requires_grad_()
        fusion.zero_grad()
        fused, penalty = fusion(seen, replace(inputs, residual=residual, present=present))
        loss = (fused[present] * streams[present]).sum()
        (loss if penalty is None else loss + penalty).backward()
        gradients = [p.grad for p in fusion.parameters()] + [seen.grad[present]]
        gradients += [] if residual.grad is None else [residual.grad[present]]
        assert not seen.grad[~present].any() and (residual.grad is None or not residual.grad[~present].any())
        ratio = fusion.last_exchange_ratio
        outcomes.append([fused[present], penalty, ratio, *gradients])
    for outcome in outcomes[1:]:
        for one, other in zip(outcomes[0], outcome, strict=True):
            assert one is other is None or (torch.equal(one, other) and torch.isfinite(one).all())
    alone = present & (present.sum(dim=0) == 1)
    assert torch.equal(fused[alone], streams[alone])
    company = present & ~alone
    assert all(not torch.equal(fused[m, b], streams[m, b]) for m, b in company.nonzero().tolist())
    check_all_present_is_none(fusion, streams, inputs)


def check_all_present_is_none(fusion: ModalityFusion, streams: Tensor, inputs: BlockInputs):
    everywhere = torch.ones(streams.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(fusion(streams, replace(inputs, present=everywhere))[0], fusion(streams, inputs)[0])


def check_images_do_not_see_each_other(fusion: ModalityFusion, with_present: bool = True):
    streams, inputs = random_streams(fusion.num_modalities, dtype=torch.float64, hidden=fusion.hidden_size)
    fusion = fusion.double().eval()
    inputs.present = every_presence(fusion.num_modalities)[:, :3] if with_present else None
    fused, penalty = fusion(streams, inputs)
    parts = [fusion(*sample(streams, inputs, index)) for index in range(streams.shape[1])]
    together = torch.cat([part[0] for part in parts], dim=1)
    seen = torch.ones_like(streams[:, :, 0, 0], dtype=torch.bool) if inputs.present is None else inputs.present
    torch.testing.assert_close(together[seen], fused[seen])
    return penalty, [part[1] for part in parts]


class FromTensors(nn.Module):
    """A fusion that takes plain tensors, for torch.export."""

    def __init__(self, fusion: ModalityFusion, grid: tuple[int, int]):
        super().__init__()
        self.fusion, self.grid = fusion, grid

    def forward(self, streams, residual, scales, present):
        return self.fusion(streams, BlockInputs(residual, self.grid, present, scales))


def check_compiles(fusion: ModalityFusion):
    torch.compiler.reset()
    streams, inputs = random_streams(fusion.num_modalities, hidden=fusion.hidden_size)
    for given in (None, every_presence(fusion.num_modalities)[:, -3:].contiguous()):
        inputs.present = given
        compiled = torch.compile(fusion, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(streams, inputs)[0], fusion(streams, inputs)[0])


def check_exports(fusion: ModalityFusion):
    streams, inputs = random_streams(fusion.num_modalities, hidden=fusion.hidden_size)
    present = every_presence(fusion.num_modalities)[:, -3:].contiguous()
    batch = torch.export.Dim("batch", min=1, max=64)
    plain = FromTensors(fusion, inputs.grid)
    dynamic = ({1: batch}, {1: batch}, None, {1: batch})
    program = torch.export.export(plain, (streams, inputs.residual, inputs.scales, present), dynamic_shapes=dynamic)
    streams, inputs = random_streams(fusion.num_modalities, batch=5, seed=3, hidden=fusion.hidden_size)
    given = (streams, inputs.residual, inputs.scales, present[:, [0, 1, 2, 2, 0]])
    torch.testing.assert_close(program.module()(*given)[0], plain(*given)[0], rtol=1e-4, atol=1e-4)


def check_bfloat16(fusion: ModalityFusion, tolerance: float = 0.03):
    streams, inputs = random_streams(fusion.num_modalities, dtype=torch.bfloat16, hidden=fusion.hidden_size)
    low, penalty = fusion.to(torch.bfloat16)(streams, inputs)
    assert low.dtype == torch.bfloat16 and (penalty is None or penalty.dtype == torch.float32)
    precise = replace(inputs, residual=inputs.residual.float(), scales=inputs.scales.float())
    high, precise_penalty = fusion.float()(streams.float(), precise)
    assert (low.float() - high).norm() < tolerance * high.norm()
    if penalty is not None:
        torch.testing.assert_close(penalty, precise_penalty, rtol=0.02, atol=0)


class HostConfig(PreTrainedConfig):
    model_type = "modality_fusion_host"


class Host(VitweavePreTrainedModel):
    """The smallest model around a fusion."""

    config_class = HostConfig

    def __init__(self, config: HostConfig):
        super().__init__(config)
        self.fusion = build_modality_fusion(config.fusion, config.modalities, 32, config.options)
        self.post_init()


def hosted(name: str, modalities: int = 2, **options) -> Host:
    return Host(HostConfig(fusion=name, modalities=modalities, options=options))
