"""A tiny vision-language model, and its tokenizer and processor."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
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


VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VIT |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
CONVNEXT = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def tiny_tower(**options) -> MultiEncoderConfig:
    """A ViT and a ConvNeXt that sees 64 pixels, on 4x4 tokens for 32x32 pixels."""
    layers = {"image_size": 64, "layer": 3, "class_token": "drop_after"}
    given = {"encoder_configs": [VIT, CONVNEXT], "encoder_options": [{}, layers], "image_size": 32}
    return MultiEncoderConfig(**given | options)


def tiny_llama(**options) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 512} | sizes | ids | options)


def tiny_vlm_config(tower: dict | None = None, text: dict | None = None, **options) -> MultiEncoderVlmConfig:
    given = {"vision_config": tiny_tower(**tower or {}), "text_config": tiny_llama(**text or {}), "image_token_id": 4}
    return MultiEncoderVlmConfig(**given | options)


def tiny_images(count: int, seed: int = 0, size: int = 32) -> list[Image.Image]:
    pixels = torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(seed))
    return [Image.fromarray(image) for image in pixels.to(torch.uint8).numpy()]


QUESTION = "user : <image> what is in this picture ? assistant : "
ANSWERS = [
    "a red cat",
    "a blue dog",
    "two green",
    "the car is red",
    "one cat and a dog",
    "three car",
    "dog",
    "blue car",
]


class EightSamples(torch.utils.data.Dataset):
    """One question about eight images with eight answers, which only the images tell apart."""

    def __init__(self):
        self.processor = tiny_vlm_processor()
        self.images = tiny_images(8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "answer": ANSWERS[index]}

    def collate(self, samples: list[dict]) -> dict:
        """The answers and what ends them are the labels."""
        texts = [QUESTION + sample["answer"] + " </s>" for sample in samples]
        batch = self.processor(images=[[s["image"]] for s in samples], text=texts, padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        answers = [
            len(self.processor.tokenizer(s["answer"] + " </s>", add_special_tokens=False).input_ids) for s in samples
        ]
        said = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(answers)[:, None]  # padded on the left
        return {**batch, "labels": ids.masked_fill(~said, -100)}

    def questions(self) -> dict:
        """All eight without their answers."""
        return self.processor(
            images=[[image] for image in self.images], text=[QUESTION] * 8, padding=True, return_tensors="pt"
        )
