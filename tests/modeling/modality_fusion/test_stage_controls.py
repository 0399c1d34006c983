"""The sum and the projection that other fusions are compared with."""

import pytest
import torch
from modality_fusion_checks import (
    check_absent_sensors,
    check_bfloat16,
    check_compiles,
    check_exports,
    check_images_do_not_see_each_other,
    moved,
    random_streams,
)

from vitweave.modeling.modality_fusion.registry import build_modality_fusion

every_control = pytest.mark.parametrize("name", ["addition", "concatenation"])
every_count = pytest.mark.parametrize("modalities", [2, 3])


def test_addition_is_the_mean_of_all():
    streams, inputs = random_streams(3)
    fused, penalty = build_modality_fusion("addition", 3, 32)(streams, inputs)
    assert penalty is None
    torch.testing.assert_close(fused, streams.mean(dim=0, keepdim=True).expand_as(streams))


@every_count
def test_a_fresh_concatenation_is_the_identity(modalities):
    streams, inputs = random_streams(modalities)
    assert torch.equal(build_modality_fusion("concatenation", modalities, 32)(streams, inputs)[0], streams)


def test_concatenation_is_a_projection_of_all():
    streams, inputs = random_streams(2)
    fusion = moved(build_modality_fusion("concatenation", 2, 32))
    expected = torch.cat([streams[0], streams[1]], dim=-1) @ fusion.weight[1].T + fusion.bias[1]
    torch.testing.assert_close(fusion(streams, inputs)[0][1], expected)


@every_control
@every_count
def test_demands_on_every_fusion(name, modalities):
    check_absent_sensors(moved(build_modality_fusion(name, modalities, 32)))
    check_images_do_not_see_each_other(moved(build_modality_fusion(name, modalities, 32)))
    check_bfloat16(moved(build_modality_fusion(name, modalities, 32)))


@every_control
def test_compiled_and_exported(name):
    check_compiles(moved(build_modality_fusion(name, 2, 32)))
    check_exports(moved(build_modality_fusion(name, 2, 32)))
