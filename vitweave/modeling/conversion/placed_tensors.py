"""The tensors of a release in their places in our model: compared with the model's, then loaded."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from vitweave.modeling.conversion.release import Part, place, taken_apart
from vitweave.modeling.conversion.report import ConversionReport
from vitweave.modeling.conversion.stored_tensors import StoredTensors
from vitweave.modeling.tensor_names import to_live_names

SHOWN = 20  # names per kind of error


class PlacedTensors:
    """
    Args:
        stored: the release's tensors.
        parts: what goes where.
        given: models of encoders that the release does not hold, by what their names begin with in our model.
    """

    def __init__(self, stored: StoredTensors, parts: Sequence[Part], given: dict[str, PreTrainedModel]):
        self.stored, self.parts, self.given = stored, parts, given
        self.placement = place(parts, stored.shapes)

    def given_tensors(self) -> dict[str, Tensor]:
        """Of the models, by our names."""
        return {
            prefix + name: tensor for prefix, model in self.given.items() for name, tensor in model.state_dict().items()
        }

    def shapes(self) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
        """All tensors by our names, on the meta device; where each comes from; names that two tensors claim."""
        tensors = {name: tensor.to("meta") for name, tensor in self.given_tensors().items()}
        origin, twice = dict.fromkeys(tensors, "given encoder"), []
        for official in self.placement.placed:
            for name, tensor in taken_apart(self.placement, official, self.stored.shapes[official]).items():
                if name in tensors:
                    twice.append(f"{official} and {origin[name]} are both {name}")
                tensors[name], origin[name] = tensor, official
        return tensors, origin, twice

    def check(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> ConversionReport:
        """Refuse what does not fit a model of this config, before any value is read."""
        with torch.device("meta"):
            model = model_class(config)
        live = model.state_dict()
        tensors, origin, twice = self.shapes()
        found = tensors if tensors.keys() <= live.keys() else to_live_names(model, tensors)
        unknown = sorted({*self.placement.unknown, *(origin[name] for name in found if name not in live)})
        shapes = [
            f"{origin.get(name, name)}: expected {list(live[name].shape)}, got {list(tensor.shape)}"
            for name, tensor in found.items()
            if name in live and tensor.shape != live[name].shape
        ]
        tied = getattr(model, "all_tied_weights_keys", {})
        absent = [name for name in live if name not in found and tied.get(name) not in found]
        new = [name for name in absent if self.is_optional(name)]
        missing = [name for name in absent if name not in new]
        refuse(self.stored.name, unknown=unknown, missing=missing, shapes=shapes, twice=twice)
        dropped = self.placement.dropped
        counts = {
            "copied": sum(tensor.numel() for tensor in found.values()),
            "dropped": sum(self.stored.shapes[name].numel() for name in dropped),
            "new": sum(live[name].numel() for name in new),
        }
        copied = {name: origin.get(name, "given encoder") for name in found}
        return ConversionReport(self.stored.name, model_class.__name__, copied, dropped, new, counts)

    def is_optional(self, name: str) -> bool:
        """Whether a tensor of ours may be missing."""
        patterns = [re.escape(p.target) + end for p in self.parts if p.target is not None for end in p.names.optional]
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    def load(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, new: Sequence[str]
    ) -> PreTrainedModel:
        """The model with the values, which are copied, so that it shares no memory with the source.

        Args:
            new: names that may be missing.
        """
        state = {name: tensor.to(dtype, copy=True) for name, tensor in self.given_tensors().items()}
        for official, tensor in self.stored.read():
            if official in self.placement.placed:
                for name, piece in taken_apart(self.placement, official, tensor).items():
                    state[name] = piece.to(dtype, copy=True).contiguous()
        return load_state(model_class, config, state, dtype, new, self.stored.name)


def load_state(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    new: Sequence[str],
    source: str,
) -> PreTrainedModel:
    """A model with these values, in evaluation mode; only what `new` names may be missing.

    Args:
        source: where they come from, for messages.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is new is in the report
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    lost = sorted(set(info["missing_keys"]) - set(new))
    shapes = [str(entry) for entry in info["mismatched_keys"]]
    refuse(source, unknown=list(info["unexpected_keys"]), missing=lost, shapes=shapes)
    return model


SAYS = {
    "unknown": "tensors of unknown name",
    "missing": "tensors of ours that nothing in it is for",
    "shapes": "tensors of another shape",
    "twice": "tensors that are there twice",
}


def refuse(source: str, **problems: list[str]) -> None:
    """Raise one error that lists everything that is wrong, if anything is."""
    lines = []
    for kind, names in problems.items():
        if names:
            shown = sorted(names)[:SHOWN] + ([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])
            lines.append(f"{len(names)} {SAYS[kind]}:\n    " + "\n    ".join(shown))
    if lines:
        raise ValueError(
            f"{source} is not what the preset and the config expect:\n  "
            + "\n  ".join(lines)
            + "\nIs it another preset,"
            " or another size, for which a config must be given?"
        )
