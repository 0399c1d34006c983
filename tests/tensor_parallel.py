"""What each process of a tensor-parallel run does; a file of its own, so that spawned processes can import it."""

import os
from pathlib import Path

import torch
from distributed_heads import VIT, pixels
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification

TWINS = {"proj_blocks": 1, "mlp_blocks": 1}
VARIANTS = {
    "plain": TWINS,
    "low-rank-swiglu": TWINS | {"cls_rank": 2, "use_swiglu_ffn": True, "position_embedding_type": "rotary"},
    "class-attention": {"class_attention_layers": 1, "norm_blocks": "none", "qkv_blocks": "none"},
    "biases": TWINS | {"attention_bias": "kv", "relative_position_bias": "per_layer"},  # attention stays whole
}


def classifier(name: str) -> SpecializedViTForImageClassification:
    torch.manual_seed(0)
    model = SpecializedViTForImageClassification(SpecializedViTConfig(**VIT | VARIANTS[name]))
    for parameter in model.parameters():  # what starts at zero would hide mistakes
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def run_variants(rank: int, folder: str, saved: str):
    """Load every variant split over the processes, and leave its logits, gradients and number of split weights."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    for name in VARIANTS:
        model = SpecializedViTForImageClassification.from_pretrained(
            Path(saved, name), distributed_config=DistributedConfig(tp_size=2)
        )
        with torch.no_grad():
            logits = model(pixels(1)).logits
        model(pixels(1)).logits.square().sum().backward()
        split = [key for key, weight in model.named_parameters() if is_split(weight)]
        gradients = {key: full(weight.grad) for key, weight in model.named_parameters() if weight.grad is not None}
        facts = {"logits": logits, "split": torch.tensor(len(split))}
        save_file(gradients | facts, Path(folder, f"{name}-{rank}.safetensors"))


def is_split(weight: torch.Tensor) -> bool:
    return isinstance(weight, DTensor) and any(placement.is_shard() for placement in weight.placements)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
