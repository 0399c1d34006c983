"""GeminiFusion against its formula sample by sample, and against full cross-attention, in one interleaved run.

    python benchmarks/modality_fusions.py [--rounds 5] [--only NAME] [--tiny]

Widths and maps are those of MiT-B1 to B5 at 480 x 640, two modalities, batch 2. The plain form is what the paper's
formula gives as code: for every modality and sample one `torch.nn.MultiheadAttention` whose batch are the tokens, with
one query and two stacked keys each. Cross-attention reads all tokens of the other modality: ours by PyTorch's fused
attention, and the equation as it is written, with its softmax in memory. "saved" are the bytes that the forward keeps
for the backward, beside the weights. "operations" are those that PyTorch dispatches in one forward, at twice the batch
against once. On the GPU where there is one, else one thread. `--tiny` is a trial run that keeps no results.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import forward_only, interleaved, keep_memory, on_device, ratio, row, synchronize, write_results
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from vitweave.modeling.conversion.gemini_units import to_official_units
from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.registry import build_modality_fusion

DEVICE = on_device()
STAGES = {64: (120, 160), 128: (60, 80), 320: (30, 40), 512: (15, 20)}  # hidden size -> map
TINY_STAGES = {32: (6, 8)}
# the ratios ours / plain of time forward, and forward and backward
DEMANDS = {64: (1 / 1.3, 1 / 1.4), 128: (1 / 1.3, 1 / 1.4)}
NEVER_SLOWER = (1.0, 1.0)


class PlainGemini(nn.Module):
    """The formula with the layers of the released checkpoints, sample by sample."""

    def __init__(self, state: dict[str, Tensor], hidden_size: int, num_heads: int):
        super().__init__()
        self.cross_attn_0_to_1 = nn.MultiheadAttention(hidden_size, num_heads)
        self.cross_attn_1_to_0 = nn.MultiheadAttention(hidden_size, num_heads)
        layers = {"fc1": nn.Linear(2 * hidden_size, hidden_size), "fc2": nn.Linear(hidden_size, hidden_size)}
        self.relation_judger = nn.ModuleList([nn.ModuleDict(layers)])
        self.k_noise, self.v_noise = nn.Embedding(2, hidden_size), nn.Embedding(2, hidden_size)
        self.load_state_dict(state)

    def forward(self, streams: Tensor) -> Tensor:
        units = (self.cross_attn_0_to_1, self.cross_attn_1_to_0)
        return torch.stack(
            [
                torch.stack([self.fuse(m, unit, *pair) for pair in zip(streams[m], streams[1 - m], strict=True)])
                for m, unit in enumerate(units)
            ]
        )

    def fuse(self, m: int, unit: nn.MultiheadAttention, own: Tensor, other: Tensor) -> Tensor:
        """One direction of one sample, tokens (tokens, hidden)."""
        phi = self.relation_judger[0]
        relation = phi["fc2"](F.gelu(phi["fc1"](torch.cat([own, other], dim=-1)))).softmax(dim=-1)
        keys = torch.stack([own + self.k_noise.weight[m], own * relation])
        values = torch.stack([own + self.v_noise.weight[m], other])
        return own + unit(own[None], keys, values)[0][0]


def plain_cross_attention(fusion: nn.Module, streams: Tensor) -> Tensor:
    """The equation as it is written, a matrix of tokens by tokens per head."""
    context = streams.flip(0)
    query, keys, values = (
        fusion.by_head(part).transpose(2, 3)  # (modalities, batch, heads, tokens, width)
        for part in (fusion.to_query(streams), fusion.to_key(context), fusion.to_value(context))
    )
    weights = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
    return streams + fusion.to_output((weights @ values).transpose(2, 3).flatten(-2))


def build(name: str, hidden_size: int) -> nn.Module:
    torch.manual_seed(0)
    return build_modality_fusion(name, 2, hidden_size, {"start": "released"}).to(DEVICE)


def random_streams(batch: int, grid: tuple[int, int], hidden_size: int) -> tuple[Tensor, BlockInputs]:
    streams = torch.randn(2, batch, grid[0] * grid[1], hidden_size, device=DEVICE)
    return streams, BlockInputs(residual=streams, grid=grid)


def with_backward(function: Callable[[Tensor], Tensor], streams: Tensor) -> Callable[[], None]:
    streams, cotangent = streams.clone().requires_grad_(), torch.ones_like(streams)

    def run():
        function(streams).backward(cotangent)
        streams.grad = None
        synchronize()

    return run


def saved_bytes(function: Callable[[Tensor], Tensor], module: nn.Module, streams: Tensor) -> int:
    """Bytes of all memory that the forward keeps, each piece once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(streams.clone().requires_grad_())
    del output
    return sum(storage.nbytes() for storage in kept.values())


