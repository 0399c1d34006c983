"""Every family against the native model: the same layers, the same outputs, and nothing run in vain."""

import pytest
import torch
from tiny_encoders import CASES, FIXED_SIZE, MAPS, VIT, build, images
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    ResNetConfig,
    SamConfig,
    SamModel,
    ViTConfig,
    ViTForImageClassification,
)

from vitweave.configuration.configuration_base import VitweaveConfig
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.pretrained import VitweavePreTrainedModel
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.modeling.vision_families.pix2struct import standardised
from vitweave.modeling.vision_families.registry import VISION_FAMILIES
from vitweave.modeling.vision_families.vit import cut_patches

every_case = pytest.mark.parametrize("name", sorted(CASES))


def mostly_slow(names: list[str], fast: tuple[str, ...]) -> pytest.MarkDecorator:
    """All of `names`, those outside `fast` in the slow tier."""
    return pytest.mark.parametrize(
        "name", [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


some_fast = mostly_slow(sorted(CASES), fast=("clip_vision_model", "radio", "segformer", "specialized_vit", "swin"))


def native_outputs(name: str, model: PreTrainedModel, pixel_values: torch.Tensor):
    options = {"output_hidden_states": True}
    if name in ("vit", "deit", "ijepa", "vit_msn", "clip_vision_model", "siglip_vision_model", "vit_mae"):
        options["interpolate_pos_encoding"] = True
    if name == "vit_mae":  # keep every patch where it is
        patches = (pixel_values.shape[-2] // 8) * (pixel_values.shape[-1] // 8)
        options["noise"] = torch.arange(patches).float().expand(len(pixel_values), -1)
    if name.startswith("swin"):
        model.config.output_hidden_states = True
        options["output_hidden_states"] = True
    if name == "pix2struct_vision_model":
        grid = encoder_facts(model.config).grid_for(*pixel_values.shape[-2:])
        assert grid == (pixel_values.shape[-2] // 8, pixel_values.shape[-1] // 8)  # nothing to resize
        patches = cut_patches(standardised(pixel_values), grid, 8)
        places = torch.cartesian_prod(*[torch.arange(1.0, side + 1) for side in grid])
        pixel_values = torch.cat([places.expand(len(patches), -1, -1), patches], dim=2)
    if name == "siglip2_vision_model":
        batch, channels, height, width = pixel_values.shape
        patches = pixel_values.reshape(batch, channels, height // 8, 8, width // 8, 8).permute(0, 2, 4, 3, 5, 1)
        options["spatial_shapes"] = torch.tensor([[height // 8, width // 8]] * batch)
        options["pixel_attention_mask"] = torch.ones(batch, height * width // 64, dtype=torch.long)
        pixel_values = patches.reshape(batch, -1, 64 * channels)
    return model(pixel_values, **options)


def as_sequence(features, index: int) -> torch.Tensor:
    return torch.cat([features.class_tokens[index], features.registers[index], features.patches[index]], dim=1)


def flat(state: torch.Tensor, name: str) -> torch.Tensor:
    """A native state as (batch, tokens, hidden)."""
    if state.ndim == 4 and name == "sam_vision_model" and state.shape[-1] == 32:  # its blocks keep the channels last
        return state.flatten(1, 2)
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state


def native_layers(name: str, outputs) -> dict[int, torch.Tensor]:
    """The native hidden states by our layer numbers."""
    states = outputs.hidden_states
    if name.startswith("swin"):
        return {0: states[0]}  # later ones are merged to half the size already, see the test of Swin
    if name in ("segformer", "mobilenet_v2"):
        return dict(enumerate(states, start=1))
    layers = dict(enumerate(states))
    if name == "dinov3_convnext":
        del layers[0]  # the pixels
    if name == "specialized_vit-cait":
        del layers[3]  # class attention follows
    return layers


def test_every_family_is_tested():
    elsewhere = {"timm_wrapper", "layer_fusion_vision", "multi_encoder_vision"}
    assert {name.split("-")[0] for name in CASES} | elsewhere == set(VISION_FAMILIES)


@every_case
@torch.no_grad()
def test_layers_equal_the_native_hidden_states(name):
    model, pixel_values = build(name), images(name)
    expected = native_layers(name, native_outputs(name, model, pixel_values))
    features = VisionEncoder(model, layers=list(expected), final_norm=False)(pixel_values)
    for index, layer in enumerate(expected):
        torch.testing.assert_close(as_sequence(features, index), flat(expected[layer], name), rtol=1e-4, atol=1e-5)
    if name not in (
        "swin",
        "swinv2",
        "specialized_vit-cait",
    ):  # the native list leaves out SAM's neck, MobileNet's ends
        unseen = {"sam_vision_model": 2, "mobilenet_v2": 2}.get(name, 0)
        facts = encoder_facts(model.config)
        assert len(expected) == facts.num_layers + 1 - facts.first_layer - unseen


@every_case
@torch.no_grad()
def test_the_last_layer_equals_the_native_outputs(name):
    model, pixel_values = build(name), images(name)
    expected = native_outputs(name, model, pixel_values)
    features = VisionEncoder(model)(pixel_values)
    tokens, last = as_sequence(features, 0), flat(expected.last_hidden_state, name)
    if name in ("clip_vision_model", "specialized_vit-clip"):  # there, the final norm is for the class token only
        tokens, last = tokens[:, 1:], last[:, 1:]
        torch.testing.assert_close(features.cls[0], expected.pooler_output)
    if name == "dinov3_convnext":
        last = last[:, 1:]  # the pooled mean comes first
    torch.testing.assert_close(tokens, last, rtol=1e-4, atol=1e-5)
    pooled = expected.get("summary") if name == "radio" else expected.get("pooler_output")
    if pooled is not None:
        torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
    elif features.cls[0] is not None:
        torch.testing.assert_close(features.pooled, features.cls[0])
    else:
        torch.testing.assert_close(features.pooled, features.patches[0].mean(dim=1))


@every_case
@torch.no_grad()
def test_facts_known_from_the_config_hold(name):
    model = build(name)
    facts = encoder_facts(model.config)
    layers = range(facts.first_layer, facts.num_layers + 1)
    encoder = VisionEncoder(model, layers=layers)
    height, width = FIXED_SIZE.get(name, (32, 48) if name == "radio" else (75, 102) if name in MAPS else (35, 54))
    features = encoder(images(name, 1, (height, width)))
    assert encoder.layers == tuple(layers)
    assert features.grids == encoder.grids_for(height, width)
    assert [tuple(feature_map.shape[2:]) for feature_map in features.feature_maps] == list(features.grids)
    assert tuple(patches.shape[2] for patches in features.patches) == encoder.hidden_sizes
    assert features.pooled.shape == (1, facts.pooled_size)
    assert features.class_tokens[0].shape[1] == facts.num_class_tokens
    assert features.registers[0].shape[1] == facts.num_registers


def blocks_of(encoder: VisionEncoder) -> list[nn.Module]:
    """The modules that make up the layers 1, 2, ..."""
    lists = [module for module in encoder.model.modules() if isinstance(module, nn.ModuleList)]
    behind = {"sam_vision_model": 2, "mobilenet_v2": 1}.get(encoder.model.config.model_type, 0)
    depth = encoder.num_layers - behind
    return list(next(blocks for blocks in lists if len(blocks) == depth))


@every_case
@torch.no_grad()
def test_no_block_behind_the_deepest_runs_and_no_state_is_kept(name):
    encoder = VisionEncoder(build(name), layers=[1])
    calls = []
    for number, block in enumerate(blocks_of(encoder), start=1):
        for part in block.modules():
            part.register_forward_hook(lambda *_, number=number: calls.append(number))
    features = encoder(images(name))
    assert set(calls) == {1}
    assert len(features.patches) == 1
    assert features.pooled is None


@pytest.mark.parametrize("name", ["swin", "swinv2"])
@torch.no_grad()
def test_swin_stages_equal_the_native_maps_before_merging(name):
    model, pixel_values = build(name), images(name)
    hidden_states, grid = model.embeddings(pixel_values)
    options = {"output_hidden_states": True, "output_hidden_states_before_downsampling": True}
    expected = model.encoder(hidden_states, grid, **options).reshaped_hidden_states
    maps = VisionEncoder(model, layers=[0, 1, 2, 3], final_norm=False)(pixel_values).feature_maps
    for ours, native in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_swin_forgets_the_size_of_the_image_before():
    encoder = VisionEncoder(build("swin"))
    before = encoder(images("swin")).patches[0]
    small = encoder(images("swin", 2, (16, 20)))  # smaller than one window: the native model fails
    assert small.grids == ((1, 2),)
    assert small.patches[0].isfinite().all()
    torch.testing.assert_close(encoder(images("swin")).patches[0], before, rtol=0, atol=0)


@some_fast
@torch.no_grad()
def test_one_image_equals_a_batch(name):
    encoder, pixel_values = VisionEncoder(build(name), layers=[1, -1]), images(name, 3)
    together = encoder(pixel_values)
    alone = encoder(pixel_values[1:2])
    for patches, single in zip((*together.patches, together.pooled), (*alone.patches, alone.pooled), strict=True):
        torch.testing.assert_close(patches[1:2], single, rtol=1e-3, atol=1e-4)


@some_fast
def test_gradient_reaches_the_blocks_that_ran_and_only_those(name):
    encoder = VisionEncoder(build(name), layers=[1], final_norm=False)
    pixel_values = images(name).requires_grad_()
    encoder(pixel_values).patches[0].square().sum().backward()
    assert pixel_values.grad.any()
    blocks = blocks_of(encoder)
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in blocks[0].parameters())
    assert all(parameter.grad is None for block in blocks[1:] for parameter in block.parameters())


CHECKPOINTED = [name for name in sorted(CASES) if "conv" not in name and name != "mobilenet_v2" and "-" not in name]


@mostly_slow(CHECKPOINTED, fast=("dinov2",))
def test_gradient_checkpointing_gives_the_same_gradients(name):
    def gradients(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        model = build(name)
        for module in model.modules():
            if hasattr(module, "rate") or type(module).__name__.endswith("DropPath"):
                module.forward = lambda hidden_states: hidden_states
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        encoder = VisionEncoder(model, layers=[1, -1]).train()
        calls = []
        for module in blocks_of(encoder)[0].modules():
            module.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(0)
        sum(patches.square().mean() for patches in encoder(images(name)).patches).backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None], len(calls)

    plain, calls = gradients(False)
    checkpointed, calls_again = gradients(True)
    assert calls_again > calls  # the block ran once more in the backward pass
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


@some_fast
@torch.no_grad()
def test_bfloat16(name):
    encoder = VisionEncoder(build(name).to(torch.bfloat16), layers=[1, -1])
    features = encoder(images(name))  # float32 pixels, as processors make them
    assert features.pooled.dtype == torch.bfloat16
    assert all(patches.dtype == torch.bfloat16 and patches.isfinite().all() for patches in features.patches)


@mostly_slow(sorted(CASES), fast=("dinov2",))
@torch.no_grad()
def test_compiles_to_one_graph(name):
    encoder, pixel_values = VisionEncoder(build(name), layers=[1, -1]), images(name)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")(pixel_values)
    torch.testing.assert_close(compiled.patches, encoder(pixel_values).patches)


@mostly_slow(["clip_vision_model", "convnext", "dinov2", "segformer", "specialized_vit", "swin"], fast=())
@torch.no_grad()
def test_exports(name):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = VisionEncoder(build(name), layers=[1, -1])

        def forward(self, pixel_values):
            return self.encoder(pixel_values).feature_maps

    model, pixel_values = Maps(), images(name)
    exported = torch.export.export(model, (pixel_values,)).module()
    torch.testing.assert_close(exported(pixel_values), model(pixel_values))


def test_layers_are_stored_absolute_and_returned_in_the_order_asked_for():
    model = build("vit")
    encoder = VisionEncoder(model, layers=[-1, 0, -2])
    assert encoder.layers == (3, 0, 2)
    features, in_order = encoder(images("vit")), VisionEncoder(model, layers=[0, 2, 3])(images("vit"))
    assert features.layers == (3, 0, 2)
    torch.testing.assert_close(features.patches, tuple(in_order.patches[index] for index in (2, 0, 1)))


@torch.no_grad()
def test_the_final_norm_is_applied_to_every_layer_of_a_vit():
    model, pixel_values = build("dinov2"), images("dinov2")
    normed = VisionEncoder(model, layers=[1, 3])(pixel_values)
    plain = VisionEncoder(model, layers=[1, 3], final_norm=False)(pixel_values)
    torch.testing.assert_close(normed.patches, tuple(map(model.layernorm, plain.patches)))
    torch.testing.assert_close(normed.pooled, plain.pooled)


@torch.no_grad()
def test_masked_pretraining_leaves_the_encoder_whole():
    model = build("vit_mae")
    model.config.mask_ratio = 0.75
    assert VisionEncoder(model)(images("vit_mae")).grids == ((4, 6),)
    assert VisionEncoder(model)(images("vit_mae")).patches[0].shape[1] == 24


@torch.no_grad()
def test_sam_takes_other_image_sizes():
    encoder = VisionEncoder(build("sam_vision_model"), layers=[0, -1])
    features = encoder(torch.randn(1, 3, 48, 40))
    assert features.grids == ((6, 5), (6, 5))
    assert all(patches.isfinite().all() for patches in features.patches)


def test_the_vision_part_of_a_larger_model_is_taken():
    text = {**VIT, "vocab_size": 32, "max_position_embeddings": 8}
    text = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    clip = CLIPModel(CLIPConfig(vision_config=VIT, text_config=text))
    assert VisionEncoder(clip).model is clip.vision_model
    assert VisionEncoder(clip.config).config.model_type == "clip_vision_model"
    classifier = ViTForImageClassification(ViTConfig(**VIT))
    assert VisionEncoder(classifier).model is classifier.vit
    neck = {"hidden_size": 16, "image_size": 32, "patch_size": 8}
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    sam = SamModel(
        SamConfig(vision_config=CASES["sam_vision_model"], prompt_encoder_config=neck, mask_decoder_config=decoder)
    )
    assert VisionEncoder(sam).model is sam.vision_encoder
    assert VisionEncoder(sam)(torch.randn(1, 3, 32, 32)).patches[0].shape == (1, 16, 16)


@torch.no_grad()
def test_checkpoints_load_whole_or_not_at_all(tmp_path, caplog):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    clip = CLIPModel(CLIPConfig(vision_config=VIT, text_config={**text, "vocab_size": 32})).eval()
    clip.save_pretrained(tmp_path / "clip")
    encoder = VisionEncoder.from_pretrained(tmp_path / "clip", layers=[-2]).eval()
    expected = clip.vision_model(images("vit", 1, (32, 32)), output_hidden_states=True).hidden_states[2][:, 1:]
    torch.testing.assert_close(encoder(images("vit", 1, (32, 32))).patches[0], expected)

    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path / "classifier")
    assert VisionEncoder.from_pretrained(tmp_path / "classifier").layers == (3,)  # a classifier has no pooler: no error

    shallow = build("dinov2")
    shallow.config.num_hidden_layers = 4
    shallow.save_pretrained(tmp_path / "lacking")
    with pytest.raises(ValueError, match=r"whole dinov2 encoder, but it lacks \['encoder.layer.3"):
        VisionEncoder.from_pretrained(tmp_path / "lacking")


@pytest.mark.slow
@torch.no_grad()
def test_a_tower_deep_in_a_checkpoint_is_loaded_with_its_host(tmp_path):
    text = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**text, "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 64}
    config = InternVLConfig(vision_config=CASES["internvl_vision"], text_config=text)
    host = InternVLForConditionalGeneration(config).eval()
    host.save_pretrained(tmp_path)
    pixel_values = images("internvl_vision")
    features = VisionEncoder.from_pretrained(tmp_path).eval()(pixel_values)
    expected = host.model.vision_tower(pixel_values).last_hidden_state
    torch.testing.assert_close(as_sequence(features, 0), expected)


class HolderConfig(VitweaveConfig):
    model_type = "vision_encoder_holder"
    encoder: dict | None = None


class Holder(VitweavePreTrainedModel):
    config_class = HolderConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder = VisionEncoder(config.encoder, layers=[1, -1])
        self.post_init()


@pytest.mark.parametrize("name", ["dinov2", "radio", "swin"])
@torch.no_grad()
def test_a_model_that_holds_an_encoder_saves_and_loads(name, tmp_path):
    torch.manual_seed(0)
    holder = Holder(HolderConfig(encoder={"model_type": name, **CASES[name]})).eval()
    assert all(key.startswith("encoder.model.") for key in holder.state_dict())
    holder.save_pretrained(tmp_path)
    loaded, info = Holder.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, got = holder.encoder(images(name)), loaded.eval().encoder(images(name))
    torch.testing.assert_close(got.patches, expected.patches, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": [4]}, r"expected layers 0\.\.3.*got \[4\]"),
        ({"layers": [-5]}, r"-1\.\.-4 counted backwards.*got \[-5\]"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [3, -1]}, "every layer once"),
        ({"layers": 3}, r"layers=\[3\]"),
    ],
)
def test_wrong_layers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder({"model_type": "vit", **VIT}, **wrong)


def test_layer_0_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="it has no layer 0"):
        VisionEncoder({"model_type": "segformer", **CASES["segformer"]}, layers=[0])


def test_unknown_encoders_are_refused():
    with pytest.raises(ValueError, match=r"got the model_type 'resnet'; known: \['beit'"):
        VisionEncoder(ResNetConfig())
    with pytest.raises(ValueError, match="known vision encoder, got Linear"):
        VisionEncoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got the model_type 'resnet'"):
        encoder_facts(ResNetConfig())


@some_fast
@torch.no_grad()
def test_wrong_images_are_refused(name):
    encoder = VisionEncoder(build(name))
    with pytest.raises(ValueError, match="expected 3 image channels, got 4"):
        encoder(torch.randn(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"smaller than one patch|whole patches"):
        encoder(torch.randn(1, 3, 32, 1))


def test_images_too_small_for_a_deep_stage_are_refused():
    pixel_values = torch.randn(1, 3, 16, 40)
    model = build("convnext")
    assert VisionEncoder(model, layers=[3])(pixel_values).grids == ((1, 2),)
    with pytest.raises(ValueError, match="at least 32x32 pixels for layer 4, got 16x40"):
        VisionEncoder(model, layers=[1, 4])(pixel_values)


def test_radio_refuses_images_that_patches_do_not_cover():
    with pytest.raises(ValueError, match="whole patches of 8x8 pixels, got 32x36"):
        VisionEncoder(build("radio"))(torch.randn(1, 3, 32, 36))


TIMM = {
    "vit": ("vit_tiny_patch16_224", {"depth": 3, "img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 3, "img_size": 28, "embed_dim": 32, "num_heads": 2}),
    "siglip": ("vit_base_patch16_siglip_224", {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2}),
    "resnet": ("resnet10t", {}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}


@pytest.mark.torchvision
@pytest.mark.parametrize("name", sorted(TIMM))
@torch.no_grad()
def test_timm(name):
    pytest.importorskip("torchvision", reason="needs torchvision")
    architecture, model_args = TIMM[name]
    config = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": model_args, "num_classes": 2}
    encoder = VisionEncoder(config, layers=[1, -1]).eval()
    size = model_args.get("img_size", 64)
    pixel_values = torch.randn(2, 3, size, size)
    features, native = encoder(pixel_values), encoder.model(pixel_values)
    assert features.grids == encoder.grids_for(size, size)
    assert tuple(patches.shape[2] for patches in features.patches) == encoder.hidden_sizes
    torch.testing.assert_close(features.pooled, native.pooler_output)
    last = native.last_hidden_state
    if last.ndim == 3:
        torch.testing.assert_close(as_sequence(features, 1), last)
    assert features.registers[0].shape[1] == (4 if name == "registers" else 0)
    assert VisionEncoder(encoder.model, layers=[1])(pixel_values).pooled is None


@pytest.mark.torchvision
@torch.no_grad()
def test_timm_says_how_to_take_another_image_size():
    pytest.importorskip("torchvision", reason="needs torchvision")
    architecture, model_args = TIMM["vit"]
    config = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": model_args, "num_classes": 2}
    with pytest.raises(ValueError, match=r"images of 32x32 pixels, got 32x64; .*dynamic_img_size"):
        VisionEncoder(config)(torch.randn(1, 3, 32, 64))
    config["model_args"] = {**model_args, "dynamic_img_size": True}
    assert VisionEncoder(config)(torch.randn(1, 3, 32, 64)).grids == ((4, 8),)


@pytest.mark.torchvision
@pytest.mark.parametrize(("architecture", "eps"), [("convnext_xxlarge", 1e-5), ("convnext_large_mlp", 1e-6)])
@torch.no_grad()
def test_timm_convnexts_of_two_resolution_towers_give_four_maps_without_final_norm(architecture, eps):
    pytest.importorskip("torchvision", reason="needs torchvision")
    args = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}  # over those of the architecture
    config = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": args, "num_classes": 0}
    encoder = VisionEncoder(config, layers=[1, 2, 3, 4]).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else nn.init.normal_(parameter, mean=1.0, std=0.2)
    pixel_values = torch.randn(2, 3, 64, 96)
    features, native = encoder(pixel_values), encoder.model(pixel_values, output_hidden_states=True)
    assert encoder.strides == ((4, 4), (8, 8), (16, 16), (32, 32)) and encoder.hidden_sizes == args["dims"]
    assert features.grids == encoder.grids_for(64, 96) == ((16, 24), (8, 12), (4, 6), (2, 3))
    for ours, expected in zip(features.feature_maps, native.hidden_states, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(features.feature_maps[3], encoder.model.timm_model.forward_features(pixel_values))
    plain = VisionEncoder(encoder.model, layers=[1, 2, 3, 4], final_norm=False)(pixel_values)
    assert all(torch.equal(*maps) for maps in zip(plain.patches, features.patches, strict=True))
    assert {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)} == {eps}
