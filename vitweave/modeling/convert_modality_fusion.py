"""Released modality-fusion checkpoints (GeminiFusion, TokenFusion, CMX, SegFormer) become models of ours, and back.

Every tensor of a release is copied, or left out for a reason that the report names; anything else is an error.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.conversion.modality_release import ModalityRelease, OfficialState
from vitweave.modeling.conversion.modality_release_registry import find_modality_release
from vitweave.modeling.conversion.modality_sizes import ENSEMBLE, has_untrained_ensemble
from vitweave.modeling.conversion.placed_tensors import load_state, refuse
from vitweave.modeling.conversion.report import ConversionReport
from vitweave.modeling.conversion.stored_tensors import Source, StoredTensors
from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation, ModalityFusionModel

NEVER_TRAINED = "weights of the ensemble, all 1 because never trained: it is the mean"
# options of fusions that say how training starts, or what the official code does not know
NOT_OFFICIAL = ("start", "start_score", "start_gate", "start_scale", "seed", "partition", "scale_alone")


def convert_modality_fusion(
    source: Source,
    release: str,
    config: ModalityFusionConfig | None = None,
    *,
    modalities: Sequence[str] | None = None,
    num_attention_heads: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, ConversionReport]:
    """Turn a released checkpoint into a segmenter, of "mit" into an encoder.

    Args:
        source: a safetensors file, a folder with such files, or tensors by name. A `module.` in front of all names is
            ignored.
        release: "gemini-fusion", "gemini-fusion-swin", "gemini-fusion-deliver", "token-fusion", "cmx", "segformer", or
            "mit", the encoder alone.
        config: None reads the sizes off the tensors and sets what the official code does.
        modalities: names, main one first; None is rgb and depth (and event and lidar). Of "segformer" and "mit" any
            number, which all get the same weights; a fusion in a given config is new then.
        num_attention_heads: of a MiT's stages, which no tensor tells; None is 1, 2, 5, 8, as in B0 to B5.
        dtype: None is the one that most values are stored in.

    Returns:
        the model in evaluation mode, and what became of every tensor.
    """
    family, stored = find_modality_release(release), StoredTensors(source)
    state = OfficialState(stored)
    if config is None:
        config = released_config(state, family, modalities, num_attention_heads)
    elif modalities is not None or num_attention_heads is not None:
        raise ValueError("the config given names the modalities and the heads; leave the arguments out")
    report = checked(state, family, config)
    dtype = dtype or stored.usual_dtype()
    official = {
        name: tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in state.read()
        if name not in report.dropped
    }
    ours = family.table.to_ours(official, copies=config.num_modalities)
    return load_state(class_of(family), config, ours, dtype, report.new, stored.name), report


def to_released(model: PreTrainedModel, release: str) -> dict[str, Tensor]:
    """The tensors of a model under the official names, as the official model's `load_state_dict` takes them, strictly.

    Tensors that the official model has and never reads are zero. A model that the official code cannot compute is
    refused.
    """
    family, config = find_modality_release(release), model.config
    if not isinstance(model, class_of(family)):
        raise ValueError(f"expected a {class_of(family).__name__} for {release!r}, got a {type(model).__name__}")
    official = official_tensors(family, config, model.state_dict())
    state = OfficialState(StoredTensors(official))
    heads = config.stream_config.num_attention_heads if config.stream == "mit" else None
    wanted = released_config(state, family, config.modalities, heads)
    checked(state, family, wanted)
    expected, found = facts_of(wanted), facts_of(config)
    different = {name: (found.get(name), value) for name, value in expected.items() if found.get(name) != value}
    if different:
        told = ", ".join(f"{name}={ours!r}, not {theirs!r}" for name, (ours, theirs) in different.items())
        raise ValueError(f"the official code of {release!r} cannot compute this model: its config has {told}")
    return official


def released_config(
    state: OfficialState,
    family: ModalityRelease,
    modalities: Sequence[str] | None,
    num_attention_heads: Sequence[int] | None,
) -> ModalityFusionConfig:
    """The config that the tensors and the official code ask for."""
    fields, count = family.fields(state), family.count(state)
    if modalities is None:
        modalities = family.modalities[:count]
    if len(modalities) != count and not family.fusion_is_new:
        raise ValueError(f"{state.stored.name} is of {count} modalities, got the names {list(modalities)}")
    stream = fields["stream_config"]
    if stream.model_type == "segformer":
        if num_attention_heads is not None:
            stream.num_attention_heads = list(num_attention_heads)
        heads, widths = stream.num_attention_heads, stream.hidden_sizes
        if len(heads) != len(widths) or any(width % n for n, width in zip(heads, widths, strict=True)):
            raise ValueError(f"heads {heads} do not divide the widths {widths}; say how many in num_attention_heads")
    elif num_attention_heads is not None:
        raise ValueError("num_attention_heads are of a MiT; the tensors of a Swin tell its heads")
    return ModalityFusionConfig(modalities=list(modalities), **fields)


def class_of(family: ModalityRelease) -> type[PreTrainedModel]:
    """What a release becomes."""
    return ModalityFusionForSemanticSegmentation if family.has_decoder else ModalityFusionModel


def official_tensors(
    family: ModalityRelease, config: ModalityFusionConfig, ours: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Ours by their official names, with those that have no place in ours."""
    official = family.table.to_official(ours, groups=config.num_modalities - 1)
    if ENSEMBLE not in official and family.table.read(ENSEMBLE) is not None:
        official[ENSEMBLE] = next(iter(official.values())).new_ones(config.num_streams)
    return official | family.restored(official, config)


