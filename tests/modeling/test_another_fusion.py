"""A trained model of several sensors gets another fusion and keeps everything else."""

import pytest
import torch
from tiny_modality_models import aligned, mit_fusion, stirred

from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation

# with these start values the streams pass as they are
IDENTITIES = ("gemini", "cross_attention", "channel_exchange")


@pytest.fixture(scope="module")
def apart():
    """A model whose streams do not meet."""
    torch.manual_seed(0)
    return stirred(ModalityFusionForSemanticSegmentation(mit_fusion(fusion_type=None, num_labels=3))).eval()


@pytest.mark.parametrize("name", MODALITY_FUSIONS)
def test_all_but_the_fusion_stays(apart, name):
    model = apart.with_fusion(name, modality_dropout=0.3).eval()
    assert (model.config.fusion_type, model.config.modality_dropout) == (name, 0.3)
    assert apart.config.fusion_type is None
    state = model.state_dict()
    for key, tensor in apart.state_dict().items():
        assert torch.equal(state[key], tensor), key
    if name in IDENTITIES:
        images = aligned()
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, apart(images).logits, rtol=1e-4, atol=1e-5)


def test_there_and_back(apart):
    back = apart.with_fusion("gemini").with_fusion(None).eval()
    images = aligned()
    with torch.no_grad():
        assert torch.equal(back(images).logits, apart(images).logits)


def test_what_changes_more_is_refused(apart):
    with pytest.raises(ValueError, match="change the fusion alone"):
        apart.with_fusion("gemini", decoder_hidden_size=24)
