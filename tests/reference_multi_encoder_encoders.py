"""Replays of the encoders that multi-encoder towers are made of: CLIP without class token, SAM, InternViT."""

from transformers import PreTrainedModel

from vitweave.configuration.encoder_configs import resolve_config
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.own_models import build_model
from vitweave.modeling.vision_encoder import VisionEncoder


def loaded(case, config: dict, state: dict) -> PreTrainedModel:
    """The native model of a config with these weights, every one of them used."""
    model = build_model(resolve_config(config)).to(case.dtype).eval()
    model.load_state_dict(state, strict=True)
    return model


def replay_clip_tower(case):
    state = {name.removeprefix("vision_model."): tensor for name, tensor in case.group("state").items()}
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
    state = {f"vision_encoder.{name}": tensor for name, tensor in case.group("state").items()}
    model = loaded(case, {"model_type": "sam_vision_model", **case.sidecar["args"]}, state)
    encoder = VisionEncoder(model)
    case.check("output.neck_map", encoder(case.tensors["input.pixel_values"]).feature_maps[0])


INTERN_VIT_NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
}


def intern_vit_state(state: dict) -> dict:
    """Released InternViT weights under transformers' names; the stacked query, key and value rows are taken apart."""
    renamed = {}
    for name, tensor in state.items():
        for official, ours in INTERN_VIT_NAMES.items():
            name = name.replace(official, ours)
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = rows
        else:
            renamed[name] = tensor
    return renamed


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
    model = loaded(case, config, intern_vit_state(case.group("state")))
    features = VisionEncoder(model, layers=[-1, -2])(case.tensors["input.pixel_values"])
    case.check("output.last_hidden_state", features.states[0])
    case.check("output.hidden_states_minus_2", features.states[1])


KINDS = {
    "eagle_hr_clip_tower": replay_clip_tower,
    "intern_vit": replay_intern_vit,
    "leo_sam_vision_encoder": replay_sam,
}
