"""The weights of one encoder for the streams of all modalities."""

import torch
from torch import Tensor

from vitweave.modeling.modality_fusion.base import ModalityFusion, ModalityNorm
from vitweave.modeling.modality_layers import PerModality
from vitweave.modeling.modality_streams.auxiliary import AuxiliaryMerge
from vitweave.modeling.modality_streams.base import ModalityStreams


@torch.no_grad()
def fill_streams(streams: ModalityStreams, tensors: dict[str, Tensor]) -> None:
    """Copy weights by their names in the streams; a norm's row, or a whole layer, is copied for every modality.

    What merges and fuses stays as it is. Everything else must be there, and nothing may be left over.
    """
    own = dict(streams.named_parameters())
    counts = {name: len(part) for name, part in streams.named_modules() if isinstance(part, PerModality)}
    for name in [name for name in tensors if name.rpartition(".")[0] in counts]:
        layer, _, leaf = name.rpartition(".")
        tensors = tensors | {f"{layer}.{index}.{leaf}": tensors[name] for index in range(counts[layer])}
        del tensors[name]
    new = {f"{name}." for name, part in streams.named_modules() if isinstance(part, (ModalityFusion, AuxiliaryMerge))}
    missing = [name for name in own if name not in tensors and not name.startswith(tuple(new))]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        raise ValueError(
            f"the encoder and the streams do not fit: it has no weights for {missing[:3]} ({len(missing)} in all), and"
            f" the streams no place for {unknown[:3]} ({len(unknown)} in all); build them from the encoder's own config"
        )
    norms = {f"{name}." for name, part in streams.named_modules() if isinstance(part, ModalityNorm)}
    for name, tensor in tensors.items():
        per_modality = name.rpartition(".")[0] + "." in norms
        if own[name].shape[int(per_modality) :] != tensor.shape:
            raise ValueError(
                f"expected {name} of the shape {tuple(own[name].shape[int(per_modality) :])}, got {tuple(tensor.shape)}"
                " from the encoder; build the streams from its own config"
            )
        own[name].copy_(tensor)
