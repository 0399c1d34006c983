"""Stock transformers composites over our backbones: which take them, train and reload, and why the others do not."""

import pytest
import torch
from stock_hosts import BACKBONES, HOSTS, Host, pixels, vit
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    DPTConfig,
    DPTForSemanticSegmentation,
    VisionTextDualEncoderModel,
)
from transformers.backbone_utils import BackboneMixin

from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.pretrained import VitweavePreTrainedModel

ONE_STRIDE = "[Ss]izes? of tensor"  # each level must be half as large as the one before
ONE_MAP = "index out of range|size of tensor"  # there is one map, where several are wanted
REASONS = {
    "RTDetrForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "RTDetrV2ForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "DFineForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "Deimv2ForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "PPDocLayoutV3ForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "OmDetTurboForObjectDetection": {"specialized_vit": ONE_STRIDE, "multi_encoder": ONE_MAP},
    "DetrForSegmentation": {"multi_encoder": ONE_MAP},
    "MaskFormerForInstanceSegmentation": {"multi_encoder": ONE_MAP},
    "Mask2FormerForUniversalSegmentation": {"multi_encoder": ONE_MAP},
    "OneFormerForUniversalSegmentation": {"multi_encoder": ONE_MAP},
    "UperNetForSemanticSegmentation": {"multi_encoder": ONE_MAP},
    "VitMatteForImageMatting": {"modality_fusion": "to have 3 channels"},  # it reads the image itself, too
    # VitPose reads patch tokens without [CLS], CHMv2 `cls_tokens` as only DINOv3 gives them, TVP `hidden_sizes`
    "VitPoseForPoseEstimation": dict.fromkeys(BACKBONES, "invalid for input of size|should have an?"),
    "CHMv2ForDepthEstimation": dict.fromkeys(BACKBONES, "cls_tokens|hidden_size"),
    "TvpForVideoGrounding": dict.fromkeys(BACKBONES, "hidden_sizes"),
}
for name in ("DPT", "DepthAnything", "PromptDepthAnything", "ZoeDepth"):  # they read token sequences, not maps
    maps_only = [backbone for backbone in BACKBONES if backbone != "specialized_vit"]
    REASONS[f"{name}ForDepthEstimation"] = dict.fromkeys(
        maps_only, "patch_size|too many values to unpack|number of hidden states"
    )
FAST = {  # every backbone and every kind of host once
    ("DeformableDetrForObjectDetection", "specialized_vit"),
    ("RTDetrForObjectDetection", "layer_fusion"),
    ("DetrForObjectDetection", "multi_encoder"),
    ("UperNetForSemanticSegmentation", "multi_encoder_pyramid"),
    ("Mask2FormerForUniversalSegmentation", "modality_fusion"),
    ("DPTForDepthEstimation", "specialized_vit"),
    ("RTDetrForObjectDetection", "specialized_vit"),
    ("DPTForDepthEstimation", "layer_fusion"),
}


def pairs(refused: bool) -> list:
    """The pairs that work, or those that do not; most of them are slow tests."""
    return [
        pytest.param(
            host,
            backbone,
            id=f"{host.name}-{backbone}",
            marks=[] if (host.name, backbone) in FAST else [pytest.mark.slow],
        )
        for host in HOSTS
        for backbone in BACKBONES
        if (backbone in REASONS.get(host.name, {})) == refused
    ]


def train_once(host: Host, backbone: str):
    """A model, its loss, and the gradients of that loss."""
    torch.manual_seed(0)
    model = host.build(backbone).train()
    outputs = model(pixels(backbone), **host.inputs())
    loss = getattr(outputs, "loss", None)
    if loss is None:  # OmDet-Turbo's first output, the boxes, has a last layer that starts at zero
        loss = outputs.get("decoder_class_logits", outputs.to_tuple()[0]).square().mean()
    loss.backward()
    return model, loss


def parts_of(backbone: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What a backbone is made of (embeddings, encoders, fusion), where it has weights."""
    return {name: part for name, part in backbone.named_children() if any(True for _ in part.parameters())}


def own_backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The backbone of ours that the host holds."""
    kinds = (BackboneMixin, VitweavePreTrainedModel)
    return next(part for part in model.modules() if all(isinstance(part, kind) for kind in kinds))


@pytest.mark.parametrize(("host", "backbone"), pairs(refused=False))
def test_trains_and_reloads(host, backbone, tmp_path):
    model, loss = train_once(host, backbone)
    ours = own_backbone(model)
    assert loss.isfinite()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name in parts_of(ours):
        assert any(gradient.any() for known, gradient in gradients.items() if known.startswith(name)), name

    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(AutoConfig.from_pretrained(tmp_path).backbone_config) is type(model.config.backbone_config)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    images, again = pixels(backbone), own_backbone(loaded.eval())
    with torch.no_grad():
        for one, other in zip(ours(images).feature_maps, again(images).feature_maps, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("host", "backbone"), pairs(refused=True))
def test_says_what_it_cannot_read(host, backbone):
    errors = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
    with pytest.raises(errors, match=REASONS[host.name][backbone]):
        train_once(host, backbone)


def test_dpt_builds_its_own_encoder_for_segmentation():
    """It takes a `backbone_config` and does not look at it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = DPTConfig(backbone_config=vit(0, 8), is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], **sizes)
    model = DPTForSemanticSegmentation(config)
    assert not any(isinstance(part, VitweavePreTrainedModel) for part in model.modules())


def test_is_the_vision_tower_of_a_dual_encoder(tmp_path):
    torch.manual_seed(0)
    text = BertModel(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    model = VisionTextDualEncoderModel(vision_model=SpecializedViTModel(vit(1, 8)), text_model=text).eval()
    inputs = {"pixel_values": pixels("specialized_vit"), "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
