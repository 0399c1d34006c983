"""A released multi-encoder checkpoint (LLaVA-HR, Mini-Gemini, EAGLE, LEO, Cambrian-1, InternVL) becomes one of ours.

Every tensor of the release is copied, or left out for a reason that the report names; anything else is an error.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.configuration.multi_encoder_presets import multi_encoder_preset
from vitweave.modeling.conversion.encoder_sizes import resized_encoder, tensors_below
from vitweave.modeling.conversion.language_models import text_config_of
from vitweave.modeling.conversion.placed_tensors import PlacedTensors
from vitweave.modeling.conversion.release import TOWER, Part, Placement, Release, converted, place
from vitweave.modeling.conversion.release_registry import find_release
from vitweave.modeling.conversion.report import ConversionReport
from vitweave.modeling.conversion.stored_tensors import Source, StoredTensors
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.modeling.vision_encoder import find_vision_model

PROJECTOR = "model.multi_modal_projector."
NOT_IN_A_TOWER = "part of the vision-language model, not of its tower"


def convert_multi_encoder(
    source: Source,
    preset: str,
    config: MultiEncoderConfig | None = None,
    *,
    text_config: PreTrainedConfig | None = None,
    encoders: Mapping[int, PreTrainedModel] | None = None,
    tower_only: bool = False,
    image_token_id: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, ConversionReport]:
    """Turn a released checkpoint into a tower, or into a vision-language model where it holds a language model.

    Args:
        source: a folder of the release with safetensors and its config.json, such files, or tensors by name. Files are
            read one after the other.
        preset: as in `multi_encoder_preset`.
        config: of the tower; None is the preset with the sizes that the tensors have.
        text_config: of the language model; None reads the release's config.json.
        encoders: by number, models with the weights of encoders that the release does not hold (those of Cambrian-1 are
            frozen and not saved with it).
        tower_only: leave the projector and the language model out.
        image_token_id: the placeholder of image tokens in the language model's vocabulary; the LLaVA family has none.
        dtype: None is the one that most values are stored in.

    Returns:
        the model in evaluation mode, and what became of every tensor.
    """
    stored, release = StoredTensors(source), find_release(preset)
    models = {index: find_vision_model(model) for index, model in (encoders or {}).items()}
    config = tower_config(stored, release, preset, models) if config is None else with_encoders(config, models)
    text = language_config(stored, release, text_config, tower_only)
    root = "" if text is None else TOWER
    given = {f"{root}encoder_{index}.model.": model for index, model in models.items()}
    tensors = PlacedTensors(stored, parts_of(release, config, text), given)
    check_encoders(config, tensors, root)
    model_class = MultiEncoderModel
    if text is not None:
        model_class = MultiEncoderVlmForConditionalGeneration
        config = vlm_config(config, text, release, tensors.placement, image_token_id)
    report = tensors.check(model_class, config)
    return tensors.load(model_class, config, dtype or stored.usual_dtype(), report.new), report


# Configs -------------------------------------------------------------------------------------------------------------


def tower_config(
    stored: StoredTensors, release: Release, preset: str, given: dict[int, PreTrainedModel]
) -> MultiEncoderConfig:
    """The preset with the sizes that the release's tensors have."""
    config = multi_encoder_preset(preset)
    tower = converted(parts_of(release, config, None), stored.shapes)
    members, options = list(config.encoder_configs), [dict(entry) for entry in config.encoder_options]
    for index, member in enumerate(members):
        if index in given:
            members[index] = given[index].config
            continue
        members[index] = resized_encoder(member, tensors_below(f"encoder_{index}.model.", tower))
        dims = (getattr(members[index], "model_args", None) or {}).get("dims")
        if dims:  # of timm's ConvNeXt, whose config does not tell its channels
            options[index]["channels"] = sum(dims[layer - (layer > 0)] for layer in config.options[index].layers)
    sizes = release.sizes(config, tower)
    return multi_encoder_preset(preset, encoder_configs=members, encoder_options=options, **sizes)


def with_encoders(config: MultiEncoderConfig, given: dict[int, PreTrainedModel]) -> MultiEncoderConfig:
    """The config for encoders that are given as models."""
    config = deepcopy(config)
    config.encoder_configs = [
        given[index].config if index in given else member for index, member in enumerate(config.encoder_configs)
    ]
    return config


def language_config(
    stored: StoredTensors, release: Release, text_config: PreTrainedConfig | None, tower_only: bool
) -> PreTrainedConfig | None:
    """The language model's config with the vocabulary of its tensors; None for a tower."""
    if tower_only:
        return None
    language = place(release.language_parts(None), stored.shapes).placed
    if not language:
        if text_config is not None:
            raise ValueError(f"a text_config was given, but {stored.name} holds no language model")
        return None
    text = text_config or text_config_of(stored.config, release.text_key)
    if text is None:
        raise ValueError(
            f"{stored.name} holds a language model, whose heads and rotary base its tensors do not tell: keep the"
            " release's config.json beside them, give text_config, or convert the tower alone (tower_only=True)"
        )
    text = deepcopy(text)
    tables = [stored.shapes[name] for name, (_, ours) in language.items() if ours[0].endswith("embed_tokens.weight")]
    if tables:
        text.vocab_size = tables[0].shape[0]
    return text


def vlm_config(
    tower: MultiEncoderConfig, text: PreTrainedConfig, release: Release, placement: Placement, image_token_id: int
) -> MultiEncoderVlmConfig:
    """The config of the whole; the projector follows from its tensors."""
    names = {name for _, ours in placement.placed.values() for name in ours if name.startswith(PROJECTOR)}
    layers = len({name.removeprefix(PROJECTOR).split(".")[0] for name in names if ".linear_" in name})
    projector = release.projector or (f"mlp{layers}x_gelu" if layers else "linear")
    return MultiEncoderVlmConfig(
        vision_config=tower,
        text_config=text,
        projector_type=projector,
        image_token_id=image_token_id,
        **release.vlm_options,
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def parts_of(release: Release, config: MultiEncoderConfig, text: PreTrainedConfig | None) -> list[Part]:
    """All parts of the release; without a language model those of the tower, under the names they have there."""
    parts = [*release.parts(config), *release.language_parts(text)]
    if text is not None:
        return parts
    return [
        replace(part, target=part.target.removeprefix(TOWER))
        if part.target is not None and part.target.startswith(TOWER)
        else replace(part, target=None, reason=part.reason or NOT_IN_A_TOWER)
        for part in parts
    ]


def check_encoders(config: MultiEncoderConfig, tensors: PlacedTensors, root: str) -> None:
    """Every encoder comes from the release or is given, not both."""
    held = {part.target for part, _ in tensors.placement.placed.values()}
    prefixes = [f"{root}encoder_{index}.model." for index in range(len(config.encoder_configs))]
    strange = sorted(set(tensors.given) - set(prefixes))
    if strange:
        raise ValueError(f"expected numbers below {len(prefixes)} in `encoders`, got {strange}")
    for index, (prefix, member) in enumerate(zip(prefixes, config.encoder_configs, strict=True)):
        if prefix in held and prefix in tensors.given:
            raise ValueError(f"{tensors.stored.name} holds encoder {index}; leave it out of `encoders`")
        if prefix not in held and prefix not in tensors.given:
            raise ValueError(
                f"{tensors.stored.name} holds no tensor of encoder {index}, a {member.model_type!r}: give its weights,"
                f" e.g. encoders={{{index}: AutoModel.from_pretrained(...)}}"
            )
