import copy

import pytest
import torch
import torch.nn.functional as F
from retrieval_models import VISION, pairs, retriever, text_config
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
    SwinConfig,
    T5Config,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.encoder_configs import resolve_config
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.own_models import build_model

VIT = {name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
VIT |= {"patch_size": 8, "intermediate_size": 64}
SMALL = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = {
    "bert": text_config(),
    "clip": CLIPTextConfig(**SMALL, hidden_size=24, intermediate_size=32, max_position_embeddings=16, eos_token_id=39),
    "distilbert": DistilBertConfig(vocab_size=40, dim=24, n_layers=1, n_heads=2, hidden_dim=32),
    "gpt2": GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=2, n_positions=16),
    "roberta": RobertaConfig(**SMALL, hidden_size=24, intermediate_size=32, max_position_embeddings=18),
    "t5": T5Config(vocab_size=40, d_model=24, num_layers=1, num_heads=2, d_ff=32, d_kv=12),
}


def fused(**changes) -> LayerFusionConfig:
    return LayerFusionConfig(**{"encoder_config": VISION, "layers": [1, 2], "fusion_type": "film"} | changes)


def swin() -> SwinConfig:
    return SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)


VISIONS = {"specialised": lambda: dict(VISION), "vit": lambda: ViTConfig(**VIT), "fused": fused, "swin": swin}


def features(model, inputs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model.eval()(**inputs)
    return [value for value in found.values() if value is not None]


def assert_same(left: list, right: list, tolerance: float = 1e-6):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# --- any vision encoder, any text encoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("vision", VISIONS)
def test_takes_any_vision_encoder_saves_and_loads(vision, tmp_path):
    model, inputs = retriever(vision_config=VISIONS[vision]()), pairs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is ImageTextRetrieverModel
    assert loaded.config.vision_config.model_type == model.config.vision_config.model_type
    assert_same(features(loaded, inputs), features(model, inputs))
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)) is ImageTextRetrieverModel


@pytest.mark.parametrize("kind", TEXTS)
def test_takes_any_text_encoder_saves_and_loads(kind, tmp_path):
    inputs = pairs() | {"token_type_ids": torch.zeros(4, 9, dtype=torch.long)}
    model = retriever(text_config=TEXTS[kind], local_loss_weight=0.0)
    model.save_pretrained(tmp_path)
    loaded = ImageTextRetrieverModel.from_pretrained(tmp_path)
    assert loaded.config.text_config.model_type == TEXTS[kind].model_type
    assert_same(features(loaded, inputs), features(model, inputs))
    limits = {"bert": 16, "clip": 16, "distilbert": 512, "gpt2": 16, "roberta": 16, "t5": None}
    assert model.text_limit == limits[kind]


def test_from_encoders_keeps_the_weights_and_what_they_compute():
    torch.manual_seed(0)
    vision, text = ViTModel(ViTConfig(**VIT)).eval(), BertModel(text_config()).eval()
    vision_state, text_state = copy.deepcopy(vision.state_dict()), copy.deepcopy(text.state_dict())
    inputs = pairs()
    pixels, texts = inputs["pixel_values"], {name: inputs[name] for name in ("input_ids", "attention_mask")}
    image, sentence = vision(pixels).pooler_output, text(**texts).pooler_output
    model = ImageTextRetrieverModel.from_encoders(vision, text, text_pooling="pooler", projection_dim=16).eval()
    assert all(torch.equal(tensor, vision_state[name]) for name, tensor in model.vision_model.state_dict().items())
    assert all(torch.equal(tensor, text_state[name]) for name, tensor in model.text_model.state_dict().items())
    expected = F.normalize(image @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)
    expected = F.normalize(sentence @ model.text_projection.weight.T, dim=-1)
    torch.testing.assert_close(model.get_text_features(**texts).pooler_output, expected)
    half = ImageTextRetrieverModel.from_encoders(vision.bfloat16(), text.bfloat16(), contrastive_loss="siglip")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_from_encoders_takes_a_fusion_whole_and_of_clip_its_vision_part():
    fusion = LayerFusionModel(fused())
    with torch.no_grad():
        fusion.fusion.gamma_global.fill_(0.7)
    model = ImageTextRetrieverModel.from_encoders(fusion, BertModel(text_config())).eval()
    assert model.vision_model is fusion and model.vision_model.fusion.gamma_global[0] == 0.7
    pixels = pairs()["pixel_values"]
    expected = F.normalize(model.visual_projection(fusion(pixels).pooler_output), dim=-1)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, expected)
    clip = CLIPModel(CLIPConfig(text_config=TEXTS["clip"].to_dict(), vision_config={**VIT}))
    joined = ImageTextRetrieverModel.from_encoders(clip, BertModel(text_config()))
    assert joined.config.vision_config.model_type == "clip_vision_model"
    with pytest.raises(ValueError, match=r"expected a text encoder, .* got CLIPModel"):
        ImageTextRetrieverModel.from_encoders(fusion, clip)


