"""Recurrent cells that read the layers from shallow to deep."""

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vitweave.modeling.layer_fusion.base import FusedTokens, LayerFusion, LayerTokens, check_choice, mean_of_valid

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
READS = {"cls": "cls", "mean": "patch_means", "patches": "patches"}


class RecurrentFusion(LayerFusion):
    """`h_l = cell(x_l, h_{l-1})` from the shallowest layer to the deepest, `W h_L + b` read out.

    Cells: "rnn" (tanh), "gru" (arXiv:1406.1078) and "lstm", with torch's gates and their order. They are written with
    Linear layers instead of `nn.GRU`: those compile to one graph, and LoRA reaches them.

    Args:
        on: "cls"; "mean", the mean of the patches; or "patches", one cell shared by all positions, which also fuses
            the patches (their mean is the embedding) and costs as many times more.
        cell_size: width of h.
        depth: cells on top of each other.
        bidirectional: a second cell reads from deep to shallow; both last states are read out.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        *,
        cell: str = "gru",
        on: str = "cls",
        cell_size: int = 256,
        depth: int = 1,
        bidirectional: bool = False,
        norm: str = "per_layer",
        direct: bool = False,
    ):
        check_choice("cell", cell, GATES)
        check_choice("on", on, READS)
        if cell_size < 1 or depth < 1:
            raise ValueError(f"expected cell_size and depth of 1 or more, got {cell_size} and {depth}")
        residuals = ("global", "patch") if on == "patches" else ("global",)
        super().__init__(num_layers, hidden_size, needs=(READS[on],), residuals=residuals, norm=norm, direct=direct)
        directions = 2 if bidirectional else 1
        widths = [hidden_size] + [directions * cell_size] * (depth - 1)
        self.on = on
        self.cells = nn.ModuleList(Cells(cell, width, cell_size, bidirectional) for width in widths)
        self.proj = nn.Linear(directions * cell_size, hidden_size)

    def forward(self, tokens: LayerTokens, output_attentions: bool = False) -> FusedTokens:
        fused = self.proj(self.last_states(self.read(tokens)))  # (batch, [patches,] hidden)
        if self.on != "patches":
            return FusedTokens(pooled=self.residual("global", tokens.base_cls, fused))
        pooled = mean_of_valid(fused, tokens.patch_mask)
        return FusedTokens(
            pooled=self.residual("global", tokens.base_cls, pooled),
            patches=self.residual("patch", tokens.base_patches, fused),
        )

    def read(self, tokens: LayerTokens) -> Tensor:
        """(batch, layers, [patches,] hidden), normed."""
        if self.on == "patches":
            return self.normed_patches(tokens)
        if self.on == "cls":
            return self.normed_cls(tokens)
        return self.normed_means(tokens)

    def last_states(self, states: Tensor) -> Tensor:
        """(batch, layers, ..., hidden) to the last states, (batch, ..., directions * cell size)."""
        for cells in self.cells:
            ends, states = cells(states)
        return ends


class Cells(nn.Module):
    """One recurrent layer: a cell, or one for each direction."""

    def __init__(self, cell: str, input_size: int, cell_size: int, bidirectional: bool):
        super().__init__()
        self.forward_cell = Cell(cell, input_size, cell_size)
        self.backward_cell = Cell(cell, input_size, cell_size) if bidirectional else None

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, layers, ..., width) to the last states (batch, ..., size) and all, (batch, layers, ..., size)."""
        read = self.forward_cell(states.unbind(1))
        if self.backward_cell is None:
            return read[-1], torch.stack(read, dim=1)
        back = self.backward_cell(states.unbind(1)[::-1])
        ends = torch.cat((read[-1], back[-1]), dim=-1)
        return ends, torch.cat((torch.stack(read, dim=1), torch.stack(back[::-1], dim=1)), dim=-1)


class Cell(nn.Module):
    """rnn: `h = tanh(W x + U h)`. gru: gates r, z, n with `n = tanh(W x + r (U h))`, `h = (1 - z) n + z h`.

    lstm: gates i, f, g, o with `c = f c + i g`, `h = o tanh(c)`. Every W and U has a bias.
    """

    def __init__(self, cell: str, input_size: int, cell_size: int):
        super().__init__()
        self.step = {"rnn": rnn_step, "gru": gru_step, "lstm": lstm_step}[cell]
        width = GATES[cell] * cell_size
        self.input_proj = LstmInput(input_size, width) if cell == "lstm" else nn.Linear(input_size, width)
        self.state_proj = nn.Linear(cell_size, width)

    def forward(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """One (..., input size) per layer, in reading order, to one state (..., cell size) per layer."""
        size = self.state_proj.in_features
        state = inputs[0].new_zeros(*inputs[0].shape[:-1], size)
        memory, states = state, []
        for projected in self.input_proj(torch.stack(inputs)).unbind(0):
            state, memory = self.step(projected, self.state_proj(state), state, memory)
            states.append(state)
        return states


def rnn_step(inputs: Tensor, recurrent: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The next state; the memory is not used."""
    return (inputs + recurrent).tanh(), memory


def gru_step(inputs: Tensor, recurrent: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The next state; the memory is not used."""
    (reset, update, new), (r, z, n) = inputs.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    update = (update + z).sigmoid()
    new = (new + (reset + r).sigmoid() * n).tanh()
    return (1 - update) * new + update * state, memory


def lstm_step(inputs: Tensor, recurrent: Tensor, state: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """The next state and the next memory."""
    take, keep, new, give = (inputs + recurrent).chunk(4, dim=-1)
    memory = keep.sigmoid() * memory + take.sigmoid() * new.tanh()
    return give.sigmoid() * memory.tanh(), memory


class LstmInput(nn.Linear):
    """Input projection of an LSTM whose forget gate starts open: bias 1 (torch starts it at 0)."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.set_start_values()

    def set_start_values(self) -> None:
        """Bias 1 for the forget gate, 0 for the others."""
        gate = torch.arange(self.out_features, device=self.bias.device) // (self.out_features // 4)
        init.copy_(self.bias, gate == 1)
