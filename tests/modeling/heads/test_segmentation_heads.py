"""The segmentation heads against their formulas and against the released SegFormer decoder."""

import pytest
import torch
import torch.nn.functional as F
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from vitweave.modeling.heads.linear import LinearHead
from vitweave.modeling.heads.mlp import MlpHead
from vitweave.modeling.heads.registry import SEGMENTATION_HEADS, build_segmentation_head

CHANNELS = [8, 16]


def random_maps(seed=0):
    """A fine and a coarse map of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, 6, 10, generator=generator), torch.randn(2, 16, 3, 5, generator=generator)]


def randomise(head, seed=0):
    """Give every weight and statistic a value that shows."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*head.parameters(), *(b for b in head.buffers() if b.is_floating_point())):
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return head


def test_linear_head_is_batch_norm_and_a_1x1_convolution():
    head = randomise(LinearHead(CHANNELS, num_labels=3)).eval()
    fine, coarse = random_maps()
    coarse = F.interpolate(coarse, size=(6, 10), mode="bilinear", align_corners=False)
    features = torch.cat([fine, coarse], dim=1)
    mean, var = (statistic[:, None, None] for statistic in (head.norm.running_mean, head.norm.running_var))
    scale, shift = (weight[:, None, None] for weight in (head.norm.weight, head.norm.bias))
    normed = (features - mean) / (var + 1e-5).sqrt() * scale + shift
    expected = torch.einsum("kc,bchw->bkhw", head.classifier.weight[:, :, 0, 0], normed)
    expected = expected + head.classifier.bias[:, None, None]
    torch.testing.assert_close(head(random_maps()), expected)


def test_linear_head_takes_the_size_of_the_first_map():
    fine, coarse = random_maps()
    assert LinearHead(CHANNELS[::-1], num_labels=3)([coarse, fine]).shape == (2, 3, 3, 5)


def test_linear_head_statistics_move_by_a_tenth():
    head = LinearHead([8], num_labels=3).train()
    fine = random_maps()[0]
    head([fine])
    torch.testing.assert_close(head.norm.running_mean, 0.1 * fine.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(head.norm.running_var, 0.9 + 0.1 * fine.var(dim=(0, 2, 3)))


def test_linear_head_drops_whole_channels_before_the_norm():
    torch.manual_seed(0)
    head = LinearHead([8], num_labels=3, dropout=0.5).train()
    seen = []
    head.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    head([torch.ones(2, 8, 4, 4)])
    assert set(seen[0].amax(dim=(2, 3)).flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(seen[0].amax(dim=(2, 3)), seen[0].amin(dim=(2, 3)))


def test_linear_head_starts_small():
    torch.manual_seed(0)
    classifier = LinearHead([512], num_labels=64).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not classifier.bias.any()


def test_mlp_head_is_the_decoder_of_segformer():
    config = SegformerConfig(num_encoder_blocks=2, hidden_sizes=CHANNELS, decoder_hidden_size=12, num_labels=3)
    official = randomise(SegformerDecodeHead(config)).eval()
    head = MlpHead(CHANNELS, num_labels=3, hidden_size=12).eval()
    renames = {"linear_fuse": "fuse", "batch_norm": "norm", ".proj.": "."}
    renames |= {"linear_projections": "projections", "linear_c": "projections"}  # named anew in transformers 5.2x
    state = {}
    for name, weight in official.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        state[name] = weight
    head.load_state_dict(state)
    torch.testing.assert_close(head(random_maps()), official(random_maps()))


def test_mlp_head_takes_the_size_of_the_largest_map():
    fine, coarse = random_maps()
    assert MlpHead(CHANNELS[::-1], num_labels=3, hidden_size=12)([coarse, fine]).shape == (2, 3, 6, 10)


@pytest.mark.parametrize("name", sorted(SEGMENTATION_HEADS))
def test_every_weight_gets_a_gradient(name):
    torch.manual_seed(0)
    head = build_segmentation_head(name, CHANNELS, num_labels=3)
    head(random_maps()).square().mean().backward()
    idle = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert not idle


def test_options_reach_the_constructor():
    assert build_segmentation_head("linear", [8], 3, {"dropout": 0.3}).dropout.p == 0.3
    assert build_segmentation_head("mlp", [8], 3, {"hidden_size": 20}).fuse.out_channels == 20


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("liner", None, "unknown head_type 'liner' .did you mean 'linear'.*known: .'linear', 'mlp', 'subpixel'"),
        ("linear", {"droput": 0.1}, "the head 'linear' has no option 'droput' .did you mean 'dropout'"),
        ("linear", {"num_labels": 4}, "no option 'num_labels'"),
        (
            "mlp",
            {"width": 4},
            "its options: .*'drop_channels', 'dropout', 'frozen_norm', 'fuse_bias', 'hidden_size', 'norm_eps'",
        ),
    ],
)
def test_unknown_names_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_segmentation_head(name, [8], 3, options)