def test_nested_configs_come_back_with_their_attention_and_dtype(tmp_path):
    model = retriever(attn_implementation="eager")
    assert {model.vision_model.config._attn_implementation, model.text_model.config._attn_implementation} == {"eager"}
    model.save_pretrained(tmp_path)
    loaded = ImageTextRetrieverModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="sdpa")
    parts = (loaded.vision_model, loaded.text_model)
    assert {(part.config._attn_implementation, part.dtype) for part in parts} == {("sdpa", torch.bfloat16)}
    assert loaded.config.to_dict()["vision_config"]["hidden_size"] == 32
    with_fusion = retriever(vision_config=fused())
    with_fusion.config.vision_config.encoder_config.from_the_future = 1
    with_fusion.save_pretrained(tmp_path)
    loaded = ImageTextRetrieverModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.config.vision_config.encoder_config.dtype == torch.bfloat16
    assert loaded.config.vision_config.encoder_config.from_the_future == 1
    with pytest.raises(ValueError, match="has no option 'from_the_future'"):
        retriever(vision_config=VISION | {"from_the_future": 1})
    assert type(resolve_config(fused().to_dict())) is LayerFusionConfig
    assert type(build_model(fused())) is LayerFusionModel


@pytest.mark.parametrize(("pooling", "index"), [("first", 0), ("last", 5)])
def test_text_pooling_takes_the_token_it_says(pooling, index):
    model, inputs = retriever(text_pooling=pooling).eval(), pairs()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model.get_text_features(**texts)
    expected = F.normalize(model.text_projection(found.last_hidden_state[3, index]), dim=-1)  # text 3 has 6 tokens
    torch.testing.assert_close(found.pooler_output[3], expected)


def test_mean_pooling_does_not_see_padding():
    model, inputs = retriever().eval(), pairs()
    ids, mask = inputs["input_ids"][-1:], inputs["attention_mask"][-1:]
    short = model.get_text_features(ids[:, :6]).pooler_output
    torch.testing.assert_close(model.get_text_features(ids, mask).pooler_output, short)


def test_is_driven_as_sentence_transformers_drives_clip():
    model, inputs = retriever().eval(), pairs()
    image = model.get_image_features(pixel_values=inputs["pixel_values"])
    text = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for found in (image, text):
        torch.testing.assert_close(found.pooler_output.norm(dim=-1), torch.ones(4))
    out = model(**inputs)
    torch.testing.assert_close(out.image_embeds, image.pooler_output)
    torch.testing.assert_close(out.text_embeds, text.pooler_output)
    expected = model.logit_scale.exp() * image.pooler_output @ text.pooler_output.T
    torch.testing.assert_close(out.logits_per_image, expected)
    torch.testing.assert_close(out.logits_per_text, expected.T)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_every_weight_learns(loss):
    model = retriever(contrastive_loss=loss).train()
    model(**pairs()).loss.backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert hasattr(model, "logit_bias") == (loss == "siglip")


def test_start_of_scale_and_bias_and_the_limit():
    assert retriever().logit_scale.item() == pytest.approx(2.6592)
    model = retriever(contrastive_loss="siglip", logit_bias_init=-7)
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == (pytest.approx(10), -7)
    with torch.no_grad():
        model.logit_scale.fill_(6.0)
        out = model.eval()(**pairs())
    torch.testing.assert_close(out.logits_per_image, 100 * out.image_embeds @ out.text_embeds.T - 7)
    model.train()(**pairs()).loss.backward()
    assert model.logit_scale.grad != 0  # it can come back


def test_equal_captions_are_found_by_their_tokens_whatever_the_padding():
    model, inputs = retriever(local_loss_weight=0.0).train(), pairs()
    inputs["input_ids"][0], inputs["attention_mask"][0] = inputs["input_ids"][-1], inputs["attention_mask"][-1]
    by_tokens = model(**inputs).loss
    assert by_tokens == model(**inputs, caption_ids=torch.tensor([7, 1, 2, 7])).loss
    assert by_tokens != model(**inputs, caption_ids=torch.arange(4)).loss
    left = {name: tensor.clone() for name, tensor in inputs.items()}
    for name in ("input_ids", "attention_mask"):
        left[name][0] = left[name][0].roll(3)
    assert model(**left).loss == model(**left, caption_ids=torch.tensor([7, 1, 2, 7])).loss
    model.config.duplicate_captions = "positives"
    assert model(**inputs).loss != by_tokens


