"""Why a search chose what it chose: how alike the layers are, and what the trained fusion makes of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vitweave.analysis.encoder_fusion_comparison import to_device
from vitweave.analysis.fusion_candidates import Candidate
from vitweave.analysis.fusion_search_tasks import SearchTask
from vitweave.analysis.similarity import layer_similarity
from vitweave.modeling.modeling_layer_fusion import LayerFusionTrunk


@torch.no_grad()
def find_reasons(task: SearchTask, chosen: Candidate, folder: Path, candidates: Sequence[Candidate]) -> dict:
    """What is told of the chosen model.

    Returns:
        layers and similarity (a matrix of mean cosines) of the first encoder it reads, of the layers that any candidate
        reads; weights: per layer the mean share by which the fusion weighs it, where it says so; gammas: mean size of
        each read-out's scale, where there is one; columns: of a concatenation each layer's share of the projection.
    """
    kept, key = task.features, chosen.encoders[0]
    found: dict = {}
    if key in kept.kept:
        features = kept.kept[key][0]
        batch = features.__getitems__(list(range(min(16, len(features))))).batch["encoder_outputs"]
        tokens = batch["patches"] if "patches" in batch else batch["cls"].unsqueeze(2)
        found |= {"layers": kept.layers[key][0], "similarity": rounded(layer_similarity(tokens))}
    if chosen.is_tower:
        return found
    model = task.load(folder)
    trunk = next(module for module in model.modules() if isinstance(module, LayerFusionTrunk))
    data = kept.of(chosen, 1)
    encoded = data.__getitems__(list(range(min(16, len(data))))).batch["encoder_outputs"]
    fused = trunk.fuse_encoded(to_device(encoded, model.device))[1]
    found["chosen_layers"] = list(chosen.layers[0])
    if fused.layer_weights is not None:
        found["weights"] = rounded(fused.layer_weights.reshape(-1, trunk.fusion.num_layers).mean(dim=0))
    gammas = {name: one for name, one in trunk.fusion.named_parameters() if name.startswith("gamma_")}
    if gammas:
        found["gammas"] = {name.removeprefix("gamma_"): rounded(one.abs().mean()) for name, one in gammas.items()}
    projection = getattr(trunk.fusion, "patch_proj" if task.dense else "proj", None)
    if isinstance(projection, nn.Linear) and projection.in_features == len(chosen.layers[0]) * projection.out_features:
        found["columns"] = rounded(column_shares(projection.weight, len(chosen.layers[0])))
    return found


def column_shares(weight: Tensor, parts: int) -> Tensor:
    """(parts,) shares of a projection (out, parts * size) in its squared weights."""
    squares = weight.detach().unflatten(1, (parts, -1)).square().sum(dim=(0, 2))
    return squares / squares.sum()


def rounded(values: Tensor, digits: int = 4):
    """As plain numbers."""
    return values.double().mul(10**digits).round().div(10**digits).tolist()
