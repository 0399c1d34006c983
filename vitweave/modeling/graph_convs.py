"""Graph convolutions on small dense graphs (batch, nodes, channels), in the numbers of torch_geometric.

An adjacency is (nodes, nodes), [i, j] weighs the edge j -> i, and holds every node's own loop. Each convolution maps
nodes and adjacency to new nodes and to what each message weighed: (batch, nodes, nodes, heads), [b, i, j] for j -> i.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

NEGATIVE_SLOPE = 0.2  # of the leaky relu in GAT and GATv2


class GraphConv(nn.Module):
    """Graph convolution (arXiv:1609.02907): `D^-1/2 A D^-1/2 x W + b`, D the in-degrees, own loops included."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.node_proj = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.set_start_values()

    def set_start_values(self) -> None:
        """Bias zero."""
        init.zeros_(self.bias)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, nodes, in_channels) to (batch, nodes, out_channels), and what each message weighs."""
        scale = adjacency.sum(dim=1).rsqrt()
        weights = scale[:, None] * adjacency * scale
        update = torch.einsum("ij,bjc->bic", weights, self.node_proj(nodes)) + self.bias
        return update, weights[None, :, :, None].expand(nodes.shape[0], -1, -1, 1)


class GraphAttention(nn.Module):
    """GAT (arXiv:1710.10903): `sum_j alpha_ij z_j`, `z = W x`, `alpha = softmax_j leaky_relu(a_dst z_i + a_src z_j)`.

    Args:
        out_channels: width of all heads together if they are concatenated, of each head if their mean is taken.
    """

    def __init__(self, in_channels: int, out_channels: int, num_heads: int, concat: bool = True):
        super().__init__()
        self.num_heads, self.concat = num_heads, concat
        width = out_channels // num_heads if concat else out_channels
        self.node_proj = nn.Linear(in_channels, num_heads * width, bias=False)
        self.att_src = nn.Parameter(torch.empty(num_heads, width))
        self.att_dst = nn.Parameter(torch.empty(num_heads, width))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.set_start_values()

    def set_start_values(self) -> None:
        """Attention vectors Glorot-uniform, bias zero."""
        init.xavier_uniform_(self.att_src)
        init.xavier_uniform_(self.att_dst)
        init.zeros_(self.bias)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, nodes, in_channels) to (batch, nodes, out_channels), and what each message weighs, per head."""
        heads = self.node_proj(nodes).unflatten(2, (self.num_heads, -1))  # (batch, nodes, heads, width)
        received, sent = (heads * self.att_dst).sum(dim=-1), (heads * self.att_src).sum(dim=-1)
        scores = F.leaky_relu(received[:, :, None] + sent[:, None], NEGATIVE_SLOPE)
        return gather_messages(scores, heads, adjacency, self.concat, self.bias)


class GraphAttentionV2(nn.Module):
    """GATv2 (arXiv:2105.14491): `sum_j alpha_ij W_l x_j`, `alpha = softmax_j a leaky_relu(W_r x_i + W_l x_j)`."""

    def __init__(self, in_channels: int, out_channels: int, num_heads: int, concat: bool = True):
        super().__init__()
        self.num_heads, self.concat = num_heads, concat
        width = out_channels // num_heads if concat else out_channels
        self.source_proj = nn.Linear(in_channels, num_heads * width)
        self.target_proj = nn.Linear(in_channels, num_heads * width)
        self.att = nn.Parameter(torch.empty(num_heads, width))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.set_start_values()

    def set_start_values(self) -> None:
        """Attention vector Glorot-uniform, bias zero."""
        init.xavier_uniform_(self.att)
        init.zeros_(self.bias)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, nodes, in_channels) to (batch, nodes, out_channels), and what each message weighs, per head."""
        sent = self.source_proj(nodes).unflatten(2, (self.num_heads, -1))  # (batch, nodes, heads, width)
        received = self.target_proj(nodes).unflatten(2, (self.num_heads, -1))
        scores = (F.leaky_relu(received[:, :, None] + sent[:, None], NEGATIVE_SLOPE) * self.att).sum(dim=-1)
        return gather_messages(scores, sent, adjacency, self.concat, self.bias)


def gather_messages(
    scores: Tensor, messages: Tensor, adjacency: Tensor, concat: bool, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What every node receives, weighed by the softmax of the scores over its incoming edges.

    Args:
        scores: (batch, nodes, nodes, heads), [b, i, j, h] for the message j -> i.
        messages: (batch, nodes, heads, width).
    """
    weights = (scores + adjacency.log()[None, :, :, None]).softmax(dim=2)  # log 0 = -inf: no edge
    received = torch.einsum("bijh,bjhc->bihc", weights, messages)
    return (received.flatten(2) if concat else received.mean(dim=2)) + bias, weights


CONVS: dict[str, type[nn.Module]] = {"gcn": GraphConv, "gat": GraphAttention, "gatv2": GraphAttentionV2}
