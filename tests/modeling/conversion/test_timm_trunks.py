"""Releases whose ConvNeXt has norms that only timm knows."""

import re

import pytest
import torch

pytestmark = [pytest.mark.torchvision, pytest.mark.slow]
pytest.importorskip("torchvision", reason="needs torchvision")
timm = pytest.importorskip("timm", reason="needs timm")

from official_checkpoints import DEPTHS, DIMS, TEXT, convnext, llava_hr, random_tensors  # noqa: E402
from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel  # noqa: E402

from vitweave.configuration.multi_encoder_presets import multi_encoder_preset  # noqa: E402
from vitweave.modeling.conversion.encoder_names import CONVNEXT, TIMM_CONVNEXT  # noqa: E402
from vitweave.modeling.conversion.release import Part, converted  # noqa: E402
from vitweave.modeling.convert_multi_encoder import convert_multi_encoder  # noqa: E402
from vitweave.modeling.vision_encoder import VisionEncoder  # noqa: E402

SIZES = {"dims": DIMS, "depths": DEPTHS}


@pytest.mark.parametrize("scale", ["gamma", "weight"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_names_are_those_of_timm(scale, wrapped):
    """The stages of timm's own model, through ConvNextModel where the eps allows it, and through the wrapper."""
    state = random_tensors(convnext(scale, head=True))
    eps = 1e-5 if wrapped else 1e-6
    model = timm.models.convnext.ConvNeXt(num_classes=0, norm_eps=eps, **SIZES).eval()
    model.load_state_dict({re.sub(r"(blocks\.\d+)\.weight$", r"\1.gamma", n): t for n, t in state.items()})
    if wrapped:
        encoder = VisionEncoder(
            TimmWrapperConfig(architecture="convnext_xxlarge", model_args=SIZES), layers=[1, 2, 3, 4]
        )
    else:
        config = {"model_type": "convnext", "hidden_sizes": DIMS, "depths": DEPTHS}
        encoder = VisionEncoder(config, layers=[1, 2, 3, 4], final_norm=False)
    names = TIMM_CONVNEXT if wrapped else CONVNEXT
    encoder.model.load_state_dict(converted([Part("", "", names)], state), strict=True)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.forward_intermediates(pixels, intermediates_only=True)
        found = encoder.eval()(pixels).feature_maps
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_tower_on_a_trunk_of_timm(tmp_path):
    """As LLaVA-HR-X; its sizes, too, follow from the tensors."""
    state = random_tensors(llava_hr(clip_width=64, side=24))
    model, report = convert_multi_encoder(state, "llava-hr-x", tower_only=True)
    assert isinstance(model.encoder_1.model, TimmWrapperModel)
    assert model.config.encoder_configs[1].model_args == SIZES
    assert model.encoder_1.model.timm_model.stem[1].eps == 1e-5
    assert model.config.in_channels == [64, 64] and not report.new
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())

    tiny = multi_encoder_preset("llava-hr-x", tiny=True)  # its trunk is transformers'
    slow = TimmWrapperConfig(architecture="convnext_xxlarge", model_args=SIZES)
    options = [tiny.encoder_options[0], {**tiny.encoder_options[1], "channels": 64, "stride": 32}]
    changes = {"encoder_configs": [tiny.encoder_configs[0], slow], "encoder_options": options}
    config = multi_encoder_preset("llava-hr-x", tiny=True, **changes)
    state = {name: tensor for name, tensor in random_tensors(llava_hr()).items() if "head.norm" not in name}
    whole, report = convert_multi_encoder(state, "llava-hr-x", config, text_config=TEXT)
    assert {name.rpartition("timm_model.")[2] for name in report.new} == {"head.norm.weight", "head.norm.bias"}
    with torch.no_grad():
        tokens = whole.model.vision_tower(torch.randn(1, 3, 256, 256)).last_hidden_state
    assert tokens.shape == (1, config.num_tokens, 32) and tokens.isfinite().all()
