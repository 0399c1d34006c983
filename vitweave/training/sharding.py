"""Weights that cannot be cut in shards."""

import torch.distributed as dist
from torch import Tensor, nn


def average_over_processes(gradient: Tensor) -> Tensor:
    """What DDP makes of a gradient."""
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def leave_numbers_whole(model: nn.Module, plugin, device=None) -> None:
    """Let accelerate's FSDP2 take a model that has single numbers as weights, as a retriever has its `logit_scale`.

    torch's `fully_shard` refuses them. They become the `ignored_modules` of the plugin, are whole in every process, and
    their gradients are averaged, as in DDP. Names and shapes stay what checkpoints have. Call it before the model is
    prepared, once; a plugin that is told by somebody else what to ignore is left as it is.

    Args:
        model: what will be prepared.
        plugin: `accelerator.state.fsdp_plugin`; nothing is done if it is None or of FSDP1.
        device: where the numbers go, since FSDP2 moves only what it shards.
    """
    numbers = nn.ParameterList(parameter for parameter in model.parameters() if parameter.ndim == 0)
    if plugin is None or plugin.fsdp_version != 2 or plugin.ignored_modules is not None or not len(numbers):
        return
    plugin.ignored_modules = [numbers.to(device)]
    for number in numbers:
        if number.requires_grad:
            number.register_hook(average_over_processes)
