"""Message passing between the layers, seen as the nodes of a small graph."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.graph_convs import CONVS
from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice
from vitweave.modeling.layer_fusion.base_attention import check_heads

EDGES = ("full", "chain", "star", "learned")
READOUTS = ("last", "mean")


class GraphFusion(LayerFusion):
    """`x + elu(conv(x))` over the layers as nodes, `depth` times; the last node or the mean, then `W y + b`.

    "gcn" (arXiv:1609.02907): `D^-1/2 A D^-1/2 x W`. "gat" (arXiv:1710.10903): attention
    `softmax_j leaky_relu(a_dst W x_i + a_src W x_j)`, whose ranking of the senders is the same for every receiver;
    "gatv2" (arXiv:2105.14491): `softmax_j a leaky_relu(W_r x_i + W_l x_j)`, whose ranking depends on the receiver.
    Two or more "gcn" on a full graph average the layers away: keep `depth` at 1 or 2. In a chain a message travels one
    node per convolution: read the mean, or shallow layers do not reach the last.

    `attentions`, if asked for: (batch, nodes, nodes, heads) of the last convolution, [b, i, j, h] weighs the message
    j -> i ("gcn": one head, the normalised adjacency).

    Args:
        edges: besides each node's own loop, "full", "chain" (neighbouring layers) or "star" (all into the last); or
            "learned", weights of all edges and loops, the softmax of a free matrix over what a node receives.
        num_heads: None takes one per 64 channels ("gcn" has none).
        head_merge: "concat" heads of hidden / num_heads, or "mean" over heads of full width.
        mean_nodes: a node for the mean of each layer's patches, in front of that of its [CLS].
        layer_embedding: a learnt vector per node is added to it. Without one a full graph knows the order of the
            layers only from their norms and the read-out.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        conv: str = "gat",
        edges: str = "full",
        readout: str = "last",
        num_heads: int | None = None,
        head_merge: str = "concat",
        depth: int = 1,
        mean_nodes: bool = False,
        layer_embedding: bool = False,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        needs = ("cls", "patch_means") if mean_nodes else ("cls",)
        super().__init__(num_layers, hidden_size, needs=needs, norm=norm, direct=direct)
        for option, value, known in (("conv", conv, CONVS), ("edges", edges, EDGES), ("readout", readout, READOUTS)):
            check_choice(option, value, known)
        if depth < 1:
            raise ValueError(f"expected a depth of 1 or more, got {depth}")
        self.edges, self.readout, self.mean_nodes = edges, readout, mean_nodes
        nodes = 2 * num_layers if mean_nodes else num_layers
        self.layer_embed = nn.Parameter(torch.empty(nodes, hidden_size)) if layer_embedding else None
        self.edge_logits = nn.Parameter(torch.empty(nodes, nodes)) if edges == "learned" else None
        self.convs = nn.ModuleList(
            CONVS[conv](hidden_size, hidden_size, **head_options(conv, hidden_size, num_heads, head_merge))
            for _ in range(depth)
        )
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.set_start_values()

    def set_start_values(self) -> None:
        super().set_start_values()
        if self.layer_embed is not None:
            init.normal_(self.layer_embed, std=0.02)
        if self.edge_logits is not None:
            init.zeros_(self.edge_logits)  # all edges count equally

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        nodes, attentions = self.pass_messages(self.nodes(tokens))
        pooled = self.proj(nodes[:, -1] if self.readout == "last" else nodes.mean(dim=1))
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, pooled),
            attentions=attentions if output_attentions else None,
        )

    def nodes(self, tokens: LayerTokens) -> Tensor:
        """(batch, nodes, hidden), the deepest [CLS] last."""
        nodes = self.normed_cls(tokens)
        if self.mean_nodes:
            pairs = torch.stack((self.normed_means(tokens), nodes), dim=2)
            nodes = pairs.flatten(1, 2)  # mean_1, cls_1, mean_2, cls_2, ...
        return nodes if self.layer_embed is None else nodes + self.layer_embed

    def pass_messages(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The updated nodes (batch, nodes, hidden), and the attentions of the last convolution."""
        adjacency = self.adjacency(nodes)
        for conv in self.convs:
            update, attentions = conv(nodes, adjacency)
            nodes = nodes + F.elu(update)
        return nodes, attentions

    def adjacency(self, nodes: Tensor) -> Tensor:
        """(nodes, nodes), [i, j] weighs the edge j -> i, own loops included."""
        count = nodes.shape[1]
        if self.edge_logits is not None:
            return self.edge_logits.softmax(dim=1)
        full = nodes.new_ones(count, count)
        if self.edges == "chain":
            return full.tril(1).triu(-1)
        if self.edges == "star":
            is_last = torch.arange(count, device=nodes.device) == count - 1
            return torch.maximum(torch.diag(torch.ones_like(full[0])), full * is_last[:, None])
        return full


def head_options(conv: str, hidden_size: int, num_heads: int | None, head_merge: str) -> dict:
    """The options of a convolution's heads; "gcn" has none."""
    check_choice("head_merge", head_merge, ("concat", "mean"))
    if conv == "gcn":
        if num_heads is not None or head_merge != "concat":
            raise ValueError(f"conv='gcn' has no heads, got num_heads={num_heads}, head_merge={head_merge!r}")
        return {}
    return {"num_heads": check_heads(hidden_size, num_heads), "concat": head_merge == "concat"}
