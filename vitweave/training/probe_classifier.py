"""A linear probe becomes the classifier of a model that can be published."""

import copy

import torch

from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification, SpecializedViTModel
from vitweave.modeling.specialize import specialize
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.linear_probes import LinearProbes


def probe_classifier(
    encoder: VisionEncoder, probes: LinearProbes, avgpool: bool | None = None, **flags
) -> SpecializedViTForImageClassification:
    """The encoder as a specialised ViT with the best probe of its last layer; its logits are the probe's.

    Args:
        encoder: what the probes were trained on; it is copied.
        avgpool: the probe of class token and mean patch, or of the class token alone; None = the better one.
        flags: what [CLS] shall own, as for `SpecializedViTModel.from_vit`.
    """
    kinds = [figure.kind for figure in probes.figures if figure.num_layers == 1]
    kinds = [kind for kind in kinds if avgpool is None or kind.avgpool == avgpool]
    if not kinds:
        raise ValueError(
            f"expected a probe that reads the last layer alone, got {sorted(probes.heads)}; train with "
            "layer_counts=(1,)"
        )
    weight, bias = probes.heads[kinds[0].name]
    options = {"id2label": probes.id2label, "label2id": {name: index for index, name in probes.id2label.items()}}
    options["classifier_input"] = "cls_mean" if kinds[0].avgpool else "cls"
    model = with_classifier(encoder, options, flags)
    if model.config.final_norm == "pooled":
        if kinds[0].avgpool or model.config.pooling != "cls":
            raise ValueError(
                f"the final norm of {encoder.config.model_type} is for its pooled output only, so no classifier reads "
                "what the probe read; use a probe of the class token (avgpool=False) of a model that pools it"
            )
        model.config.classifier_input = "pooled"  # the class token after the final norm
    with torch.no_grad():
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(bias)
    return model


def with_classifier(encoder: VisionEncoder, options: dict, flags: dict) -> SpecializedViTForImageClassification:
    """The encoder's copy below a classifier whose weights do not matter yet."""
    if not isinstance(encoder.model, SpecializedViTModel):
        return specialize(encoder.model, SpecializedViTForImageClassification, **options, **flags)
    if flags:
        raise ValueError(f"the encoder is a specialised ViT already; it does not take {sorted(flags)}")
    config = copy.deepcopy(encoder.config)
    for name, value in {**options, "use_pooler": False}.items():
        setattr(config, name, value)
    model = SpecializedViTForImageClassification(config).to(encoder.model.dtype).to(encoder.model.device)
    state = {name: value for name, value in encoder.model.state_dict().items() if not name.startswith("pooler.")}
    model.specialized_vit.load_state_dict(state)
    return model.train(encoder.model.training)
