import pytest
import torch
from fusion_tokens import random_tokens

from vitweave.modeling.layer_fusion.concat import ConcatFusion, pool_in_row_order


@pytest.mark.parametrize("connector", [None, "sci", "dci"])
def test_the_direct_form_starts_as_the_last_layer_or_the_encoder_itself(connector):
    fusion = ConcatFusion(3, 8, dense=True, connector=connector, norm="shared", direct=True)
    tokens = random_tokens(hidden=8)
    fused = fusion(tokens)
    assert torch.equal(fused.pooled, tokens.base_cls if connector else tokens.cls[:, -1])
    assert torch.equal(fused.patches, tokens.base_patches if connector else tokens.patches[:, -1])


def test_extra_tokens_are_means_of_eight_and_of_what_is_left():
    states = torch.arange(20.0).view(1, 1, 20, 1)
    assert pool_in_row_order(states).flatten().tolist() == [3.5, 11.5, 17.5]
    mask = torch.arange(20)[None] < 4
    assert pool_in_row_order(states, mask).flatten().tolist() == [1.5, 0, 0]
    tokens = random_tokens(grid=(3, 6))
    assert ConcatFusion(3, 32, connector="sti")(tokens).extra_tokens.shape == (2, 3 * 3, 32)


def test_an_unknown_connector_is_refused():
    with pytest.raises(ValueError, match="connector"):
        ConcatFusion(3, 8, connector="mmfuser")
