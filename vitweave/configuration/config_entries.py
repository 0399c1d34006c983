"""What the entries of a config may hold, whoever wrote the file: sizes a machine can build, and nothing that runs code.

transformers trusts a config.json: `num_labels` becomes a dict of so many names at once, an attention implementation may
be the name of a kernel on the Hub, and any other entry replaces the attribute of that name, methods included.
"""

import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import NoneType

import torch
from transformers.activations import ACT2FN

MAX_LABELS = 2**18  # the largest public data sets name about 200,000 classes
MAX_LAYERS = 512  # the deepest released models have fewer than 200
MAX_LENGTH = 512  # of a list; no option has more entries than layers
MAX_DEPTH = 20  # of dicts inside dicts
MAX_ENTRIES = 20_000
MAX_PARTS = 64  # configs inside a config
LARGEST_OPTION = 2**31 - 1  # of a whole number among our own options
LARGEST = 2**53  # of any whole number: more than a float, and so JSON, can tell apart

# entries by name: (pattern, smallest, largest); the first that matches counts
SIZES = (
    (re.compile(r"num_labels"), 0, MAX_LABELS),
    (re.compile(r"num_hidden_layers|depths?|num_(encoder_)?blocks"), 0, MAX_LAYERS),
    (re.compile(r"(.*_)?layers|n_layers?"), -MAX_LAYERS, MAX_LAYERS),
    (re.compile(r".*experts"), 0, 2**12),
    (re.compile(r"modalities|encoder_configs|encoder_options|tile_levels"), 1, 64),
    (re.compile(r"(.*_)?(patch|kernel|stride|group)_?sizes?|strides?|factor|.*_channels"), 1, 2**12),
    (re.compile(r"(.*_)?(image|img)_size"), 1, 2**16),
    (re.compile(r"(.*_)?(hidden|embed|projection|model)_(size|dim)s?|d_model|embed_dims?"), 1, 2**20),
    (re.compile(r"(intermediate|ffn)_size|mlp_dim|d_ff"), 1, 2**24),
    (re.compile(r"(.*_)?(num_attention_|num_|_)heads?"), 1, 2**16),
    (re.compile(r"(.*_)?vocab_size"), 0, 2**26),
    (re.compile(r"num_.*tokens"), 0, 2**20),
    (re.compile(r"mlp_ratios?"), 0, 2**10),
)
ACTIVATIONS = ("hidden_act", "pooler_act", "hidden_activation", "activation_function")
LISTED_FREELY = ("class_weights", "id2label", "label2id", "architectures")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
EXPERTS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
OWN_ATTENTION = ("eager", "sdpa", "flex_attention")  # in torch itself; the others load a package or a kernel
OWN_EXPERTS = ("eager", "batched_mm", "grouped_mm")
CODE = ("custom_pipelines",)
TIMM_ARGUMENTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "scriptable")


def check_stored(entries: Mapping, role: str) -> None:
    """Refuse what a config.json, or the dict of a config inside another, has no business to hold.

    Args:
        role: the config's name for messages, e.g. "encoder_config".
    """
    if not isinstance(entries, Mapping):
        raise ValueError(f"expected {role} to be a mapping of options, got {type(entries).__name__}")
    check_amount(entries, role)
    waiting = [entries]
    while waiting:
        some = waiting.pop()
        for name, value in some.items():
            check_code(name, value, role, some.get("model_type"))
            check_entry(name, value, role)
            waiting += [part for part in (value if isinstance(value, list | tuple) else [value]) if is_mapping(part)]


def is_mapping(value: object) -> bool:
    """Whether a value has entries of its own."""
    return isinstance(value, Mapping)


def check_amount(value: object, role: str) -> None:
    """Refuse entries nested too deep or too many of them, before anything walks through them recursively."""
    layer, entries, parts = [value], 0, 0
    for _ in range(MAX_DEPTH):
        inner = []
        for one in layer:
            if isinstance(one, Mapping):
                parts += "model_type" in one
                kept = (part for name, part in one.items() if name not in LISTED_FREELY)
            else:
                kept = one if isinstance(one, list | tuple | set) else ()
            inner += kept
        entries += len(inner)
        if entries > MAX_ENTRIES or parts > MAX_PARTS:
            raise ValueError(
                f"expected {role} of at most {MAX_ENTRIES} entries and {MAX_PARTS} configs inside one another, got more"
            )
        if not inner:
            return
        layer = inner
    raise ValueError(f"expected {role} nested at most {MAX_DEPTH} deep, got more")


