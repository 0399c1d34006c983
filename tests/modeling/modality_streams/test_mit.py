import pytest
import torch
from tiny_modality_models import NAMES, aligned, mit_fusion, stirred, tiny_mit
from torch import nn
from transformers import SegformerModel

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.modality_fusion.base import ModalityNorm
from vitweave.modeling.modality_streams.mit import MitStreams
from vitweave.modeling.modeling_modality_fusion import ModalityFusionModel


def streams_of(config: ModalityFusionConfig) -> MitStreams:
    torch.manual_seed(0)
    return stirred(ModalityFusionModel(config)).streams


def test_without_fusion_a_stream_is_a_segformer():
    torch.manual_seed(0)
    segformer = stirred(SegformerModel(tiny_mit()))
    for module in segformer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # transformers has 1e-5
    streams = ModalityFusionModel.from_encoder(segformer, fusion_type=None).eval().streams
    images = aligned()
    maps = streams(images).maps
    for modality in range(2):
        expected = segformer(images[:, modality], output_hidden_states=True).hidden_states
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours[modality], theirs, atol=2e-6, rtol=1e-5)


def test_equal_norms_and_images_give_equal_streams():
    torch.manual_seed(0)
    encoder = SegformerModel(tiny_mit())
    model = ModalityFusionModel.from_encoder(encoder, modalities=NAMES[:3], fusion_type=None).eval()
    same = aligned(modalities=1).expand(-1, 3, -1, -1, -1)
    for stage in model.streams(same).maps:
        assert torch.equal(stage[0], stage[1]) and torch.equal(stage[0], stage[2])
    norms = [module for module in model.modules() if isinstance(module, ModalityNorm)]
    norms[0].weight.data[1] *= 2  # the weights of one modality change that one alone
    last = model.streams(same).maps[-1]
    assert torch.equal(last[0], last[2]) and not torch.equal(last[0], last[1])


def test_every_norm_has_the_configured_epsilon():
    streams = streams_of(mit_fusion(layer_norm_eps=1e-3))
    assert {module.eps for module in streams.modules() if isinstance(module, ModalityNorm)} == {1e-3}
    assert not [module for module in streams.modules() if isinstance(module, nn.LayerNorm)]


@pytest.mark.parametrize("modalities", [3, 4])
def test_auxiliary_streams_are_merged(modalities):
    config = mit_fusion(modalities, auxiliary="max")
    streams = streams_of(config)
    output = streams(aligned(modalities=modalities))
    assert config.num_streams == 2 and all(stage.shape[0] == 2 for stage in output.maps)
    auxiliary = streams.stages[0].auxiliary
    tokens = torch.randn(modalities, 2, 12, 32, generator=torch.Generator().manual_seed(0))
    pair, scaled, present = auxiliary(tokens, (3, 4), None)
    assert present is None and torch.equal(pair[1], scaled.amax(dim=0)) and torch.equal(pair[0], tokens[0])
    ratio = scaled / tokens[1:]  # one plus a sigmoid per token
    assert (ratio > 0.9999).all() and (ratio < 2.0001).all() and ratio.std() > 0.1 and ratio.std(dim=3).max() < 1e-4
    seen = torch.ones(modalities, 2, dtype=torch.bool)
    seen[1, 0] = False
    pair, scaled, present = auxiliary(tokens, (3, 4), seen)
    assert torch.equal(pair[1, 0], scaled[1:, 0].amax(dim=0)) and torch.equal(pair[1, 1], scaled[:, 1].amax(dim=0))
    seen[1:, 0] = False
    pair, _, present = auxiliary(tokens, (3, 4), seen)
    assert present.tolist() == [[True, True], [False, True]] and not pair[1, 0].any()


def test_the_last_blocks_fuse():
    fusing = [b.fusion is not None for s in streams_of(mit_fusion(fusion_blocks=2)).stages for b in s.blocks]
    assert fusing == [False, True, True]
    shared = streams_of(mit_fusion(fusion_type="token_exchange", fusion_blocks=1)).stages
    assert shared[0].fusion is None and shared[1].fusion is not None and shared[1].block_fuses == [False, True]
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="fusion_blocks from 1 to 3"):
            streams_of(mit_fusion(fusion_blocks=wrong))
    with pytest.raises(ValueError, match="acts at the end of every stage"):
        streams_of(mit_fusion(fusion_type="rectify_fuse", fusion_blocks=1))


def test_branches_are_dropped_per_sample_and_modality():
    streams = streams_of(mit_fusion(fusion_type=None, drop_path_rate=0.5))
    rates = [block.drop_path.rate for stage in streams.stages for block in stage.blocks]
    assert rates == [0.0, 0.25, 0.5]
    block = streams.stages[1].blocks[1].train()
    tokens = torch.randn(2, 64, 4, 32)
    torch.manual_seed(0)
    moved = (block.add_branch(torch.zeros_like(tokens), tokens) != 0).all(dim=(2, 3))  # (modalities, batch)
    assert 0.3 < moved.float().mean() < 0.7 and not torch.equal(moved[0], moved[1])
    assert torch.equal(block.eval().add_branch(torch.zeros_like(tokens), tokens), tokens)


def test_starts_as_mit():
    torch.manual_seed(0)
    block = ModalityFusionModel(mit_fusion()).streams.stages[0].blocks[0]
    assert 0.017 < block.mlp.fc1.weight.std() < 0.023 and not block.mlp.fc1.bias.any()
    assert 0.4 < block.mlp.dwconv.dwconv.weight.std() < 0.55  # sqrt(2 / 9)


@pytest.mark.parametrize("fusion_type", ["gemini", "token_exchange", "rectify_fuse"])
def test_an_absent_sensor_is_not_read(fusion_type):
    streams = streams_of(mit_fusion(3, fusion_type=fusion_type))
    images, present = aligned(modalities=3), torch.tensor([[True, False, True], [True, True, True]])
    other = images.clone()
    other[0, 1] = float("nan")
    for one, two in zip(streams(images, present).maps, streams(other, present).maps, strict=True):
        assert torch.equal(one, two) and one.isfinite().all()


def test_stops_at_the_stage_asked_for():
    streams = streams_of(mit_fusion())
    whole, part = streams(aligned()), streams(aligned(), num_stages=1)
    assert len(part.maps) == 1 and torch.equal(part.maps[0], whole.maps[0])
    assert streams.channels == [32, 32] and streams.strides == [4, 8]
