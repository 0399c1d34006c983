"""What every vitweave config shares: unknown keywords are refused."""

import difflib
import logging
import os
from dataclasses import fields
from types import NoneType

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from vitweave.configuration.config_entries import check_option, check_stored

logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 1000
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

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; what a file says is checked first, the caller's own arguments come on top."""
        check_stored(config_dict, cls.__name__)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            if len(str(error)) < LONGEST_MESSAGE:
                raise
            raise ValueError(f"{str(error)[:LONGEST_MESSAGE]} ...") from None  # it quotes the whole value

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike):
        """As in transformers, with the checks of `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

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
        self.check_extra(extra)
        extra.pop("use_return_dict", None)  # read-only; older versions wrote it
        super().__post_init__(**extra)

    def check_extra(self, extra: dict) -> None:
        """Refuse entries that would replace a part of the class, and those transformers reads of another kind."""
        taken = sorted(name for name in extra if name not in LIBRARY_KEYS and hasattr(type(self), name))
        taken = [name for name in taken if name not in self.attribute_map and not is_settable(type(self), name)]
        if taken:
            raise ValueError(f"expected options of {type(self).__name__}, got {taken[0]!r}, a part of the class itself")
        if extra.get("per_layer_config") is not None:
            raise ValueError(
                f"{type(self).__name__} has the same options for all layers, got a per_layer_config; remove it"
            )
        for name in ("auto_map", "quantization_config", "pruned_heads"):
            if name in extra and not isinstance(extra[name], dict | NoneType) and not hasattr(extra[name], "to_dict"):
                raise ValueError(f"expected {name} to be a mapping, got {extra[name]!r:.100}")

    def __setattr__(self, key, value):
        check_option(key, value, type(self).__name__)
        super().__setattr__(key, value)
        if key == "dtype":  # transformers hands it one level down; a composite may hold composites
            for name in self.sub_configs:
                part = getattr(self, name, None)  # not all are stored under this name
                if isinstance(part, PreTrainedConfig):
                    part.dtype = value


def is_settable(kind: type, name: str) -> bool:
    """Whether an attribute of the class is a property made to be set."""
    return getattr(getattr(kind, name), "fset", None) is not None
