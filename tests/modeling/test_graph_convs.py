"""Graph convolutions: what distinguishes them (numbers: reference vectors)."""

import torch
from fusion_tokens import trained

from vitweave.modeling.graph_convs import GraphAttention, GraphAttentionV2, GraphConv


def test_without_edges_nodes_keep_to_themselves():
    nodes = torch.randn(2, 4, 8)
    for conv in (GraphConv(8, 8), GraphAttention(8, 8, 2), GraphAttentionV2(8, 8, 2)):
        _, weights = trained(conv)(nodes, torch.eye(4))
        torch.testing.assert_close(weights, torch.eye(4)[None, :, :, None].expand_as(weights))


def rankings(attention: torch.nn.Module) -> set[tuple[int, ...]]:
    """In which orders the receivers rank the senders, over many random nodes."""
    nodes = torch.randn(1, 6, 32)
    _, weights = trained(attention)(nodes, torch.ones(6, 6))
    return {tuple(row.tolist()) for row in weights[0, ..., 0].argsort(dim=1)}


def test_only_the_second_attention_ranks_the_senders_for_each_receiver():
    assert len(rankings(GraphAttention(32, 32, 1))) == 1
    assert len(rankings(GraphAttentionV2(32, 32, 1))) > 1


def test_the_mean_of_equal_heads_is_one_head():
    one, three = GraphAttention(8, 8, 1), GraphAttention(8, 8, 3, concat=False)
    state = one.state_dict()
    three.load_state_dict(
        {name: state[name] if name == "bias" else state[name].repeat(3, 1) for name in three.state_dict()}
    )
    nodes, adjacency = torch.randn(2, 4, 8), torch.ones(4, 4)
    torch.testing.assert_close(three(nodes, adjacency)[0], one(nodes, adjacency)[0])
