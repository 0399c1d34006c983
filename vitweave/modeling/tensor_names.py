"""From the tensor names in a file to the names of a model in memory.

`save_pretrained` writes the native encoders inside our models under the names of their official releases
(`attention.attention.query`), while in memory they are called differently (`attention.q_proj`), and differently again
in other versions of transformers. So files are exchangeable between versions, and everything that reads one has to
translate.
"""

from copy import deepcopy

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key


def repair_scopes(conversions: list[WeightTransform]):
    """Name each conversion's sub-model relative to the base model, in place.

    transformers 5.13 keeps the head's prefix (`toy.encoder` for `encoder`), so a head opened from its base model's
    checkpoint would leave the native encoders in it random. Newer versions give nothing to repair.
    """
    for conversion in conversions:
        if conversion.scope_prefix and conversion.base_model_prefix:
            conversion.scope_prefix = conversion.scope_prefix.removeprefix(f"{conversion.base_model_prefix}.")


def to_live_names(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the tensors of a file, by the rules `from_pretrained` follows; live names stay as they are.

    Args:
        model: where the tensors belong.
        tensors: of a whole checkpoint, of one shard, or already under live names.
    """
    live = model.state_dict().keys()
    conversions = get_model_conversion_mapping(model)
    repair_scopes(conversions)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    translated, to_convert = {}, {}
    for name, tensor in tensors.items():
        new_name, pattern = rename_source_key(name, renamings, converters)
        if new_name not in live:
            translated[name] = tensor
        elif pattern is None:
            translated[new_name] = tensor
        else:  # e.g. one fused qkv tensor that becomes three
            converter = to_convert.setdefault(new_name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(new_name, name, pattern, tensor)
    for name, converter in to_convert.items():
        converted = converter.convert(name, model=model, config=model.config)
        translated |= {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}
    return translated
