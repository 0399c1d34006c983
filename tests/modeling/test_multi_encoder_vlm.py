"""The vision-language model: reads images between text, generates, trains, comes back from its folder."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from model_checks import check_equal_state, check_saved_and_loaded_equal, check_split_hints_arrive
from tiny_vlm import (
    CONVNEXT,
    QUESTION,
    VIT,
    EightSamples,
    tiny_images,
    tiny_llama,
    tiny_tower,
    tiny_vlm_config,
    tiny_vlm_processor,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    T5Config,
    ViTConfig,
    pipeline,
)

from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.configuration.image_tokens import count_image_tokens
from vitweave.modeling.image_batches import images_per_sample, repeat_by_sample
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration, MultiEncoderVlmModel
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor

IMAGES = tiny_images(3)
TEXTS = ["user : <image> what is this ?", "the <image> and the <image>", "a cat is"]
SAMPLES = [[IMAGES[0]], [IMAGES[1], IMAGES[2]], []]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
LEO = {"fusion_type": "sequence_concat", "fusion_options": {"projector": "norm_mlp"}, "hidden_size": 32}
SVA = {"fusion_type": "spatial_vision_aggregator", "fusion_options": {"vision_hidden_size": 32, "num_heads": 2}}


def build(tower=None, text=None, **options) -> MultiEncoderVlmForConditionalGeneration:
    torch.manual_seed(0)
    model = MultiEncoderVlmForConditionalGeneration(tiny_vlm_config(tower, text, **options)).eval()
    for parameter in model.parameters():  # larger than the usual start, so that every token shows in the output
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def processor():
    return tiny_vlm_processor()


@pytest.fixture(scope="module")
def batch(processor):
    return processor(images=SAMPLES, text=TEXTS, padding=True, return_tensors="pt")


def single(processor, index):
    images = [SAMPLES[index]] if SAMPLES[index] else None
    return processor(images=images, text=[TEXTS[index]], return_tensors="pt")


def new_tokens(model, inputs, **options):
    with torch.no_grad():
        found = model.generate(**inputs, **GREEDY | options)
    return found[:, inputs["input_ids"].shape[1] :]


def trimmed(tokens, end=2):
    """Up to the end of the text."""
    tokens = tokens.tolist()
    return tokens[: tokens.index(end)] if end in tokens else tokens


# Reading -------------------------------------------------------------------------------------------------------------


def test_placeholders_hold_the_projected_tokens_of_the_tower(model, batch):
    tower, core = model.model.vision_tower, model.model
    with torch.no_grad():
        expected = core.multi_modal_projector(tower(batch["pixel_values"]).last_hidden_state).flatten(0, 1)
        embeds = core.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == 4] = expected
        text = core.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).last_hidden_state
        found = model(**batch)
    torch.testing.assert_close(found.logits, model.lm_head(text))
    torch.testing.assert_close(found.image_hidden_states, expected)


def test_features_are_one_tensor_per_image(model, batch):
    found = model.get_image_features(batch["pixel_values"], num_tiles=torch.tensor([2, 1]))
    assert [tuple(one.shape) for one in found.pooler_output] == [(32, 32), (16, 32)]
    assert model.get_image_features(batch["pixel_values"]).pooler_output[2].shape == (16, 32)


def test_tiles_are_folded_into_their_image(processor):
    model = build(LEO)
    tiling = {"min_tiles": 1, "max_tiles": 4, "thumbnail": True}
    with_tiles = tiny_vlm_processor(num_image_tokens=32, tiling=tiling)
    images = [[tiny_images(1, size=64)[0]], [tiny_images(1, seed=1, size=32)[0]]]
    inputs = with_tiles(images=images, text=TEXTS[:1] * 2, padding=True, return_tensors="pt")
    counts = inputs["num_tiles"].tolist()
    assert counts[0] > 1
    assert (inputs["input_ids"] == 4).sum(dim=1).tolist() == [32 * count for count in counts]
    with torch.no_grad():
        together = model(**inputs).logits
        alone = with_tiles(images=images[:1], text=TEXTS[:1], return_tensors="pt")
        torch.testing.assert_close(model(**alone).logits, together[:1])


def test_logits_to_keep(model, batch):
    with torch.no_grad():
        whole, last = model(**batch).logits, model(**batch, logits_to_keep=2).logits
        some = model(**batch, logits_to_keep=torch.tensor([0, 3])).logits
    torch.testing.assert_close(last, whole[:, -2:])
    torch.testing.assert_close(some, whole[:, [0, 3]])


def test_loss_is_that_of_the_next_token(model, batch):
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == 4, -100)
    found = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    halved = model(**batch, labels=labels, num_items_in_batch=2 * (labels[:, 1:] != -100).sum()).loss
    torch.testing.assert_close(halved, expected / 2)


def test_kept_features_replace_the_pixels(model, batch):
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    kept = model.encode(batch["pixel_values"])
    with torch.no_grad():
        assert torch.equal(model(**rest, encoder_outputs=kept).logits, model(**batch).logits)
    assert torch.equal(new_tokens(model, {**rest, "encoder_outputs": kept}), new_tokens(model, batch))


def test_encoded_images_replace_the_pixels(model, batch):
    with torch.no_grad():
        encoded = {"image": model.get_image_features(batch["pixel_values"], num_tiles=batch["num_tiles"])}
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model(**text, mm_encoder_outputs=encoded).logits, model(**batch).logits)
        with pytest.raises(ValueError, match="either images or mm_encoder_outputs"):
            model(**batch, mm_encoder_outputs=encoded)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("newline", "unpad"), [(True, False), (False, True), (True, True)])
def test_newlines_and_unpadding_give_as_many_tokens_as_are_counted(newline, unpad):
    model = build(SVA if unpad else None, image_newline=newline, unpad=unpad)
    config = model.config
    processor = MultiEncoderVlmProcessor.from_model_config(config, tiny_vlm_processor().tokenizer)
    images = [[tiny_images(1)[0].resize(size)] for size in ((32, 32), (32, 16), (10, 32))]
    inputs = processor(images=images, text=TEXTS[:1] * 3, padding=True, return_tensors="pt")
    sizes = inputs["image_sizes"].tolist()
    expected = [count_image_tokens(config, image_size=size) for size in sizes]
    assert (len(set(expected)) > 1) == unpad
    found = model.get_image_features(inputs["pixel_values"], inputs["num_tiles"], inputs["image_sizes"])
    assert [len(one) for one in found.pooler_output] == expected
    assert config.image_seq_length == max(expected)
    if newline:
        torch.testing.assert_close(found.pooler_output[0][4], model.model.image_newline.weight)
    with torch.no_grad():
        together = new_tokens(model, inputs)
        kept = model.encode(inputs["pixel_values"])
        rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
        assert torch.equal(new_tokens(model, {**rest, "encoder_outputs": kept}), together)
    one = processor(images=images[1:2], text=TEXTS[:1], return_tensors="pt")
    assert torch.equal(new_tokens(model, one), together[1:2])


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_batch_generates_what_its_samples_do_alone(processor, batch, beams, implementation):
    model = build(attn_implementation={"text_config": implementation})
    together = new_tokens(model, batch, num_beams=beams)
    for index in range(3):
        alone = new_tokens(model, single(processor, index), num_beams=beams)
        assert trimmed(alone[0]) == trimmed(together[index])
    assert len({tuple(row) for row in together.tolist()}) > 1


@pytest.mark.parametrize("beams", [1, 2])
def test_cached_equals_uncached_and_images_are_encoded_once(model, batch, beams, monkeypatch):
    calls = []
    forward = MultiEncoderModel.forward
    monkeypatch.setattr(MultiEncoderModel, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    cached = new_tokens(model, batch, num_beams=beams)
    assert len(calls) == 1
    assert torch.equal(new_tokens(model, batch, num_beams=beams, use_cache=False), cached)
    assert len(calls) == 2


def test_one_beam_is_greedy_and_several_are_returned(model, batch):
    assert torch.equal(new_tokens(model, batch, num_beams=1), new_tokens(model, batch))
    several = new_tokens(model, batch, num_beams=3, num_return_sequences=2)
    assert several.shape[0] == 6
    assert torch.equal(several[::2], new_tokens(model, batch, num_beams=3)[:, : several.shape[1]])


def test_sampling_several_sequences_repeats_the_images_of_each_sample(model, batch):
    one = new_tokens(model, batch)
    found = new_tokens(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(found, one.repeat_interleave(2, dim=0))


def test_the_image_decides(model, processor):
    one, other = (processor(images=[[image]], text=TEXTS[:1], return_tensors="pt") for image in IMAGES[:2])
    with torch.no_grad():
        assert not torch.allclose(model(**one).logits[:, -1], model(**other).logits[:, -1])


# Refusals ------------------------------------------------------------------------------------------------------------


def test_wrong_numbers_of_placeholders_name_the_sample(model, batch):
    short = {**batch, "input_ids": batch["input_ids"].clone()}
    place = (short["input_ids"][1] == 4).nonzero()[-1]
    short["input_ids"][1, place] = 8
    with pytest.raises(ValueError, match=r"sample 1 has 31 image tokens .* 2 images of the batch have 32.*truncated"):
        model(**short)
    with pytest.raises(ValueError, match=r"sample 1 has 31"):
        model.generate(**short, **GREEDY)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"sample 1 has 32 image tokens .* 0 images"):
        model(**text, pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="the last 1 of 4 images have no place"):
        model(**text, pixel_values=batch["pixel_values"][[0, 1, 2, 2]])
    with pytest.raises(ValueError, match=r"sample 0 has 16 image tokens .* next 0 images"):
        model(**text)


def test_wrong_tiles_and_sizes_are_refused(model, batch):
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with pytest.raises(ValueError, match=r"sum to the 3 tiles .* got \[2, 2\]"):
        model(**text, num_tiles=torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"at least 1 that sum to the 3 tiles .* got \[3, 0\]"):
        model(**text, num_tiles=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"expected image_sizes \(3, 2\) for 3 images, got \(2, 2\)"):
        model(**text, image_sizes=torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="either pixel_values or encoder_outputs"):
        model(**text, encoder_outputs=model.encode(batch["pixel_values"]))
    padded = build(unpad=True)
    with pytest.raises(ValueError, match="needs image_sizes"):
        padded(**text)
    with pytest.raises(ValueError, match="one tile per image with unpad=True, got 3 tiles for 2 images"):
        padded(**text, num_tiles=torch.tensor([2, 1]), image_sizes=torch.tensor([[4, 4], [4, 4]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_token_id": 55}, "image_token_id below the language model's vocab_size 55, got 55"),
        ({"projector_type": "identity"}, "expected 32 channels of the tower.* got 56"),
        ({"projector_type": "mlp"}, "unknown projector_type 'mlp'"),
        ({"text_config": T5Config()}, "causal language model .* got the model_type 't5'"),
        ({"text_config": ViTConfig()}, "causal language model .* got the model_type 'vit'"),
        ({"image_newlines": True}, r"did you mean image_newline\?"),
        ({"vision_config": tiny_tower(**LEO), "image_newline": True}, "image_newline and unpad work on the rows"),
    ],
)
def test_configs_that_cannot_work_are_refused(options, message):
    given = {"vision_config": tiny_tower(), "text_config": tiny_llama(), "image_token_id": 4}
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        MultiEncoderVlmConfig(**given | options)


def test_heads_that_change_their_logits_are_refused():
    text = AutoConfig.for_model("gemma2", vocab_size=55, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        MultiEncoderVlmConfig(text_config=text, vision_config=tiny_tower())


def test_images_belong_to_samples_by_their_tokens():
    assert images_per_sample([16, 0, 48], [16, 16, 32]) == [1, 0, 2]
    assert images_per_sample([0, 0], []) == [0, 0]
    one, two, three = torch.arange(3)
    assert [int(x) for x in repeat_by_sample([one, two, three], [2, 0, 1], 2)] == [0, 1, 0, 1, 2, 2]


# Configs -------------------------------------------------------------------------------------------------------------


def test_any_vision_config_becomes_a_tower(processor):
    config = MultiEncoderVlmConfig(vision_config=VIT, text_config=tiny_llama(), image_token_id=4)
    assert config.vision_config.model_type == "multi_encoder_vision"
    assert [member.model_type for member in config.vision_config.encoder_configs] == ["vit"]
    assert config.image_seq_length == 16
    clip = AutoConfig.for_model("clip")
    assert MultiEncoderVlmConfig(vision_config=clip).vision_config.encoder_configs[0].model_type == "clip_vision_model"


def test_config_comes_back_with_its_parts(tmp_path):
    config = tiny_vlm_config(LEO, projector_type="identity", freeze_language_model=True)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    expected = config.to_dict()
    assert {name: again.to_dict()[name] for name in expected if name != "_name_or_path"} == {
        name: value for name, value in expected.items() if name != "_name_or_path"
    }
    assert again.vision_config.encoder_configs[1].model_type == "convnext"
    assert type(again.text_config) is type(config.text_config)


def test_dtype_and_attention_reach_every_part():
    config = tiny_vlm_config(attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    model = MultiEncoderVlmForConditionalGeneration(config).to(torch.bfloat16)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.encoder_0.model.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "text",
    [
        GPT2Config(vocab_size=55, n_embd=32, n_layer=1, n_head=2, n_positions=128),
        OPTConfig(
            vocab_size=55,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_language_models_with_tied_embeddings(text, batch, tmp_path):
    text = copy.deepcopy(text)
    torch.manual_seed(0)
    model = MultiEncoderVlmForConditionalGeneration(tiny_vlm_config_with(text)).eval()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(new_tokens(loaded, batch), new_tokens(model, batch, use_cache=False))


def tiny_vlm_config_with(text):
    return MultiEncoderVlmConfig(vision_config=tiny_tower(), text_config=text, image_token_id=4)


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [{}, LEO, SVA], ids=["channel_concat", "leo", "cambrian"])
def test_saved_and_loaded_equal(tower, batch, tmp_path):
    options = {"image_newline": True} if tower is SVA else {}
    model = build(tower, **options)
    loaded = check_saved_and_loaded_equal(model, tmp_path)
    check_split_hints_arrive(model)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(model)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MultiEncoderVlmModel
    check_equal_state(base, model.model)
    assert type(loaded.generation_config) is type(model.generation_config)


def test_joined_models_keep_their_weights(batch):
    torch.manual_seed(1)
    tower = MultiEncoderModel(tiny_tower()).eval()
    language = AutoModelForCausalLM.from_config(tiny_llama()).eval()
    expected = {**{f"model.vision_tower.{k}": v.clone() for k, v in tower.state_dict().items()}}
    expected |= {k.replace("model.", "model.language_model."): v.clone() for k, v in language.state_dict().items()}
    model = MultiEncoderVlmForConditionalGeneration.from_models(tower, language, image_token_id=4).eval()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert set(state) - set(expected) == {
        f"model.multi_modal_projector.linear_{n}.{k}" for n in (1, 2) for k in ("weight", "bias")
    }
    ids = batch["input_ids"][2:]
    mask = batch["attention_mask"][2:]
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, language(ids, mask).logits)
    bert = AutoModelForCausalLM.from_config(
        BertConfig(
            vocab_size=55,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            is_decoder=True,
        )
    )
    with pytest.raises(ValueError, match="head of one Linear without bias"):
        MultiEncoderVlmForConditionalGeneration.from_models(tower, bert, image_token_id=4)


def test_embeddings_grow(model):
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(60)
    assert grown.get_input_embeddings().num_embeddings == grown.lm_head.out_features == 60
    assert grown.config.text_config.vocab_size == 60


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", [{}, LEO, SVA], ids=["channel_concat", "leo", "cambrian"])
@pytest.mark.parametrize("has_images", [True, False])
def test_every_weight_gets_a_gradient(tower, has_images):
    """Without images a blank tile gives the vision side gradients of zero, so that no process waits for them."""
    options = {"image_newline": True} if tower is SVA else {}
    model = build(tower, **options).train()
    processor = MultiEncoderVlmProcessor.from_model_config(model.config, tiny_vlm_processor().tokenizer)
    inputs = processor(
        images=SAMPLES if has_images else None,
        text=TEXTS if has_images else TEXTS[2:],
        padding=True,
        return_tensors="pt",
    )
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    unread = ("post_layernorm", "pooler", "encoder_0.model.layernorm", "encoder_1.model.layernorm", "stages.3")
    idle = [name for name, p in model.named_parameters() if p.grad is None and not any(part in name for part in unread)]
    assert not idle
    touched = any(p.grad is not None and p.grad.any() for p in model.model.vision_tower.parameters())
    assert touched == has_images


def test_frozen_parts_stand_still():
    model = build(freeze_vision_encoders=True, freeze_language_model=True).train()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"multi_modal_projector"}
    assert not model.model.vision_tower.encoder_0.training
    assert not model.model.language_model.training
    assert model.model.multi_modal_projector.training
    model.gradient_checkpointing_enable()
    assert model.train().model.language_model.training


def test_gradient_checkpointing_changes_nothing(batch):
    plain, checkpointed = build().train(), build().train()
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    grads = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name].grad, parameter.grad)


def test_bfloat16(model, batch):
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        found = half(**batch).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), model(**batch).logits, atol=0.3, rtol=0.1)


@pytest.mark.slow
def test_compiles_as_one_graph(model, batch):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.slow
@pytest.mark.parametrize("tower", [{}, LEO], ids=["channel_concat", "leo"])
def test_eight_samples_are_learned_and_generated_back(tower):
    torch.manual_seed(0)
    data = EightSamples()
    config = tiny_vlm_config(tower, {"hidden_size": 64, "intermediate_size": 128})
    model = MultiEncoderVlmForConditionalGeneration(config).train()
    data.processor = MultiEncoderVlmProcessor.from_model_config(config, data.processor.tokenizer)
    inputs = data.collate([data[index] for index in range(8)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert model(**inputs).loss < 0.05
    questions = data.questions()
    said = new_tokens(model, questions, max_new_tokens=8, min_new_tokens=1)
    answers = data.processor.batch_decode(said, skip_special_tokens=True)
    assert answers == [data[index]["answer"] for index in range(8)]
    for options in ({"use_cache": False}, {"num_beams": 2}):
        again = new_tokens(model, questions, max_new_tokens=8, min_new_tokens=1, **options)
        assert data.processor.batch_decode(again, skip_special_tokens=True) == answers
    alone = data.processor(images=[[data.images[3]]], text=[QUESTION], return_tensors="pt")
    assert trimmed(new_tokens(model, alone, max_new_tokens=8, min_new_tokens=1)[0]) == trimmed(said[3])


# Around --------------------------------------------------------------------------------------------------------------


def test_pipeline_answers(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), MultiEncoderVlmProcessor)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "a cat"}]}]
    said = pipe(text=chat, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == 4).sum() == 16
    expected = new_tokens(model, inputs, max_new_tokens=4, min_new_tokens=None)
    assert said.strip() == processor.batch_decode(expected, skip_special_tokens=True)[0]


def test_the_tower_runs_in_stock_llava(tmp_path, processor):
    """Llava reads `hidden_size` of the config and `hidden_states[-1]` of the tower."""
    torch.manual_seed(0)
    tower = tiny_tower(hidden_size=56)
    config = LlavaConfig(
        vision_config=tower,
        text_config=tiny_llama(),
        image_token_index=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=tower.num_tokens,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    assert isinstance(llava.model.vision_tower, MultiEncoderModel)
    image_processor = MultiEncoderVlmProcessor.from_model_config(tiny_vlm_config(), processor.tokenizer).image_processor
    joint = LlavaProcessor(
        image_processor, processor.tokenizer, patch_size=8, vision_feature_select_strategy="full", image_token="<image>"
    )
    inputs = joint(images=[IMAGES[0]], text=["the <image> is"], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    features = llava.get_image_features(inputs["pixel_values"]).pooler_output
    assert features[0].shape == (16, 32)
    with torch.no_grad():
        expected = llava.generate(**inputs, **GREEDY)
    llava.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(loaded.model.vision_tower, MultiEncoderModel)
    check_equal_state(loaded, llava)
    with torch.no_grad():
        assert torch.equal(loaded.generate(**inputs, **GREEDY), expected)


def test_the_tower_returns_its_tokens_as_hidden_states():
    tower = MultiEncoderModel(tiny_tower()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert tower(pixels).hidden_states is None
    for asked in (True, -1, 0, [-1]):
        found = tower(pixels, output_hidden_states=asked)
        assert len(found.hidden_states) == 1
        assert torch.equal(found.hidden_states[-1], found.last_hidden_state)


def test_nested_composites(batch, tmp_path):
    """A layer fusion over a specialised ViT beside a ConvNeXt, in the tower, in the model."""
    specialised = {"model_type": "specialized_vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    specialised |= {"image_size": 32, "patch_size": 8, "use_mask_token": False}
    fused = {"model_type": "layer_fusion_vision", "encoder_config": specialised, "layers": [1, 2]}
    fused |= {"fusion_type": "cross_layer_attention", "fusion_options": {"dense": True, "num_heads": 2}}
    model = build({"encoder_configs": [fused, CONVNEXT]})
    check_saved_and_loaded_equal(model, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(new_tokens(loaded, batch), new_tokens(model, batch))
