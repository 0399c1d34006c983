"""The neck of DPT against the one of transformers, and on the grids that one does not take."""

import re

import pytest
import torch
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck

from vitweave.modeling.dpt_neck import DptNeck

RENAMES = {
    r"reassemble_stage\.layers\.": "reassemble.",
    r"reassemble_stage\.readout_projects\.(\d+)\.0": r"reassemble.\1.readout",
    r"^convs\.": "laterals.",
    r"fusion_stage\.layers\.": "refine.",
    r"residual_layer1\.": "merge.",
    r"residual_layer2\.": "residual.",
    r"convolution": "conv",
}


def translated(state: dict) -> dict:
    """The weights of transformers' neck under our names; its coarsest step has a part that is never run."""
    for pattern, name in RENAMES.items():
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in state.items() if not key.startswith("refine.0.merge")}


def random_layers(widths, grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, w, *grid, generator=generator) for w, grid in zip(widths, grids, strict=True)]
    return maps, [torch.randn(2, width, generator=generator) for width in widths]


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
def test_it_is_the_neck_of_dpt(readout):
    official = DPTNeck(
        DPTConfig(
            hidden_size=16,
            neck_hidden_sizes=[2, 4, 8, 16],
            fusion_hidden_size=6,
            readout_type=readout,
            num_attention_heads=2,
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
        )
    )
    neck = DptNeck([16] * 4, fusion_size=6, readout=readout)  # its defaults are the four places of DPT
    neck.load_state_dict(translated(official.state_dict()))
    maps, tokens = random_layers([16] * 4, [(4, 6)] * 4)
    sequences = [
        torch.cat([token[:, None], feature_map.flatten(2).transpose(1, 2)], dim=1)
        for token, feature_map in zip(tokens, maps, strict=True)
    ]
    expected = official(sequences, patch_height=4, patch_width=6)
    for ours, theirs in zip(neck(maps, tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_odd_grids_keep_their_size():
    maps, tokens = random_layers([8] * 4, [(5, 7)] * 4)
    sizes = [tuple(level.shape[-2:]) for level in DptNeck([8] * 4, fusion_size=4)(maps, tokens)]
    assert sizes == [(5, 7), (10, 14), (20, 28), (40, 56)]


def test_maps_that_form_a_pyramid_keep_their_places():
    neck = DptNeck([4, 8, 16], fusion_size=4, readout="ignore")
    assert [part.projection.out_channels for part in neck.reassemble] == [4, 8, 16]
    maps, _ = random_layers([4, 8, 16], [(9, 7), (5, 4), (3, 2)])
    assert [tuple(level.shape) for level in neck(maps)] == [(2, 4, 5, 4), (2, 4, 9, 7), (2, 4, 18, 14)]


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
def test_the_class_token_counts_unless_it_is_ignored(readout):
    neck = DptNeck([8] * 2, fusion_size=4, readout=readout)
    maps, tokens = random_layers([8] * 2, [(4, 4)] * 2)
    changed = neck(maps, [token + 1 for token in tokens])
    assert torch.equal(changed[-1], neck(maps, tokens)[-1]) == (readout == "ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "concat"}, "unknown readout 'concat'; known: .'add', 'ignore', 'project'"),
        ({"factors": [1.0]}, r"one entry of factors per map, 2 in all, got \[1.0\]"),
        ({"factors": [1.5, 1.0]}, r"whole numbers or 1 / whole numbers, got \[1.5\]"),
        ({"factors": [0, 1.0]}, r"got \[0\]"),
        ({"neck_sizes": [4, 8, 16]}, "one entry of neck_sizes per map"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DptNeck([8, 8], **options)
