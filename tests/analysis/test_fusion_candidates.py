"""What a search chooses from."""

import pytest
from tiny_encoders import build

from vitweave.analysis.fusion_candidates import ALONE, LAYER_CHOICES, baselines, equal_layers, layer_sets, search_space
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.configuration.encoder_facts import encoder_facts

VIT = SpecializedViTConfig(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=32, patch_size=8)


def test_layer_sets():
    assert layer_sets(VIT, ["last4", "quarters", "thirds", "middle_last"]) == [
        (9, 10, 11, 12),
        (3, 6, 9, 12),
        (4, 8, 12),
        (6, 12),
    ]
    assert layer_sets(VIT, ["12,6", "middle_last", "5", "singles"])[:3] == [(6, 12), (5,), (1,)]
    assert len(layer_sets(VIT, ["singles"])) == 12
    for wrong in ("halves", "0,3", "12,13", "3,x", "3,"):
        with pytest.raises(ValueError, match=r"unknown layer preset|layers of one width"):
            layer_sets(VIT, [wrong])


def test_of_a_hierarchy_only_the_layers_of_the_last_stage():
    config = build("swin").config
    known = equal_layers(config)
    assert known[-1] == encoder_facts(config).num_layers and 1 not in known
    assert all(set(layers) <= set(known) for layers in layer_sets(config, LAYER_CHOICES))
    assert baselines(config, True)[1].layers[0][-1] == known[-1]


def test_space_starts_with_the_baselines_and_names_each_once():
    dense, pooled = search_space([VIT], True), search_space([VIT], False)
    for space in (dense, pooled):
        names = [one.name for one in space]
        assert names[:2] == ["layer 12", "concat 9 10 11 12"] and len(set(names)) == len(names)
        assert {one.fusion for one in space if len(one.layers[0]) == 1} == {ALONE}
    assert all(one.layer_fusion(32).map_channels for one in dense)
    assert "graph 3 6 9 12" in [one.name for one in pooled] and "graph 3 6 9 12" not in [one.name for one in dense]


def test_options_reach_their_fusion():
    space = search_space([VIT], True, ["quarters"], ["film", "concat"], given={"film": {"direct": False}})
    options = {one.fusion: one.options for one in space}
    assert options["film"]["direct"] is False and options["concat"] == {"direct": True, "dense": True}
    with pytest.raises(ValueError, match=r"some of .'fpn'."):
        search_space([VIT], True, ["quarters"], ["film"], given={"fpn": {}})
    with pytest.raises(ValueError, match="reads other features"):
        search_space([VIT], True, ["quarters"], ["film"], given={"film": {"norm": "shared"}})


def test_towers_are_every_subset():
    space = search_space([VIT, VIT, VIT], True, ["quarters"], ["concat"], ["add"])
    assert space == search_space([VIT, VIT, VIT], True, ["quarters"], ["concat"], ["add"], given={"add": None})
    subsets = {one.encoders for one in space if one.is_tower}
    assert subsets == {(0, 1), (0, 2), (1, 2), (0, 1, 2)}
    assert "add of encoder 0 [12] and encoder 2 [12]" in [one.name for one in space]