def checked(state: OfficialState, family: ModalityRelease, config: ModalityFusionConfig) -> ConversionReport:
    """Refuse by its official name what does not fit a model of this config."""
    with torch.device("meta"):
        live = class_of(family)(config).state_dict()
    new = [name for name in live if family.fusion_is_new and family.table.read_ours(name) is None]
    own = {name: tensor for name, tensor in live.items() if name not in new}
    dropped = family.dropped(state.shapes)
    if "ensemble.alpha" not in live and has_untrained_ensemble(state, config.num_streams):
        dropped[ENSEMBLE] = NEVER_TRAINED
    wanted = family.table.to_official(own, groups=config.num_modalities - 1)
    given = {name: tensor for name, tensor in state.shapes.items() if name not in dropped}
    shapes = [
        f"{name}: expected {list(wanted[name].shape)}, got {list(tensor.shape)}"
        for name, tensor in given.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    unknown, missing = sorted(given.keys() - wanted.keys()), sorted(wanted.keys() - given.keys())
    refuse(state.stored.name, unknown=unknown, missing=missing, shapes=shapes)
    holders: dict[str, list[str]] = {name: [] for name in own}
    for name in given:
        for ours in family.table.our_names(name):
            holders[ours].append(name)
    counts = {
        "copied": sum(tensor.numel() for tensor in own.values()),
        "dropped": sum(state.shapes[name].numel() for name in dropped),
        "new": sum(live[name].numel() for name in new),
    }
    copied = {ours: ", ".join(names) for ours, names in holders.items()}
    return ConversionReport(state.stored.name, class_of(family).__name__, copied, dropped, new, counts)


def facts_of(config: ModalityFusionConfig) -> dict:
    """What the outputs depend on besides sizes and weights."""
    options = {}
    if config.fusion_type is not None:
        arguments = inspect.signature(MODALITY_FUSIONS[config.fusion_type]).parameters.values()
        options = {a.name: a.default for a in arguments if a.kind is a.KEYWORD_ONLY and a.name not in NOT_OFFICIAL}
        options |= {name: value for name, value in (config.fusion_options or {}).items() if name in options}
    conv = config.layer_norm_eps if config.conv_norm_eps is None else config.conv_norm_eps
    return {
        "fusion_type": config.fusion_type,
        "layer_norm_eps": config.layer_norm_eps,
        "conv_norm_eps": conv,
        "decoder_options": config.decoder_options or {},
        **options,
    }
