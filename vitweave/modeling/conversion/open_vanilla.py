"""Open a vanilla ViT by folder or Hub id, as the class its weights were saved from."""

import re
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedModel

from vitweave.modeling.conversion.registry import find_family

LOAD_OPTIONS = ("cache_dir", "dtype", "local_files_only", "revision", "subfolder", "token", "attn_implementation")
# Saved without these, a model is complete all the same; what the class adds at random is left out.
OPTIONAL = re.compile(r"(.*\.)?(pooler\.dense|mask_token|classifier|head)(\.|$)")


def open_vanilla(source: str | Path, classifier: bool, **load_options) -> tuple[PreTrainedModel, set[str]]:
    """Load a vanilla ViT from safetensors.

    Args:
        classifier: prefer the classification class where the checkpoint does not name its class (timm).
        load_options: of `from_pretrained`, those in `LOAD_OPTIONS`.

    Returns:
        the model in evaluation mode, and the names of parameters that the checkpoint does not hold.
    """
    hub = {key: value for key, value in load_options.items() if key not in ("dtype", "attn_implementation")}
    config = AutoConfig.from_pretrained(source, **hub)
    family = find_family(config)
    saved_as = (config.architectures or [None])[0]
    class_name = saved_as if saved_as in family.class_names else family.base_class
    if saved_as is None and classifier and config.num_labels and family.classifiers:
        class_name = next(iter(family.classifiers.values()))
    model, info = getattr(transformers, class_name).from_pretrained(
        source, output_loading_info=True, use_safetensors=True, **load_options
    )
    missing = set(info["missing_keys"])
    lost = sorted(name for name in missing if not OPTIONAL.match(name))
    if lost:
        raise ValueError(
            f"the checkpoint {str(source)!r} is incomplete: {len(lost)} weights of {class_name} are missing, first"
            f" {lost[:3]}"
        )
    return model, missing
