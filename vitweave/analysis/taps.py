"""Streaming access to what enters and leaves the two norms of every block, for vanilla and specialised ViTs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TAPS = ("before.norm1", "after.norm1", "before.norm2", "after.norm2")

# The names of a pre-norm block's parts in transformers (the DINO family; ViT, DeiT, BEiT; CLIP, SigLIP) and timm.
NORM1_NAMES = ("norm1", "layernorm_before", "layer_norm1")
NORM2_NAMES = ("norm2", "layernorm_after", "layer_norm2")
ATTENTION_NAMES = ("attention", "self_attn", "attn")
MLP_NAMES = ("mlp", "intermediate")

CLASS_TOKEN_NAMES = ("cls_token", "class_embedding", "class_token", "distillation_token", "dist_token")
REGISTER_NAMES = ("register_tokens", "reg_token")

CLASS_ATTENTION_NAME = "class_layer"  # our class-attention layers see no patch as a query: they are no blocks here

TapSink = Callable[[int, str, Tensor], None]


@dataclass(frozen=True)
class TapPoints:
    """The modules of one block whose inputs (and output) are read."""

    name: str
    block: nn.Module
    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    mlp: nn.Module


@dataclass(frozen=True)
class TokenLayout:
    """How many leading tokens a model has: class tokens, then registers; the patches follow."""

    num_cls: int
    num_registers: int

    def split(self, tokens: Tensor, num_patches: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """(batch, tokens, hidden) -> first class token (batch, hidden) or None, registers, patches.

        A second class-like token (the distillation token of DeiT) belongs to neither. A sequence of registers and
        patches alone, as in class-attention models before their last blocks, has no class token.
        """
        prefix = tokens.shape[1] - num_patches
        num_cls = self.num_cls if prefix == self.num_cls + self.num_registers else 0
        if prefix != num_cls + self.num_registers:
            raise ValueError(
                f"expected {self.num_cls} class + {self.num_registers} register + {num_patches} patch tokens, got "
                f"{tokens.shape[1]} tokens; models that drop or mask patches must be run with all of them"
            )
        cls = tokens[:, 0] if num_cls else None
        return cls, tokens[:, num_cls:prefix], tokens[:, prefix:]


def find_blocks(model: nn.Module) -> list[TapPoints]:
    """The pre-norm transformer blocks of a plain ViT, in order; empty where there are none (Swin, ConvNeXt ...)."""
    found = []
    for name, module in model.named_modules():
        parts = [_child(module, names) for names in (NORM1_NAMES, ATTENTION_NAMES, NORM2_NAMES, MLP_NAMES)]
        if all(part is not None for part in parts) and CLASS_ATTENTION_NAME not in name.split("."):
            norm1, attention, norm2, mlp = parts
            found.append(TapPoints(name, module, norm1, attention, norm2, mlp))
    parents = {points.name.rpartition(".")[0] for points in found}
    if len(parents) > 1:
        return []  # several stages, or several encoders: no single sequence of blocks
    return found


def find_layout(model: nn.Module) -> TokenLayout:
    """Count the class and register tokens by the parameters that hold them."""
    counts = {"cls": 0, "registers": 0}
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        rows = parameter.shape[-2] if parameter.dim() > 1 else 1  # CLIP keeps its class token as one vector
        counts["cls"] += rows if leaf in CLASS_TOKEN_NAMES else 0
        counts["registers"] += rows if leaf in REGISTER_NAMES else 0
    return TokenLayout(counts["cls"], counts["registers"])


def find_grid(model: nn.Module, height: int, width: int) -> tuple[int, int]:
    """The patch grid of an image: its size over the stride of the patch embedding (the model's first convolution)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return height // module.stride[0], width // module.stride[1]
    size = getattr(model.config, "patch_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding convolution and its config has no patch_size")
    rows, columns = (size, size) if isinstance(size, int) else size
    return height // rows, width // columns


@contextmanager
def tapped(blocks: list[TapPoints], sink: TapSink) -> Iterator[None]:
    """While this is open, every forward calls `sink(block index, tap, tensor)`; nothing is kept here.

    What leaves a norm is read where it is used, at the input of the attention and of the MLP: a specialised layer runs
    its patch norm on all rows and then overwrites the class rows, so only its consumer sees the assembled rows. The
    tap `"output"` is the residual stream after the block.
    """
    handles = []
    try:
        for index, points in enumerate(blocks):
            modules = (points.norm1, points.attention, points.norm2, points.mlp)
            for tap, module in zip(TAPS, modules, strict=True):
                hook = _input_hook(sink, index, tap)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(points.block.register_forward_hook(_output_hook(sink, index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = dict(module.named_children())
    return next((children[name] for name in names if name in children), None)


def _input_hook(sink: TapSink, index: int, tap: str) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sink(index, tap, args[0] if args else kwargs["hidden_states"])

    return hook


def _output_hook(sink: TapSink, index: int) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        sink(index, "output", output if torch.is_tensor(output) else output[0])

    return hook
