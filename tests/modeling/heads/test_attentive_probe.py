"""The attentive probe against its formula written out, and against the released module's numbers."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vitweave.modeling.heads.attentive_probe import AttentiveProbe
from vitweave.modeling.heads.registry import build_token_classifier

OFFICIAL = {"q_proj": "cross_attn.q", "k_proj": "cross_attn.k", "v_proj": "cross_attn.v", "out_proj": "cross_attn.proj"}


def random_probe(seed=0, **options):
    torch.manual_seed(seed)
    probe = AttentiveProbe(16, 3, **{"num_heads": 4, **options}).double()
    for parameter in probe.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return probe.eval()


@pytest.mark.parametrize("head_size", [None, 5])
def test_folding_changes_nothing(head_size):
    probe, tokens = random_probe(head_size=head_size), torch.randn(2, 7, 16, dtype=torch.float64)
    query = probe.q_proj(probe.norm_q(probe.query)).unflatten(0, (4, -1))  # (heads, head size)
    keys = probe.k_proj(probe.norm_k(tokens)).unflatten(2, (4, -1))
    values = probe.v_proj(probe.norm_v(tokens)).unflatten(2, (4, -1))
    scores = torch.einsum("nd,btnd->bnt", query, keys) / probe.head_size**0.5
    mixed = torch.einsum("bnt,btnd->bnd", scores.softmax(dim=-1), values)
    expected = probe.out_proj(mixed.flatten(1))
    pooled, weights = probe.attend(tokens)
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(weights, scores.softmax(dim=-1))
    torch.testing.assert_close(probe(tokens), probe.classifier(probe.norm(expected)))


def test_the_released_block_gives_the_same():
    shipped = Path(__file__).parents[2] / "reference"
    folder = Path(os.environ.get("VITWEAVE_REFERENCE_DIR") or shipped, "layer_fusion", "vectors")
    path = folder / "alf_attentive_block.safetensors"
    tensors, sidecar = load_file(path), json.loads(path.with_suffix(".json").read_text())
    state = {name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")}
    probe = AttentiveProbe(sidecar["config"]["dim"], 3, sidecar["config"]["num_heads"])
    ours = {"query": state.pop("query_token").flatten()}
    for name, tensor in state.items():
        part, _, kind = name.rpartition(".")
        ours[f"{next((new for new, old in OFFICIAL.items() if old == part), part)}.{kind}"] = tensor
    result = probe.load_state_dict(ours, strict=False)
    assert not result.unexpected_keys and all(n.startswith(("norm.", "classifier.")) for n in result.missing_keys)
    pooled, _ = probe.double().attend(tensors["input.tokens"].double())
    torch.testing.assert_close(pooled, tensors["output.pooled"], rtol=0, atol=1e-10)


def test_the_order_of_the_tokens_does_not_matter_and_every_weight_learns():
    probe, tokens = random_probe().train(), torch.randn(4, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(probe(tokens), probe(tokens.flip(1)))
    probe(tokens).square().sum().backward()
    idle = [name for name, p in probe.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    # a constant on all keys leaves the softmax as it is, and batch norm takes away one on the pooled vector
    assert set(idle) <= {"norm_k.bias", "norm_v.bias", "out_proj.bias"}


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="1 to hidden_size=16 heads, got 17"):
        AttentiveProbe(16, 3, num_heads=17)
    with pytest.raises(ValueError, match=r"unknown token classifier 'atentive' \(did you mean 'attentive'"):
        build_token_classifier("atentive", 16, 3)
    with pytest.raises(ValueError, match="'attentive' has no option 'heads'"):
        build_token_classifier("attentive", 16, 3, {"heads": 2})
    assert build_token_classifier("attentive", 16, 3, {"num_heads": 2}).head_size == 16
