"""Graph fusion: edges, attention, the order of the layers, cost."""

from dataclasses import replace

import pytest
import torch
from fusion_costs import HIDDEN, count_weights
from fusion_tokens import random_tokens, trained

from vitweave.modeling.graph_convs import CONVS, GraphConv
from vitweave.modeling.layer_fusion.graph import GraphFusion

every_conv = pytest.mark.parametrize("conv", CONVS)


def test_the_size_is_that_of_the_formula():
    assert count_weights("graph") == count_weights("graph", {"conv": "gcn"}) == 2 * HIDDEN**2
    assert count_weights("graph", {"conv": "gatv2"}) == 3 * HIDDEN**2


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ("full", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
        ("chain", [[1, 1, 0], [1, 1, 1], [0, 1, 1]]),
        ("star", [[1, 0, 0], [0, 1, 0], [1, 1, 1]]),
        ("learned", [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    ],
)
@every_conv
def test_messages_pass_along_the_edges_only(conv, edges, expected):
    fusion = trained(GraphFusion(3, 32, conv=conv, edges=edges))
    weights = fusion(random_tokens(), output_attentions=True).attentions
    assert torch.equal(weights[0, ..., 0] > 0, torch.tensor(expected) == 1)
    if conv != "gcn":
        torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))


@pytest.mark.parametrize("edges", ["full", "star", "learned"])
def test_a_full_degree_is_divided_out(edges):
    adjacency = GraphFusion(3, 32, conv="gcn", edges=edges).adjacency(torch.empty(1, 3, 32))
    _, weights = GraphConv(32, 32)(torch.randn(1, 3, 32), adjacency)
    degree = adjacency.sum(dim=1)
    torch.testing.assert_close(weights[0, ..., 0], adjacency / (degree[:, None] * degree).sqrt())


def test_attention_is_handed_out_only_if_asked_for():
    fusion, tokens = GraphFusion(3, 32, num_heads=4), random_tokens()
    assert fusion(tokens).attentions is None
    assert fusion(tokens, output_attentions=True).attentions.shape == (2, 3, 3, 4)


def turning_changes(**options) -> bool:
    """Whether the embedding of turned layers differs."""
    fusion = trained(GraphFusion(3, 32, norm="none", readout="mean", **options))
    tokens = random_tokens()
    turned = replace(tokens, cls=tokens.cls.flip(1)[:, [1, 0, 2]])  # a turn alone leaves a chain a chain
    return not torch.allclose(fusion(turned).pooled, fusion(tokens).pooled, atol=1e-4)


@every_conv
def test_the_order_of_the_layers_counts_where_the_graph_says_so(conv):
    assert turning_changes(conv=conv, edges="chain")
    assert turning_changes(conv=conv, edges="star")
    assert turning_changes(conv=conv, edges="learned")
    assert not turning_changes(conv=conv, edges="full")
    # in a full "gcn" every node receives the same sum, in which no embedding has a place
    assert turning_changes(conv=conv, edges="full", layer_embedding=True) == (conv != "gcn")


@every_conv
def test_turned_layers_change_a_chain_read_at_its_end(conv):
    fusion, tokens = trained(GraphFusion(3, 32, conv=conv, edges="chain", norm="none")), random_tokens()
    turned = replace(tokens, cls=tokens.cls.flip(1))
    assert not torch.allclose(fusion(turned).pooled, fusion(tokens).pooled, atol=1e-4)


def test_mean_nodes_stand_in_front_of_their_layer():
    fusion, tokens = GraphFusion(3, 32, mean_nodes=True, norm="none"), random_tokens()
    nodes = fusion.nodes(tokens)
    torch.testing.assert_close(nodes[:, 0::2], tokens.patches.mean(dim=2))
    assert torch.equal(nodes[:, 1::2], tokens.cls)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv": "sage"}, "conv to be one of"),
        ({"edges": "ring"}, "edges to be one of"),
        ({"readout": "max"}, "readout to be one of"),
        ({"head_merge": "sum"}, "head_merge to be one of"),
        ({"num_heads": 5}, "num_heads to divide hidden_size=32"),
        ({"depth": 0}, "depth of 1 or more, got 0"),
        ({"conv": "gcn", "num_heads": 2}, "conv='gcn' has no heads, got num_heads=2"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GraphFusion(2, 32, **options)
