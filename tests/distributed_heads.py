"""Each head in a tiny model, what it learns from, and its training in one process or as one of several."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate_configs import plugin_of
from retrieval_models import VIT, pairs, retriever
from safetensors.torch import save_file
from tiny_modality_models import aligned, mit_fusion
from tiny_vlm import EightSamples, tiny_vlm_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Dinov2Config

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_layer_fusion import LayerFusionForImageClassification
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.modeling.modeling_multi_encoder import MultiEncoderForImageClassification
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification
from vitweave.training.sharding import leave_numbers_whole

STEPS = 3
BATCH = 4  # of all processes together
DINOV2 = VIT | {"image_size": 48}


def vit(**changes) -> SpecializedViTConfig:
    return SpecializedViTConfig(**VIT | {"num_labels": 3} | changes)


def dense(head_type: str, **fields) -> DensePredictorConfig:
    return DensePredictorConfig(backbone_config=vit(out_indices=[1, 2]), head_type=head_type, num_labels=3, **fields)


def pixels(step: int) -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def classes(step: int) -> dict[str, Tensor]:
    labels = torch.randint(0, 3, (BATCH,), generator=torch.Generator().manual_seed(50 + step))
    return {"pixel_values": pixels(step), "labels": labels}


def masks(step: int) -> dict[str, Tensor]:
    labels = torch.randint(0, 3, (BATCH, 32, 32), generator=torch.Generator().manual_seed(60 + step))
    labels[:, :4] = 255  # as many in every process: each takes the mean of its own pixels
    return {"pixel_values": pixels(step), "labels": labels}


def depths(step: int) -> dict[str, Tensor]:
    labels = 1 + 8 * torch.rand(BATCH, 32, 32, generator=torch.Generator().manual_seed(70 + step))
    return {"pixel_values": pixels(step), "labels": labels}


def sensors(step: int) -> dict[str, Tensor]:
    return {"pixel_values": aligned(BATCH, height=32, width=32, seed=step), "labels": masks(step)["labels"]}


def conversations(step: int) -> dict[str, Tensor]:
    """Answers of unequal length, so that the processes hold unequal numbers of tokens."""
    samples = EightSamples()
    batch = samples.collate([samples[(step + index) % 8] for index in range(BATCH)])
    return batch | {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}


@dataclass
class Head:
    """A model with its head, its joint batches, and whether its loss is divided by what all processes count."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    counts_items: bool = False


HEADS = {
    "classification": Head(lambda: SpecializedViTForImageClassification(vit()), classes),
    "classification-fused": Head(
        lambda: LayerFusionForImageClassification(
            LayerFusionConfig(encoder_config=vit(), layers=[1, 2], fusion_type="cross_layer_attention", num_labels=3)
        ),
        classes,
    ),
    "classification-encoders": Head(
        lambda: MultiEncoderForImageClassification(
            MultiEncoderConfig(encoder_configs=[vit(), Dinov2Config(**DINOV2)], image_size=32, num_labels=3)
        ),
        classes,
    ),
    "segmentation": Head(
        lambda: DensePredictorForSemanticSegmentation(
            dense("mlp", head_options={"hidden_size": 16, "dropout": 0.0, "frozen_norm": True})
        ),
        masks,
    ),
    "depth": Head(
        lambda: DensePredictorForDepthEstimation(dense("linear", losses={"l1": 1.0, "gradient": 0.5})), depths
    ),
    "retrieval": Head(retriever, lambda step: pairs(BATCH, seed=step)),
    "vlm": Head(lambda: MultiEncoderVlmForConditionalGeneration(tiny_vlm_config()), conversations, counts_items=True),
    "modalities": Head(
        lambda: ModalityFusionForSemanticSegmentation(mit_fusion(num_labels=3, decoder_frozen_norm=True)), sensors
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[name].build().train()


def share(inputs: dict[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The rows of one process; a number that counts for all stays."""
    rows = BATCH // world_size
    return {name: value[rank * rows : (rank + 1) * rows] if value.ndim else value for name, value in inputs.items()}


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    """As `accelerate launch` wraps it for training of that kind."""
    if kind == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    # what Accelerator does with a plugin; on CPU it ignores the plugin and takes DDP
    plugin = plugin_of("fsdp2.yaml")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device="cpu"
    )
    leave_numbers_whole(model, plugin)
    return fsdp2_prepare_model(accelerator, model)


def train(model: nn.Module, batches: list[dict[str, Tensor]], scale: int = 1) -> list[float]:
    """SGD; the gradient is of `scale` times the loss, the loss is returned as the model gives it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        (scale * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(name: str) -> tuple[dict[str, Tensor], list[float]]:
    """The weights and losses of one process with the joint batches."""
    model = build(name)
    losses = train(model, [HEADS[name].batch(step) for step in range(STEPS)])
    return model.state_dict(), losses


def run_heads(rank: int, folder: str, kind: str, names: list[str]):
    """Train every head as one of several processes, and leave weights and losses in a file per head and process."""
    world_size = dist.get_world_size()
    for name in names:
        model = build(name)
        batches = [share(HEADS[name].batch(step), rank, world_size) for step in range(STEPS)]
        # a loss divided by the items of all processes is a part of the sum, of which DDP takes the mean (as Trainer)
        losses = torch.tensor(train(wrapped(model, kind), batches, world_size if HEADS[name].counts_items else 1))
        dist.all_reduce(losses)
        if not HEADS[name].counts_items:
            losses /= world_size
        state = {key: whole(tensor) for key, tensor in model.state_dict().items()}
        sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
        facts = {"losses": losses, "sharded": torch.tensor(sharded)}
        save_file(state | facts, Path(folder, f"{name}-{rank}.safetensors"))


def whole(tensor: Tensor) -> Tensor:
    """A tensor of its own with the shards of all processes."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()
