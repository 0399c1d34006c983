"""DeiT (arXiv:2012.12877): a ViT with a second class token for distillation."""

from transformers import PreTrainedModel

from vitweave.modeling.conversion.host_family import HostFamily, has_parameter
from vitweave.modeling.conversion.vit import RENAMES, vit_arguments, vit_options


def deit_options(model: PreTrainedModel) -> dict:
    """As ViT, with two class tokens, and two classifiers where the teacher's is there."""
    distilled = has_parameter(model, "distillation_classifier.weight")
    return {**vit_options(model), "num_cls_tokens": 2, "classifier_input": "cls_distilled" if distilled else "cls"}


DEIT = HostFamily(
    options=deit_options,
    renames=(
        *RENAMES,
        (r"^embeddings\.cls_token$", "embeddings.cls_token[0]"),
        (r"^embeddings\.distillation_token$", "embeddings.cls_token[1]"),
    ),
    prefixes=("deit.",),
    base_class="DeiTModel",
    classifiers={"cls": "DeiTForImageClassification", "cls_distilled": "DeiTForImageClassificationWithTeacher"},
    base_arguments=vit_arguments,
)