def test_the_local_loss_counts_by_its_weight_and_leaves_out_texts_without_sentences():
    inputs = pairs()
    model = retriever().train()
    model.config.local_loss_weight = 0.0
    both, model.config.local_loss_weight = model(**inputs).loss, 1.0
    local = model(**inputs).loss - both
    assert local > 0
    inputs["sentence_ids"][1] = -1
    assert model(**inputs).loss - both != local
    assert (model.eval()(**inputs).local_scores[:, 1] == 0).all()
    model.train()
    inputs["sentence_ids"][:] = -1
    torch.testing.assert_close(model(**inputs).loss, both)
    model(**inputs).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_frozen_parts_stand_still_also_after_loading(tmp_path):
    model = retriever(vision_config=fused(), freeze_vision_encoder=True, freeze_text_model=True)
    model.save_pretrained(tmp_path)
    for frozen in (model, ImageTextRetrieverModel.from_pretrained(tmp_path)):
        frozen.train()(**pairs()).loss.backward()
        assert not frozen.text_model.training and not frozen.vision_model.encoder.model.training
        learning = {name.partition(".")[0] for name, weight in frozen.named_parameters() if weight.grad is not None}
        assert learning == {"vision_model", *dict(frozen.named_parameters(recurse=False)), "alignment"} | {
            "visual_projection",
            "text_projection",
        }
        assert all(
            name.startswith("vision_model.fusion.") == (weight.grad is not None)
            for name, weight in frozen.named_parameters()
            if name.startswith(("vision_model", "text_model"))
        )


# --- tiles and sentences ---------------------------------------------------------------------------------------------


def test_masked_patches_take_no_part_in_the_scores():
    model, inputs = retriever().eval(), pairs(size=(32, 48))
    mask = torch.ones(4, 24, dtype=torch.bool)
    torch.testing.assert_close(model(**inputs, patch_mask=mask).local_scores, model(**inputs).local_scores)
    mask[:, :12] = False
    tiles, valid = model.get_tile_features(inputs["pixel_values"], mask)
    assert tiles.shape == (4, 21, 16) and len(model.alignment.tile_boxes()) == 21
    tops = model.alignment.tile_boxes()[:, 0]
    assert torch.equal(valid[0], model.alignment.tile_boxes()[:, 2] > 0.5) and tops.max() == 0.75
    torch.testing.assert_close(tiles[valid].norm(dim=-1), torch.ones(int(valid.sum())))
    out = model(**inputs, patch_mask=mask)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "sentence_ids")}
    sentences, sentence_mask = model.get_sentence_features(**texts)
    assert sentences.shape == (4, 3, 16)
    cosines = torch.einsum("jsh,th->jst", sentences, tiles[0, valid[0]])
    best = 0.05 * (cosines / 0.05).logsumexp(-1)
    expected = (best * sentence_mask).sum(-1) / sentence_mask.sum(-1)
    torch.testing.assert_close(out.local_scores[0], expected)


def test_a_sentence_is_the_mean_of_its_tokens():
    model, inputs = retriever().eval(), pairs()
    hidden = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    inputs["sentence_ids"][-1, -3:] = 1  # padding, so it takes no part
    own = inputs["sentence_ids"][0] == 1
    expected = F.normalize(model.alignment.sentence_projection(hidden[0, own].mean(0)), dim=-1)
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask", "sentence_ids")}
    sentences, mask = model.get_sentence_features(**texts)
    torch.testing.assert_close(sentences[0, 1], expected)
    own = inputs["sentence_ids"][-1, :6] == 1
    hidden = model.text_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    expected = F.normalize(model.alignment.sentence_projection(hidden[-1, :6][own].mean(0)), dim=-1)
    torch.testing.assert_close(sentences[-1, 1], expected)
    assert mask[-1].tolist() == [True, True, bool((inputs["sentence_ids"][-1, :6] == 2).any())]


def test_ranking_mixes_the_two_scores_and_falls_back_to_the_cosine():
    model, inputs = retriever(ranking_alpha=0.25).eval(), pairs()
    inputs["sentence_ids"][2] = -1
    images = model.encode_images(inputs.pop("pixel_values"))
    texts = model.encode_texts(**inputs)
    cosines, local = images.pooled @ texts.pooled.T, model.local_scores(images, texts)
    found = model.ranking_scores(images, texts)
    torch.testing.assert_close(found[:, :2], (0.25 * cosines + 0.75 * local)[:, :2])
    torch.testing.assert_close(found[:, 2], cosines[:, 2])
    torch.testing.assert_close(model.ranking_scores(images, texts, alpha=1.0), cosines)