class CountOperations(TorchDispatchMode):
    """How many operations are dispatched inside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def count_operations(fusion: nn.Module, batch: int, grid: tuple[int, int], hidden_size: int) -> int:
    streams, inputs = random_streams(batch, grid, hidden_size)
    with CountOperations() as counter:
        fusion(streams, inputs)
    return counter.count


def against_plain(hidden_size: int, grid: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of one stage."""
    fusion = build("gemini", hidden_size)
    plain = PlainGemini(to_official_units(fusion.state_dict()), hidden_size, fusion.num_heads).to(DEVICE)
    streams, inputs = random_streams(2, grid, hidden_size)
    forms = {"ours": lambda streams: fusion(streams, inputs)[0], "plain": plain}
    with torch.no_grad():
        torch.testing.assert_close(forms["ours"](streams), plain(streams), rtol=1e-4, atol=2e-5)
    name, rows = f"gemini {hidden_size} channels", []
    for way, wrap, limit in zip(
        ("forward", "+ backward"), (forward_only, with_backward), DEMANDS.get(hidden_size, NEVER_SLOWER), strict=True
    ):
        seconds = interleaved({form: wrap(function, streams) for form, function in forms.items()}, rounds)
        fastest = {f"{form}_ms": min(times) * 1000 for form, times in seconds.items()}
        print(f"{name} {way}: " + "   ".join(f"{form} {ms:.1f}" for form, ms in fastest.items()))
        rows.append(row(f"{name} {way}: time", ratio(seconds, "ours", "plain"), f"<= {limit:.3f}") | fastest)
    kept = {form: saved_bytes(forms[form], module, streams) for form, module in (("ours", fusion), ("plain", plain))}
    per_value = {f"{form}_values": size / streams.nbytes for form, size in kept.items()}
    rows.append(row(f"{name}: saved", kept["ours"] / kept["plain"], "<= 0.7") | per_value)
    one, two = (count_operations(fusion, batch, (3, 4), hidden_size) for batch in (2, 4))
    rows.append(row(f"{name}: operations", two / one, "<= 1.0") | {"operations": one})
    return rows


def against_cross_attention(hidden_size: int, grid: tuple[int, int], rounds: int) -> list[dict]:
    """Rows of both forms of full cross-attention, one image."""
    gemini, cross = build("gemini", hidden_size), build("cross_attention", hidden_size)
    streams, inputs = random_streams(1, grid, hidden_size)
    forms = {
        "gemini": lambda streams: gemini(streams, inputs)[0],
        "fused": lambda streams: cross(streams, inputs)[0],
        "written": lambda streams: plain_cross_attention(cross, streams),
    }
    with torch.no_grad():
        torch.testing.assert_close(forms["fused"](streams), forms["written"](streams), rtol=1e-4, atol=2e-5)
    seconds = interleaved({form: forward_only(function, streams) for form, function in forms.items()}, rounds)
    fastest = {f"{form}_ms": min(times) * 1000 for form, times in seconds.items()}
    name = f"{grid[0] * grid[1]} tokens, {hidden_size} channels: cross-attention"
    print(f"{name}: " + "   ".join(f"{form} {ms:.1f}" for form, ms in fastest.items()))
    return [
        row(f"{name} as written / gemini", ratio(seconds, "written", "gemini"), ">= 50") | fastest,
        row(f"{name} fused / gemini", ratio(seconds, "fused", "gemini")),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name contains this: gemini 64, cross_attention, ...")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    rounds, rows = 1 if args.tiny else args.rounds, []
    for hidden_size, grid in (TINY_STAGES if args.tiny else STAGES).items():
        if args.only in f"gemini {hidden_size}":
            rows += against_plain(hidden_size, grid, rounds)
    if args.only in "cross_attention":
        rows += against_cross_attention(*((32, (6, 8)) if args.tiny else (64, (64, 64))), rounds)
    if not args.tiny and not args.only:
        write_results("modality_fusions", rows, DEVICE)
    else:
        print(*rows, sep="\n")


if __name__ == "__main__":
    main()
