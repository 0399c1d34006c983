"""What every vitweave config shares: unknown keywords are refused."""

import difflib
import logging
from dataclasses import fields

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Keywords that are no fields of PreTrainedConfig but that transformers itself reads or writes in a config.json.
LIBRARY_KEYS = frozenset(
    [
        *("attn_implementation", "experts_implementation", "output_attentions", "per_layer_config", "use_return_dict"),
        *("auto_map", "model_type", "name_or_path", "num_labels", "torch_dtype", "transformers_version"),
        *(
            "base_model_tp_plan",
            "is_decoder",
            "pruned_heads",
            "quantization_config",
            "tie_word_embeddings",
            "use_cache",
        ),
    ]
)


@strict
class VitweaveConfig(PreTrainedConfig):
    """Base of the vitweave configs.

    transformers keeps any keyword it does not know as an attribute, so a misspelt option would be accepted and ignored;
    here it is an error that names the closest options. A saved config.json may hold extra entries (written by a newer
    version, or attributes set by hand): those are kept, with a warning.
    """

    def __post_init__(self, **extra):
        known = {field.name for field in fields(self)} | set(self.attribute_map) | LIBRARY_KEYS
        unknown = sorted(name for name in extra if name not in known and not name.startswith("_"))
        if unknown:
            hints = {name: difflib.get_close_matches(name, known, n=2) for name in unknown}
            told = "; ".join(
                f"{name!r}" + (f" (did you mean {' or '.join(h)}?)" if h else "") for name, h in hints.items()
            )
            if self.transformers_version is None:
                raise ValueError(f"{type(self).__name__} has no option {told}")
            logger.warning("this config.json holds options that %s does not read: %s", type(self).__name__, told)
        super().__post_init__(**extra)

    def __setattr__(self, key, value):
        super().__setattr__(key, value)
        if key == "dtype":  # transformers hands it one level down; a composite may hold composites
            for name in self.sub_configs:
                part = getattr(self, name, None)  # not all are stored under this name
                if isinstance(part, PreTrainedConfig):
                    part.dtype = value
