"""Contrastive batches larger than memory: GradCache (arXiv:2101.06983)."""

from torch import nn

from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel


def cache_gradients(model: nn.Module, chunk_size: int | None) -> nn.Module:
    """Let a retriever encode its training batches in chunks of `chunk_size` pairs; None encodes them whole again.

    The gradient is that of the whole batch, at the price of a second forward pass of both encoders; the activations
    of one chunk are in memory at a time. It is a property of the model object, not of its config: the stock `Trainer`,
    its checkpoints and resuming need to know nothing of it. Dropout draws other masks than without chunks, and equal
    ones in both passes. Works below adapters and `DistributedDataParallel`.

    Args:
        model: a retriever, or a model that wraps one (PEFT).

    Returns:
        The model.
    """
    retrievers = [module for module in model.modules() if isinstance(module, ImageTextRetrieverModel)]
    if not retrievers:
        raise ValueError(f"expected an ImageTextRetrieverModel, got {type(model).__name__}, which holds none")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"expected chunks of at least one pair, got chunk_size={chunk_size}")
    for retriever in retrievers:
        if chunk_size is not None:
            refuse_batch_statistics(retriever)
        retriever.embedding_chunk_size = chunk_size
    return model


def refuse_batch_statistics(model: nn.Module) -> None:
    """Batch norms would see the statistics of a chunk, and see them twice."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if found:
        raise ValueError(
            f"expected no batch norm in training, got {found[:3]}: in chunks it would normalise by the statistics of a"
            " chunk, not of the batch; freeze that encoder, or train without cached gradients"
        )
