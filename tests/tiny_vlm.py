"""A tiny tokenizer and processor for vision-language models."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<img>", "</img>"]
WORDS = "a an the cat dog car red green blue one two three what is in this picture of and . ? ! : user assistant system"


def tiny_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """Words of a short list, `<s>` before every text, `<image>` (id 4) for images; other words are `<unk>`."""
    words = [form for word in WORDS.split() for form in dict.fromkeys((word, word.upper()))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.add_tokens(["<image>", "<img>", "</img>"], special_tokens=True)
    return tokenizer


def tiny_vlm_processor(size: int = 32, num_image_tokens: int = 16, tiling=None, **options) -> MultiEncoderVlmProcessor:
    """A processor of images of `size` and 4x4 tokens per tile; no torchvision, no network."""
    image_processor = MultiEncoderImageProcessorPil(size=size, tiling=tiling)
    facts = {"num_image_tokens": num_image_tokens, "grid": [4, 4] if num_image_tokens == 16 else None}
    return MultiEncoderVlmProcessor(image_processor, tiny_tokenizer(), **facts | options)
