"""Tensors of TokenFusion's image-to-image networks (yikaiw/TokenFusion), and ours.

Their blocks are those of the segmenters under other names: encoder and decoder apart, stages from 0, norms `lrnorm_0`.
"""

import re

from torch import Tensor

from vitweave.modeling.conversion.gemini_fusion import STREAMS, from_official

# name in an encoder or decoder -> name in a segmenter; `stage` counts from 0 here and from 1 there
SHARED_NAMES = {
    r"patch_embed_(?P<side>enc)\.(?P<stage>\d)\.(?P<rest>.+)": "encoder.patch_embed{stage}.{rest}",
    r"block_(?P<side>enc|dec)\.(?P<stage>\d)\.(?P<rest>.+)": "encoder.block{stage}.{rest}",
    r"norm_(?P<side>enc|dec)\.(?P<stage>\d)\.(?P<rest>.+)": "encoder.norm{stage}.{rest}",
}
SCORES = r"score_predictor\..+"
UP = r"patch_embed_dec\.(?P<stage>\d)\.proj\.module\.(?P<leaf>weight|bias)"
UNUSED = r"patch_embed_dec\.\d\.norm\..+"  # a norm that nothing runs
PROJECT = r"project\.module\.(?P<leaf>weight|bias)"


def split_sides(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What belongs to the stages of the encoder and of the decoder, under the segmenters' names, and the rest."""
    sides: dict[str, dict[str, Tensor]] = {"enc": {}, "dec": {}}
    rest = {}
    for name, tensor in state.items():
        for pattern, theirs in SHARED_NAMES.items():
            match = re.fullmatch(pattern, name)
            if match:
                inner = match["rest"].replace("lrnorm_", "ln_").replace("dwconv.dwconv.module.", "dwconv.dwconv.")
                sides[match["side"]][theirs.format(stage=int(match["stage"]) + 1, rest=inner)] = tensor
                break
        else:
            if re.fullmatch(SCORES, name):
                sides["enc"][f"encoder.{name}"] = tensor
            elif not re.fullmatch(UNUSED, name):
                rest[name] = tensor
    return sides["enc"], sides["dec"], rest


def generator_from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `MixVisionTransformerGen` to those of `ModalityFusionForImageToImage`.

    The norms behind the decoder's up-steps are dropped: nothing reads them.
    """
    encoder, decoder, rest = split_sides(state)
    ours = from_official(encoder)
    ours |= {name.replace(STREAMS, "decoder.stages"): tensor for name, tensor in from_official(decoder).items()}
    ups = [name for name in rest if re.fullmatch(UP, name)]
    last = max((int(re.fullmatch(UP, name)["stage"]) for name in ups), default=0)
    for name in ups:
        match, tensor = re.fullmatch(UP, name), rest.pop(name)
        place = "decoder" if int(match["stage"]) == last else f"decoder.stages.{match['stage']}"
        ours[f"{place}.up.proj.{match['leaf']}"] = tensor
    return ours | named_rest(rest, "decoder.project")


def discriminator_from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `MixVisionTransformerDis` to those of `ModalityDiscriminator`."""
    encoder, decoder, rest = split_sides(state)
    ours = {name.replace(STREAMS, "streams.stages"): tensor for name, tensor in from_official(encoder).items()}
    return ours | named_rest(decoder | rest, "score")


def named_rest(rest: dict[str, Tensor], project: str) -> dict[str, Tensor]:
    """The last layer and the weights of the ensemble; refuses what is left."""
    ours = {}
    for name in list(rest):
        match = re.fullmatch(PROJECT, name)
        if match:
            ours[f"{project}.{match['leaf']}"] = rest.pop(name)
    if "alpha" in rest:
        ours["ensemble.alpha"] = rest.pop("alpha")
    if rest:
        raise ValueError(f"{len(rest)} names are none of TokenFusion's image-to-image networks, e.g. {list(rest)[:5]}")
    return ours