def test_levels_may_come_from_the_maps_of_a_fusion():
    pyramid = fused(fusion_type="fpn", fusion_options={"out_channels": 8, "scales": [2, 1]})
    model, inputs = retriever(vision_config=pyramid, tile_source="maps", tile_levels=[4, 1]).eval(), pairs()
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, :4] = False
    tiles, valid = model.get_tile_features(inputs["pixel_values"], mask)
    assert valid[0].tolist() == [False] * 4 + [True] * 13  # the first row of 4 x 4 tiles, and the whole image
    fine, coarse = model.vision_model.fuse(inputs["pixel_values"], mask, False, False)[2].feature_maps
    means = torch.cat(
        [
            fine[0].unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)).flatten(1).T[4:],
            coarse[0, :, 1:].mean((1, 2))[None],
        ]
    )
    expected = F.normalize(model.alignment.tile_projections["8"](means), dim=-1)
    torch.testing.assert_close(tiles[0, valid[0]], expected)
    assert retriever(vision_config=fused(), tile_source="maps", tile_levels=[2])(**inputs).loss.isfinite()
    with pytest.raises(ValueError, match="one feature map per level of tiles, 3, got 1"):
        retriever(vision_config=fused(), tile_source="maps")
    with pytest.raises(ValueError, match="needs a layer fusion with a pyramid"):
        retriever(tile_source="maps")


# --- with what transformers has --------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "This", "is", "a", "photo", "of", "cat", "bar", "chart", "."]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.mark.parametrize("labels", [["cat", "bar chart", "box plot"], ["cat"]])
def test_serves_the_zero_shot_pipeline(labels, tmp_path):
    from PIL import Image
    from transformers import BitImageProcessorPil

    size = {"height": 32, "width": 32}
    retriever().save_pretrained(tmp_path)
    BitImageProcessorPil(size=size, crop_size=size).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    serve = pipeline("zero-shot-image-classification", model=str(tmp_path))
    assert type(serve.model) is ImageTextRetrieverModel
    found = serve(Image.new("RGB", (50, 40), "teal"), candidate_labels=labels)
    assert {row["label"] for row in found} == set(labels)
    assert sum(row["score"] for row in found) == pytest.approx(1)


def test_a_layer_fusion_is_the_vision_tower_of_the_stock_dual_encoder(tmp_path):
    torch.manual_seed(0)
    fusion = LayerFusionModel(fused())
    with torch.no_grad():
        fusion.fusion.gamma_global.fill_(0.5)
    model = VisionTextDualEncoderModel(vision_model=fusion, text_model=BertModel(text_config())).eval()
    inputs = {name: pairs()[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    assert type(loaded.vision_model) is LayerFusionModel
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_helps():
    model, inputs = retriever().train(), pairs()
    with pytest.raises(ValueError, match=r"at most 16 tokens, .* got 20; .*max_length=16"):
        model(**pairs(length=20))
    with pytest.raises(ValueError, match="tile <-> sentence alignment expected sentence_ids"):
        model(**{name: value for name, value in inputs.items() if name != "sentence_ids"})
    empty = inputs["attention_mask"].clone()
    empty[2] = 0
    with pytest.raises(ValueError, match=r"none in the texts \[2\] of the batch: their captions are empty"):
        model(**inputs | {"attention_mask": empty})
    with pytest.raises(ValueError, match=r"as many images as texts, .* got 3 and 4"):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:3]})
    with pytest.raises(ValueError, match="attention_mask of the shape of input_ids"):
        model(**inputs | {"attention_mask": inputs["attention_mask"][:, :4]})
    with pytest.raises(ValueError, match="expected 4 rows of caption_ids"):
        model(**inputs, caption_ids=torch.arange(3))
    with pytest.raises(ValueError, match=r"patch_mask \(batch, patches\) = \(4, 16\) for a grid of 4x4"):
        model(**inputs, patch_mask=torch.ones(4, 9, dtype=torch.bool))
    model.eval()
    out = model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    assert out.loss is None and out.logits_per_image.shape == (1, 4)
    with pytest.raises(ValueError, match="local_loss_weight above 0"):
        retriever(local_loss_weight=0.0).get_tile_features(inputs["pixel_values"])


def test_bad_options_are_refused():
    for options, message in (
        ({"contrastive_loss": "nce"}, "contrastive_loss"),
        ({"text_pooling": "max"}, "text_pooling"),
        ({"tile_levels": []}, "tile_levels"),
        ({"local_temperature": -1}, "local_temperature"),
        ({"ranking_alpha": 2.0}, "ranking_alpha"),
        ({"tile_level": [1]}, "did you mean tile_level"),
    ):
        with pytest.raises(Exception, match=message):
            ImageTextRetrieverConfig(vision_config=VISION, text_config=text_config(), **options)
    with pytest.raises(ValueError, match="pooler"):
        retriever(text_config=TEXTS["t5"], text_pooling="pooler").eval()(**pairs())
