"""Names of the tensors of a MiT and of its MLP decoder in NVIDIA's code and what followed from it, and ours."""

from vitweave.modeling.conversion.name_table import NameEntry, leaves

STREAMS = "modality_fusion.streams.stages"


def mit_entries(
    root: str, wrap: str = "", norm: str = "", index: str = "", join: str = "stack", streams: str = STREAMS
) -> list[NameEntry]:
    """The entries of a MiT.

    Args:
        root: what official names begin with.
        wrap: what stands behind the name of an official layer that serves all modalities.
        norm: what stands behind that of an official norm.
        index: what stands behind the name of our layer, where every modality has one.
        join: how ours hold the norms of all modalities.
        streams: what our names begin with.
    """
    block, our_block = root + "block{number}.{block}.", streams + ".{stage}.blocks.{block}."
    embed, our_embed = root + "patch_embed{number}.", streams + ".{stage}.patch_embeddings."
    keys_and_values = tuple(f"{our_block}attention.{letter}_proj{index}.{{leaf}}" for letter in "kv")
    layers = {
        embed + "proj": our_embed + "proj",
        block + "attn.q": our_block + "attention.q_proj",
        block + "attn.proj": our_block + "attention.o_proj",
        block + "attn.sr": our_block + "attention.sequence_reduction.sequence_reduction",
        block + "mlp.{layer}": our_block + "mlp.{layer}",
    }
    norms = {
        embed + "norm": our_embed + "layer_norm",
        block + "norm1": our_block + "layernorm_before",
        block + "attn.norm": our_block + "attention.sequence_reduction.layer_norm",
        block + "norm2": our_block + "layernorm_after",
        root + "norm{number}": streams + ".{stage}.layer_norm",
    }
    return [
        *(leaves(official + wrap, ours + index) for official, ours in layers.items()),
        NameEntry(f"{block}attn.kv{wrap}.{{leaf}}", keys_and_values),
        leaves(block + "mlp.dwconv.dwconv", our_block + "mlp.dwconv.dwconv" + index),
        *(leaves(official + norm, ours, join=join) for official, ours in norms.items()),
    ]


def decoder_entries(head: str, conv: str = "conv", norm: str = "bn") -> list[NameEntry]:
    """The entries of the MLP decoder.

    Args:
        head: what official names begin with.
        conv, norm: the official names of the two layers that join the stages.
    """
    return [
        leaves(head + "linear_c{number}.proj", "decoder.projections.{stage}"),
        leaves(f"{head}linear_fuse.{conv}", "decoder.fuse"),
        NameEntry(f"{head}linear_fuse.{norm}.{{statistic}}", ("decoder.norm.{statistic}",)),
        leaves(head + "linear_pred", "decoder.classifier"),
    ]
