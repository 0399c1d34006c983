"""Recurrent fusion: torch's numbers, the order of the layers, start values, cost."""

from dataclasses import replace

import pytest
import torch
from fusion_costs import HIDDEN, count_weights
from fusion_tokens import random_tokens, trained
from reference_layer_fusion_2 import TORCH_CELL, translated
from torch import nn

from vitweave.modeling.layer_fusion.recurrent import Cells, RecurrentFusion

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
every_cell = pytest.mark.parametrize("cell", CELLS)


def test_the_size_is_that_of_the_formula():
    size = 256
    assert count_weights("recurrent") == 3 * (HIDDEN * size + size**2) + HIDDEN * size


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@every_cell
def test_cells_are_those_of_torch(cell, bidirectional):
    torch_cells = CELLS[cell](6, 5, num_layers=2, bidirectional=bidirectional, batch_first=True)
    cells = nn.ModuleList(Cells(cell, width, 5, bidirectional) for width in (6, 10 if bidirectional else 5))
    cells.load_state_dict(translated(torch_cells.state_dict(), TORCH_CELL))
    inputs = torch.randn(3, 4, 6)
    expected, ends = torch_cells(inputs)
    states = inputs
    for layer in cells:
        last, states = layer(states)
    torch.testing.assert_close(states, expected)
    last_layer = (ends[0] if cell == "lstm" else ends)[-last.shape[1] // 5 :]
    torch.testing.assert_close(last, torch.cat(list(last_layer), dim=1))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"on": "mean"}, {"on": "patches"}], ids=str)
@every_cell
def test_the_order_of_the_layers_counts(cell, options):
    fusion = trained(RecurrentFusion(3, 32, cell=cell, cell_size=8, norm="none", **options))
    tokens = random_tokens()
    turned = replace(tokens, cls=tokens.cls.flip(1), patches=tokens.patches.flip(1))
    assert not torch.allclose(fusion(turned).pooled, fusion(tokens).pooled, atol=1e-3)


def test_both_ways_read_the_turned_layers_as_each_other():
    fusion, tokens = RecurrentFusion(3, 32, cell_size=8, bidirectional=True, norm="none", direct=True), random_tokens()
    cells, size = fusion.cells[0], 8
    cells.backward_cell.load_state_dict(cells.forward_cell.state_dict())
    there, _ = cells(tokens.cls)
    back, _ = cells(tokens.cls.flip(1))
    torch.testing.assert_close(there, torch.cat((back[:, size:], back[:, :size]), dim=1))


def test_patches_are_read_each_by_itself():
    fusion, tokens = trained(RecurrentFusion(3, 32, cell_size=8, on="patches")), random_tokens()
    other = tokens.patches.clone()
    other[:, :, 4] = torch.randn_like(other[:, :, 4])
    before, after = fusion(tokens), fusion(replace(tokens, patches=other))
    changed = (before.patches != after.patches).any(-1)
    assert changed[:, 4].all() and changed.sum() == 2
    assert not torch.allclose(before.pooled, after.pooled)


def test_the_forget_gate_starts_open():
    bias = RecurrentFusion(2, 32, cell="lstm", cell_size=4).cells[0].forward_cell.input_proj.bias
    assert bias.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "mamba"}, "cell to be one of"),
        ({"on": "registers"}, "on to be one of"),
        ({"cell_size": 0}, "cell_size and depth of 1 or more, got 0 and 1"),
        ({"depth": 0}, "cell_size and depth of 1 or more, got 256 and 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentFusion(2, 32, **options)
