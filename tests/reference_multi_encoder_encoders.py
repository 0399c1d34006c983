"""Replays of the encoders that multi-encoder towers are made of: CLIP without class token, SAM, InternViT."""

from transformers import PreTrainedModel

from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.conversion.encoder_names import CLIP, INTERN_VIT, SAM
from vitweave.modeling.conversion.release import Part, converted
from vitweave.modeling.own_models import build_model
from vitweave.modeling.vision_encoder import VisionEncoder


def loaded(case, config: dict, state: dict) -> PreTrainedModel:
    """The native model of a config with these weights, every one of them used."""
    model = build_model(resolve_config(config)).to(case.dtype).eval()
    model.load_state_dict(state, strict=True)
    return model


def replay_clip_tower(case):
    state = converted([Part("", "", CLIP)], case.group("state"))
    model = loaded(case, {"model_type": "clip_vision_model", **case.sidecar["clip"]}, state)
    encoder = VisionEncoder(model, class_token="drop_before")
    images = {name: pixels for name, pixels in case.group("input").items() if name.startswith("pixel_values_")}
    assert images
    facts = encoder_facts(model.config, class_token="drop_before")
    for name, pixel_values in images.items():
        features = encoder(pixel_values)
        assert features.grids[0] == facts.grid_for(*pixel_values.shape[-2:])
        assert facts.num_class_tokens == features.class_tokens[0].shape[1] == 0
        case.check("output." + name.replace("pixel_values", "tokens"), features.patches[0])


def replay_sam(case):
    state = converted([Part("", "", SAM)], case.group("state"))
    model = loaded(case, {"model_type": "sam_vision_model", **case.sidecar["args"]}, state)
    encoder = VisionEncoder(model)
    case.check("output.neck_map", encoder(case.tensors["input.pixel_values"]).feature_maps[0])


def replay_intern_vit(case):
    facts = dict(case.sidecar["args"])
    config = {
        "model_type": "internvl_vision",
        "attention_bias": facts.pop("qkv_bias"),
        "use_qk_norm": facts.pop("qk_normalization"),
        "use_mean_pooling": True,  # so that no final norm is applied
        "use_absolute_position_embeddings": True,
        **facts,
    }
    model = loaded(case, config, converted([Part("", "", INTERN_VIT)], case.group("state")))
    features = VisionEncoder(model, layers=[-1, -2])(case.tensors["input.pixel_values"])
    case.check("output.last_hidden_state", features.states[0])
    case.check("output.hidden_states_minus_2", features.states[1])


KINDS = {
    "eagle_hr_clip_tower": replay_clip_tower,
    "intern_vit": replay_intern_vit,
    "leo_sam_vision_encoder": replay_sam,
}
