"""The processor of vision-language models: placeholders expanded, samples with any number of images, clear refusals."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_vlm import tiny_tokenizer, tiny_vlm_processor
from transformers.models.auto.processing_auto import AutoProcessor

from vitweave.configuration.image_tokens import count_image_tokens
from vitweave.configuration.multi_encoder_presets import multi_encoder_preset
from vitweave.modeling.visible_tokens import add_newlines
from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor

TILING = {"max_tiles": 4}
IMAGE_ID = 4


def picture(width=80, height=40, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_tokens(encoded) -> list[int]:
    return (torch.as_tensor(encoded["input_ids"]) == IMAGE_ID).sum(dim=-1).tolist()


def test_a_placeholder_becomes_as_many_as_its_tiles_have_tokens():
    processor = tiny_vlm_processor(tiling=TILING)
    encoded = processor(picture(), "what is this ? <image> .", return_tensors="pt")
    assert encoded["num_tiles"].tolist() == [3] and image_tokens(encoded) == [48]
    assert encoded["pixel_values"].shape == (3, 3, 32, 32) and encoded["image_sizes"].tolist() == [[40, 80]]
    assert list(encoded) == ["input_ids", "attention_mask", "pixel_values", "num_tiles", "image_sizes"]
    run = (encoded["input_ids"][0] == IMAGE_ID).nonzero()[:, 0]
    assert run[-1] - run[0] == 47  # one run
    assert processor.tokenizer.decode(encoded["input_ids"][0, run[-1] + 1 :]) == "."


def test_samples_with_different_numbers_of_images():
    processor = tiny_vlm_processor(tiling=TILING)
    texts = ["<image> <image> a cat", "the dog", "a <image> car"]
    images = [picture(seed=0), picture(40, 80, seed=1), picture(seed=2)]
    nested = processor([images[:2], [], images[2:]], texts, padding=True, return_tensors="pt")
    assert nested["num_tiles"].tolist() == [3, 3, 3] and image_tokens(nested) == [96, 0, 48]
    assert nested["attention_mask"][1].tolist()[:-3] == [0] * (nested["input_ids"].shape[1] - 3)  # padded on the left
    flat = processor(images, texts, padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in nested)
    alone = processor(images[2], texts[2], return_tensors="pt")
    assert torch.equal(alone["pixel_values"], nested["pixel_values"][6:])
    assert torch.equal(alone["input_ids"][0], nested["input_ids"][2][nested["attention_mask"][2].bool()])


def test_the_images_of_one_text_share_the_tiles():
    processor = tiny_vlm_processor(tiling=TILING)
    wide = picture(200, 50)
    assert processor([wide], "<image>")["num_tiles"] == [5]
    assert processor([wide] * 2, "<image> <image>")["num_tiles"] == [3, 3]
    assert processor([wide] * 2, ["<image>", "<image>"])["num_tiles"] == [5, 5]
    assert processor([wide] * 2)["num_tiles"] == [5, 5]


def test_right_padding_where_it_is_asked_for():
    processor = tiny_vlm_processor()
    processor.tokenizer.padding_side = "right"  # as many released tokenizers are saved
    texts = ["a <image>", "a cat"]
    usual, other, nested = (
        processor(picture(), texts, padding=True, return_tensors="pt", **options)["attention_mask"][1].tolist()
        for options in ({}, {"padding_side": "right"}, {"text_kwargs": {"padding_side": "right"}})
    )
    assert (usual[0], usual[-1]) == (0, 1) and (other[0], other[-1]) == (nested[0], nested[-1]) == (1, 0)


def test_newlines_and_unpadding_count_what_the_model_gives():
    processor = tiny_vlm_processor(image_newline=True, unpad=True)
    tower = SimpleNamespace(num_tokens=16, fused_grid=(4, 4))
    config = SimpleNamespace(vision_config=tower, image_newline=True, unpad=True)
    for width, height in ((80, 40), (40, 80), (64, 64), (500, 3)):
        encoded = processor(picture(width, height), "<image>", return_tensors="pt")
        assert image_tokens(encoded) == [count_image_tokens(config, 1, (height, width))]
        tokens = add_newlines(torch.zeros(1, 16, 8), encoded["image_sizes"], torch.zeros(8))
        assert image_tokens(encoded) == [len(tokens[0])]
    assert image_tokens(processor(picture(80, 40), "<image>", return_tensors="pt")) == [2 * 5]


def test_tokens_around_an_image():
    processor = tiny_vlm_processor(image_start_token="<img>", image_end_token="</img>")
    ids = processor(picture(), "a <image> .", return_tensors="pt", return_mm_token_type_ids=True)
    names = processor.tokenizer.convert_ids_to_tokens(ids["input_ids"][0])
    assert names == ["<s>", "a", "<img>", *["<image>"] * 16, "</img>", "."]
    assert ids["mm_token_type_ids"].sum() == 18
    assert processor._get_num_multimodal_tokens(image_sizes=[(40, 80)])["num_image_tokens"] == [18]


def test_counts_without_reading_an_image():
    processor = tiny_vlm_processor(tiling=TILING)
    sizes = [(40, 80), (50, 200), (64, 64)]
    pictures = [picture(width, height) for height, width in sizes]
    encoded = processor(pictures, ["<image>"] * 3, padding=True, return_tensors="pt")
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert counted["num_image_tokens"] == image_tokens(encoded)
    assert counted["num_image_patches"] == encoded["num_tiles"].tolist()
    together = processor(pictures, "<image> <image> <image>")
    shared = processor._get_num_multimodal_tokens(image_sizes=[[], sizes])
    assert shared["num_image_patches"] == together["num_tiles"] != counted["num_image_patches"]
    fewer = processor._get_num_multimodal_tokens(image_sizes=sizes, images_kwargs={"tiling": {"max_tiles": 1}})
    assert fewer["num_image_patches"] == [1, 1, 1]


def conversation(image):
    asked = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}]}
    return [asked, {"role": "assistant", "content": [{"type": "text", "text": "a red car ."}]}]


def test_the_chat_template_takes_images(tmp_path):
    processor = tiny_vlm_processor(tiling=TILING)
    chat = conversation(picture())
    text = processor.apply_chat_template(chat[:1], add_generation_prompt=True)
    assert text == "USER: <image>\nwhat is this ?\nASSISTANT: "
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    encoded = processor.apply_chat_template(chat, **options)
    expected = processor(picture(), "USER: <image>\nwhat is this ?\nASSISTANT: a red car .</s>", return_tensors="pt")
    assert all(torch.equal(encoded[name], expected[name]) for name in expected)
    picture().save(tmp_path / "a.png")
    from_file = processor.apply_chat_template(conversation(str(tmp_path / "a.png")), **options)
    assert torch.equal(from_file["pixel_values"], expected["pixel_values"])
    batch = [chat[:1], [{"role": "user", "content": "a cat"}], [*chat, *conversation(picture(40, 80))]]
    encoded = processor.apply_chat_template(batch, **options, processor_kwargs={"padding": True})
    assert image_tokens(encoded) == [48, 0, 96]


def test_a_language_model_keeps_its_chat_template():
    processor = tiny_vlm_processor()
    tokenizer = processor.tokenizer
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} . {{ message['content'] }} ? {% endfor %}"
    )
    processor = MultiEncoderVlmProcessor(processor.image_processor, tokenizer, num_image_tokens=16)
    chat = [{"role": "system", "content": "a"}, *conversation(picture())]
    expected = "system . a ? user . <image>\nwhat is this ? ? assistant . a red car . ? "
    assert processor.apply_chat_template(chat) == expected
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert image_tokens(encoded) == [16]
    tokenizer.chat_template = "{{ messages[0]['content'][0]['type'] }} image"
    assert MultiEncoderVlmProcessor(processor.image_processor, tokenizer).chat_template == tokenizer.chat_template


def test_saved_and_loaded(tmp_path):
    processor = tiny_vlm_processor(tiling=TILING, image_newline=True, image_start_token="<img>", token_budget=400)
    processor([picture()] * 2, ["<image>", "<image> a"], padding=True, padding_side="right")
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is MultiEncoderVlmProcessor and type(loaded.image_processor) is MultiEncoderImageProcessorPil
    given = {"images": [[picture()], []], "text": ["<image> a cat", "the dog"], "padding": True, "return_tensors": "pt"}
    first, second = processor(**given), loaded(**given)
    assert all(torch.equal(first[name], second[name]) for name in first) and first["attention_mask"][1, 0] == 0
    for name in ("grid", "token_budget", "chat_template", "image_token_id", "model_input_names"):
        assert getattr(loaded, name) == getattr(processor, name)


def test_built_from_a_model_config():
    config = SimpleNamespace(
        vision_config=multi_encoder_preset("internvl", tiny=True),
        text_config=SimpleNamespace(max_position_embeddings=77),
        image_token_id=IMAGE_ID,
        image_newline=True,
        unpad=False,
    )
    processor = MultiEncoderVlmProcessor.from_model_config(config, tiny_tokenizer(), tiling=TILING)
    assert (processor.image_token, processor.token_budget, processor.grid) == ("<image>", 77, [2, 2])
    assert list(processor.image_processor.image_mean) == list(config.vision_config.image_mean)
    encoded = processor(picture(), "<image>", return_tensors="pt")
    assert encoded["pixel_values"].shape == (3, 3, 56, 56) and image_tokens(encoded) == [3 * 2 * 3]
    assert MultiEncoderVlmProcessor.from_model_config(config, tiny_tokenizer(), token_budget=9).token_budget == 9
    config.image_token_id = 10_000
    with pytest.raises(ValueError, match=r"below the tokenizer's .* got 10000"):
        MultiEncoderVlmProcessor.from_model_config(config, tiny_tokenizer())


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([["P"], ["P"]], ["a <image>", "a"], r"sample 1: .*of its images \(1\), found 0 .*use apply_chat_template"),
        (None, ["a", "<image>"], r"sample 1: .*images \(0\), found 1 .*no image came with this text"),
        ([["P", "P"]], "a <image>", r"sample 0: .*images \(2\), found 1 .*images of another sample"),
        ([["P"]], "<image> <image>", r"sample 0: .*images \(1\), found 2 .*an image is missing"),
        (["P", "P", "P"], ["<image>", "<image>"], r"sample 1: .*images \(2\), found 1"),
        (["P", "P"], ["<image>", "<image> <image>"], r"sample 1: .*images \(1\), found 2"),
        (["P"], "<image>" * 200, "were expanded already"),
        ([["P"]], ["<image>", "a"], "got 1 lists for 2 texts"),
        ("P", 3, "a text or a list of .*, got int 3"),
        ("P", [], "at least one text, got list"),
    ],
)
def test_images_and_placeholders_that_differ_are_refused(images, text, message):
    def fill(one):
        return [fill(item) for item in one] if isinstance(one, list) else picture() if one == "P" else one

    with pytest.raises(ValueError, match=message):
        tiny_vlm_processor()(fill(images), text)


def test_a_cut_run_and_a_token_budget_are_refused():
    processor = tiny_vlm_processor()
    texts = ["a cat", "what is this ? <image>"]
    for side in ("left", "right"):
        processor.tokenizer.truncation_side = side
        for options in ({}, {"return_tensors": "pt", "padding": "max_length"}):
            with pytest.raises(
                ValueError, match=r"sample 1: its images take 16 tokens, but .* truncation to max_length"
            ):
                processor([[], [picture()]], texts, truncation=True, max_length=10, **options)
    processor = tiny_vlm_processor(token_budget=20)
    with pytest.raises(ValueError, match="sample 1 has 21 tokens, 16 of them of images; the language model takes 20"):
        processor([[], [picture()]], texts, padding=True, return_tensors="pt")
    padded = processor(
        [[], [picture()]], ["a", "what <image>"], padding="max_length", max_length=40, return_tensors="pt"
    )
    assert image_tokens(padded) == [0, 16]  # padding does not count


def test_other_modalities_and_processors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \['videos'\] too"):
        tiny_vlm_processor()(picture(), "<image>", videos=[picture()])
    with pytest.raises(ValueError, match=r"no token '<picture>' of its own.*add_tokens"):
        tiny_vlm_processor(image_token="<picture>")
    with pytest.raises(ValueError, match="unpad cuts square padding off"):
        tiny_vlm_processor(tiling=TILING, unpad=True)
    with pytest.raises(ValueError, match="tokens are a sequence"):
        tiny_vlm_processor(num_image_tokens=7, image_newline=True)
    with pytest.raises(ValueError, match="4x4=16 tokens per tile on this grid, got 15"):
        tiny_vlm_processor(num_image_tokens=15, grid=[4, 4])
    assert image_tokens(tiny_vlm_processor(num_image_tokens=7)(picture(), "<image>", return_tensors="pt")) == [7]


def test_text_alone_and_images_alone():
    processor = tiny_vlm_processor()
    assert set(processor(text=["a cat"])) == {"input_ids", "attention_mask"}
    assert set(processor(images=[], text="a cat")) == {"input_ids", "attention_mask"}
    assert set(processor([picture()])) == {"pixel_values", "num_tiles", "image_sizes"}
