"""The sizes of a released modality-fusion model, read off the shapes of its tensors."""

import re

from transformers import SegformerConfig

from vitweave.modeling.conversion.modality_release import OfficialState

MIT_HEADS = (1, 2, 5, 8)  # of the stages of B0 to B5
ENSEMBLE = "alpha"  # the weights of the streams' logits
STRIDES = {7: 4, 3: 2}  # of patch embeddings, by their kernel


def mit_stream(state: OfficialState, root: str, wrap: str = "") -> SegformerConfig:
    """The MiT of a release; its heads, which no tensor tells, are those of B0 to B5.

    Args:
        root, wrap: as in `mit_entries`.
    """
    numbers = range(1, 1 + len(numbers_in(state, rf"{re.escape(root)}patch_embed(\d)\.proj{re.escape(wrap)}\.weight")))
    widths, channels, kernels, reductions, ratios, depths = [], [], [], [], [], []
    for number in numbers or (1,):
        width, read, kernel, _ = state.size(f"{root}patch_embed{number}.proj{wrap}.weight")
        first = f"{root}block{number}.0."
        reduction = f"{first}attn.sr{wrap}.weight"
        widths.append(width)
        channels.append(read)
        kernels.append(kernel)
        depths.append(len(numbers_in(state, rf"{re.escape(root)}block{number}\.(\d+)\..+")))
        reductions.append(state.size(reduction)[2] if reduction in state.shapes else 1)
        ratios.append(state.size(f"{first}mlp.fc1{wrap}.weight")[0] / width)
    strange = sorted(set(kernels) - set(STRIDES))
    if strange:
        raise ValueError(f"expected patch embeddings with kernels of {sorted(STRIDES)}, got {strange}; give a config")
    return SegformerConfig(
        num_encoder_blocks=len(widths),
        num_channels=channels[0],
        hidden_sizes=widths,
        depths=depths,
        num_attention_heads=list(MIT_HEADS[: len(widths)]),
        sr_ratios=reductions,
        mlp_ratios=[int(ratio) if ratio == int(ratio) else ratio for ratio in ratios],
        patch_sizes=kernels,
        strides=[STRIDES[kernel] for kernel in kernels],
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def decoder_fields(state: OfficialState, head: str) -> dict:
    """Width and classes of the MLP decoder whose names begin with `head`."""
    return {
        "decoder_hidden_size": state.size(f"{head}linear_c1.proj.weight")[0],
        "num_labels": state.size(f"{head}linear_pred.weight")[0],
    }


def recipe_fields(state: OfficialState, head: str) -> dict:
    """What the recipes for NYUDv2 and SUN RGB-D leave out of training shows by its first values."""
    norm = f"{head}linear_fuse.bn."
    frozen = not state.value(norm + "running_mean").any() and (state.value(norm + "running_var") == 1).all()
    ensemble = "mean" if has_untrained_ensemble(state, 2) else "trained"
    return {"decoder_frozen_norm": bool(frozen), "ensemble": ensemble}


def has_untrained_ensemble(state: OfficialState, num_streams: int) -> bool:
    """Whether the weights of the ensemble are there, and what they start as."""
    if ENSEMBLE not in state.shapes or state.size(ENSEMBLE) != (num_streams,):
        return False
    return bool((state.value(ENSEMBLE) == 1).all())


def numbers_in(state: OfficialState, pattern: str) -> set[int]:
    """What the group of a pattern is in the names that fit."""
    return {int(match[1]) for name in state.shapes if (match := re.fullmatch(pattern, name))}