def check_code(name: str, value: object, role: str, model_type: object = None) -> None:
    """Refuse entries that choose which code runs, or that make building a model fetch or open other files."""
    if not isinstance(name, str):
        return  # of id2label
    for names, known in ((ATTENTION, OWN_ATTENTION), (EXPERTS, OWN_EXPERTS)):
        if name in names:
            chosen = value.values() if isinstance(value, Mapping) else [value]
            strange = [one for one in chosen if one is not None and one not in known]
            if strange:
                raise ValueError(
                    f"expected {name} in {role} to be one of {list(known)}, got {strange[0]!r:.100}: a config cannot"
                    f" choose kernels. Choose them when loading: from_pretrained(..., {names[0]}={strange[0]!r:.100})"
                )
    if name.startswith("__") or name in CODE:
        raise ValueError(f"expected options in {role}, got {name!r:.100}, which would change code; remove it")
    if name == "model_args" and isinstance(value, Mapping):
        check_places({key: value[key] for key in TIMM_ARGUMENTS if value.get(key)}, role)
    if name == "use_pretrained_backbone" and value:
        check_places({name: value}, role)
    if name == "backbone" and value is not None and (model_type != "timm_backbone" or is_place(value)):
        check_places({name: value}, role)
    if name == "architecture" and is_place(value):
        check_places({name: value}, role)


def is_place(value: object) -> bool:
    """Whether timm would look this architecture up on the Hub or in a folder."""
    return not isinstance(value, str) or re.search(r"[:/\\]", value) is not None


def check_places(found: Mapping, role: str) -> None:
    """Refuse entries whose weights or configs would be looked up elsewhere."""
    if found:
        raise ValueError(
            f"expected a {role} that is complete, got {found!r:.200}: building a model neither downloads nor opens"
            " other files. Give the config itself, or load those weights first and build from the loaded model"
        )


def check_entry(name: str, value: object, role: str, largest: int = LARGEST) -> None:
    """Refuse numbers that no model has: not a number, negative or huge where `SIZES` says what is possible."""
    if name in ("dtype", "torch_dtype"):
        check_dtype(name, value, role)
    if name in ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
        raise ValueError(f"expected {name} in {role} to be one of {sorted(ACT2FN)}, got {value!r:.100}")
    if name in ("id2label", "label2id") and not isinstance(value, Mapping | NoneType):
        raise ValueError(f"expected {name} in {role} to be a mapping, got {value!r:.100}")
    if not isinstance(name, str) or isinstance(value, str | bool) or value is None:
        return
    low, high = limits(name) or (-largest, largest)
    is_list = isinstance(value, list | tuple | set)
    longest = MAX_LABELS if name in LISTED_FREELY else 16 if name == "modalities" else MAX_LENGTH
    if (is_list and len(value) > longest) or (name in LISTED_FREELY and len_of(value) > longest):
        raise ValueError(f"expected at most {longest} entries of {name} in {role}, got {len(value)}")
    numbers = [one for one in (value if is_list else [value]) if isinstance(one, int | float) and one is not True]
    if any(isinstance(one, float) and math.isnan(one) for one in numbers):
        raise ValueError(f"expected a number for {name} in {role}, got nan")
    for one in numbers if limits(name) else (n for n in numbers if isinstance(n, int)):
        if not low <= one <= high:
            raise ValueError(f"expected {name} in {role} from {low} to {high}, got {shown_number(one)}")
    if high == MAX_LAYERS and is_list and name in ("depth", "depths") and sum(map(abs, numbers)) > MAX_LAYERS:
        raise ValueError(f"expected {name} in {role} of at most {MAX_LAYERS} blocks in all, got {sum(numbers)}")


@lru_cache(maxsize=4096)
def limits(name: str) -> tuple[int, int] | None:
    """Smallest and largest number of an entry, None where its name does not tell."""
    return next(((low, high) for known, low, high in SIZES if known.fullmatch(name)), None)


def check_option(name: str, value: object, role: str) -> None:
    """Refuse a value of one of our own options, on top of its type: too much, too large, infinite or not a number."""
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, Mapping | Sequence):
        check_amount(value, f"{name} of {role}")
    check_entry(name, value, role, LARGEST_OPTION)
    if isinstance(value, Mapping) and not name.endswith("config"):  # those are checked as configs
        for key, part in value.items():
            check_option(str(key), part, role)
    listed = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(one, float) and math.isinf(one) for one in listed):
        raise ValueError(f"expected a finite number for {name} in {role}, got {value!r:.100}")


def len_of(value: object) -> int:
    """How many entries a value has, 0 for one that is no collection."""
    return len(value) if isinstance(value, Mapping | Sequence) else 0


def shown_number(number: int | float) -> str:
    """A number; a whole one of very many digits by its size, which printing would refuse."""
    return str(number) if isinstance(number, float) or abs(number) < 10**30 else f"one of {number.bit_length()} bits"


def check_dtype(name: str, value: object, role: str) -> None:
    """Refuse what is not the name of a type of torch; transformers would take any attribute of torch for one."""
    if value is None or isinstance(value, torch.dtype | Mapping):
        return
    if not isinstance(value, str) or not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        if value == "auto":
            return
        raise ValueError(f"expected {name} in {role} such as 'float32' or 'bfloat16', got {value!r:.100}")


def without_auto_map(value: object) -> object:
    """The same entries without any `auto_map`, at every depth."""
    if isinstance(value, dict):
        return {key: without_auto_map(part) for key, part in value.items() if key != "auto_map"}
    return [without_auto_map(part) for part in value] if isinstance(value, list | tuple) else value
