"""Tiny retrievers and their inputs, for the tests of several files."""

import torch
from transformers import BertConfig

from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
}
VISION = {"model_type": "specialized_vit", **VIT, "use_mask_token": False}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def text_config(**changes) -> BertConfig:
    return BertConfig(**TEXT | changes)


def retriever(seed: int = 0, text: dict | None = None, **options) -> ImageTextRetrieverModel:
    """A retriever with tile <-> sentence alignment, unless `local_loss_weight` says otherwise."""
    torch.manual_seed(seed)
    facts = {"vision_config": VISION, "text_config": text_config(**text or {}), "projection_dim": 16}
    return ImageTextRetrieverModel(ImageTextRetrieverConfig(**facts | {"local_loss_weight": 0.5} | options))


def pairs(batch: int = 4, seed: int = 0, size: tuple[int, int] = (32, 32), length: int = 9) -> dict[str, torch.Tensor]:
    """Pixels, and texts of three sentences between two special tokens; the last text is shorter and padded."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "pixel_values": torch.randn(batch, 3, *size, generator=generator),
        "input_ids": torch.randint(4, 40, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
        "sentence_ids": torch.tensor([-1, *sorted(index % 3 for index in range(length - 2)), -1]).repeat(batch, 1),
    }
    inputs["input_ids"][-1, -3:], inputs["attention_mask"][-1, -3:], inputs["sentence_ids"][-1, -3:] = 0, 0, -1
    return inputs
