"""What every stream encoder of several modalities keeps, whatever encoder and fusion."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_streams.base import ModalityStreams
from vitweave.modeling.modality_streams.registry import build_streams

# fusion -> options under which it acts from the start and in a way that a test can see
ACTIVE = {
    "channel_exchange": {"threshold": 1.0},
    "cross_attention": {"num_heads": 2, "start": "released"},
    "gemini": {"num_heads": 2, "start": "released"},
    "rectify_fuse": {"start_gate": 0.5, "start_scale": 1.0},
    "token_exchange": {"threshold": 0.5, "start_score": 0.5},
}


def streams_with(stream_config, fusion: str | None, modalities: int = 2, seed: int = 0, **options) -> ModalityStreams:
    """Random weights, far from their start values, in evaluation mode."""
    torch.manual_seed(seed)
    config = ModalityFusionConfig(
        modalities=[f"sensor{index}" for index in range(modalities)],
        stream_config=stream_config,
        fusion_type=fusion,
        fusion_options=ACTIVE.get(fusion),
        attn_implementation="eager",
        **options,
    )
    streams = build_streams(config).eval()
    disturb(streams)
    return streams


@torch.no_grad()
def disturb(module: torch.nn.Module, by: float = 0.1):
    """Move every weight, so that norms, scales and tables that start equal differ."""
    for parameter in module.parameters():
        parameter.add_(by * torch.randn_like(parameter))


def images(batch=2, modalities=2, size=(32, 48), seed=0) -> Tensor:
    return torch.randn(batch, modalities, 3, *size, generator=torch.Generator().manual_seed(seed))


def check_absent_sensors(streams: ModalityStreams, pixels: Tensor):
    """Whatever an absent sensor shows, the others' maps and all gradients are the same, bit for bit."""
    batch, modalities = pixels.shape[:2]
    for left_out in range(modalities):
        present = torch.ones(batch, modalities, dtype=torch.bool)
        present[0, left_out] = False
        found = []
        for content in (1.0, float("nan")):
            streams.zero_grad()
            shown = pixels.clone()
            shown[0, left_out] = content
            output = streams(shown, present)
            kept = [stage_map[output.present] for stage_map in output.maps]
            loss = sum(stage_map.square().sum() for stage_map in kept)
            (loss if output.penalty is None else loss + output.penalty).backward()
            gradients = [parameter.grad for parameter in streams.parameters() if parameter.grad is not None]
            assert gradients and all(gradient.isfinite().all() for gradient in gradients)
            found.append([*kept, *gradients])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def check_sensors_meet(streams: ModalityStreams, pixels: Tensor):
    """A sensor that is there changes what another stream returns, and one that is left out does not."""
    changed = pixels.clone()
    changed[:, 1] += 1
    with torch.no_grad():
        one, other = (streams(shown).maps[-1][0] for shown in (pixels, changed))
        assert not torch.equal(one, other)
        present = torch.tensor([[True, False]]).expand(pixels.shape[0], -1)
        one, other = (streams(shown, present).maps[-1][0] for shown in (pixels, changed))
        assert torch.equal(one, other)


def check_single_images(streams: ModalityStreams, pixels: Tensor, tolerance: float = 2e-5):
    """A batch gives what its images give alone."""
    with torch.no_grad():
        together = streams(pixels).maps
        for index in range(pixels.shape[0]):
            for one, all_of_them in zip(streams(pixels[index : index + 1]).maps, together, strict=True):
                torch.testing.assert_close(one[:, 0], all_of_them[:, index], atol=tolerance, rtol=tolerance)


def check_every_weight_learns(streams: ModalityStreams, pixels: Tensor, but: tuple[str, ...] = ()):
    """`but`: endings of names whose gradient is zero by construction."""
    torch.manual_seed(1)
    output = streams(pixels)
    # of a norm's output alone the plain sum of squares is constant, so that nothing in front of it would learn
    loss = sum((stage_map * torch.randn_like(stage_map)).sum() for stage_map in output.maps)
    (loss if output.penalty is None else loss + output.penalty).backward()
    idle = [name for name, p in streams.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert not [name for name in idle if not name.endswith(but)]


def check_checkpointing(streams: ModalityStreams, pixels: Tensor):
    """Recomputed blocks give the same gradients."""
    found = []
    for recompute in (False, True):
        streams.zero_grad()
        streams.train()
        for module in streams.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = recompute
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        streams(pixels).maps[-1].square().sum().backward()
        found.append({name: p.grad for name, p in streams.named_parameters() if p.grad is not None})
    assert any(getattr(module, "gradient_checkpointing", False) for module in streams.modules())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def check_compiled(streams: ModalityStreams, pixels: Tensor):
    """One graph without breaks gives the same."""
    torch._dynamo.reset()
    compiled = torch.compile(streams, fullgraph=True, backend="eager")
    present = torch.ones(pixels.shape[:2], dtype=torch.bool)
    present[0, 1] = False
    with torch.no_grad():
        for mask in (None, present):
            for one, other in zip(compiled(pixels, mask).maps, streams(pixels, mask).maps, strict=True):
                torch.testing.assert_close(one, other)


class Maps(torch.nn.Module):
    """The maps alone, as an exported graph returns them."""

    def __init__(self, streams: ModalityStreams):
        super().__init__()
        self.streams = streams

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return self.streams(pixels).maps


def check_exported(streams: ModalityStreams, pixels: Tensor, other: Tensor):
    """A graph exported with one batch serves another."""
    batch = torch.export.Dim("batch", min=2, max=16)
    graph = torch.export.export(Maps(streams), (pixels,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for one, expected in zip(graph(other), streams(other).maps, strict=True):
            torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


def check_half_precision(streams: ModalityStreams, pixels: Tensor):
    """bfloat16 stays near float32."""
    with torch.no_grad():
        expected = streams(pixels).maps
        for one, wanted in zip(streams.to(torch.bfloat16)(pixels.bfloat16()).maps, expected, strict=True):
            assert one.dtype == torch.bfloat16
            assert (one.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    streams.float()


def check_exchange_is_recorded(streams: ModalityStreams, pixels: Tensor, places: set[str]):
    """Which blocks fuse can be read off what they record."""
    with torch.no_grad():
        output = streams(pixels)
    assert set(output.exchange_ratios) == places
    assert all(ratio.shape == (output.maps[0].shape[0],) for ratio in output.exchange_ratios.values())
    assert output.penalty.ndim == 0 and output.penalty > 0
