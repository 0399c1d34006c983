"""Features of frozen encoders, computed once, from which every candidate of a search reads its own part."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from vitweave.analysis.encoder_fusion_comparison import PLAIN
from vitweave.analysis.fusion_candidates import ALONE, Candidate, layer_candidate
from vitweave.analysis.fusion_comparison import FUSION_PARTS, PARTS, tower_of
from vitweave.configuration.encoder_facts import encoder_facts
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.training.feature_cache import CachedFeatures, StackedSamples, cache_features
from vitweave.training.feature_keys import arithmetic, digest_of, settled
from vitweave.training.retrieval_features import FeatureSource

LAYERED = ("cls", "patches", "patch_means")  # entries with an axis of layers


class ChosenFeatures(Dataset):
    """Kept features, of which `choose` takes what a candidate reads.

    Args:
        stride: of the rows and columns of label maps: 4 keeps every fourth, which trains as well in a fraction of the
            time where the features are coarser than that.
    """

    def __init__(self, features: CachedFeatures, choose: Callable[[dict], dict], stride: int = 1):
        self.features, self.choose, self.stride = features, choose, stride

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> StackedSamples:
        batch = dict(self.features.__getitems__(indices).batch)
        batch["encoder_outputs"] = self.choose(batch["encoder_outputs"])
        labels = batch.get("labels")
        if self.stride > 1 and labels is not None and labels.ndim == 3:
            start = self.stride // 2
            batch["labels"] = labels[:, start :: self.stride, start :: self.stride].contiguous()
        return StackedSamples(batch, len(indices))


class KeptFeatures:
    """What the candidates of a search read of each encoder by itself, and of the tower of all.

    Args:
        encoders: vision models; they are frozen.
        parts: of every encoder the training and the validation images, as it sees them.
        tower: fields of `MultiEncoderConfig` that say how several encoders see the images of the first.
        candidates: of the search.
    """

    def __init__(
        self,
        encoders: Sequence[PreTrainedModel],
        parts: Sequence[tuple[Dataset, Dataset]],
        tower: dict,
        candidates: Sequence[Candidate],
        dense: bool,
    ):
        self.encoders = [encoder.requires_grad_(False).eval() for encoder in encoders]
        self.parts, self.tower, self.dense = parts, tower, dense
        self.kept: dict[int | None, tuple[CachedFeatures, CachedFeatures]] = {}  # None is the tower
        self.layers: dict[int | None, list[list[int]]] = {}
        self.needs: dict[int, frozenset[str]] = {}
        for candidate in candidates:
            self.note(candidate)
        self.sources = {key: self.source(key) for key in self.layers}

    def facts(self) -> dict:
        """What a cost depends on besides the candidate and its head: encoders, sizes of images, device."""
        configs = [
            json.dumps(settled(encoder.config.to_dict()), sort_keys=True, default=str) for encoder in self.encoders
        ]
        sizes = [tuple(validation[0]["pixel_values"].shape) for _, validation in self.parts]
        return {"encoders": configs, "images": sizes, "tower": self.tower, "device": arithmetic(self.device)}

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return self.encoders[0].device

    def note(self, candidate: Candidate) -> None:
        """Remember what a candidate reads."""
        key = None if candidate.is_tower else candidate.encoders[0]
        known = self.layers.setdefault(key, [[] for _ in (self.encoders if key is None else [key])])
        for place, layers in zip(candidate.encoders if key is None else [0], candidate.layers, strict=True):
            known[place] = sorted({*known[place], *layers})
        if key is not None:
            self.needs[key] = self.needs.get(key, frozenset()) | self.needs_of(candidate)

    def needs_of(self, candidate: Candidate) -> frozenset[str]:
        """What the fusion of a single encoder's layers reads."""
        hidden_size = encoder_facts(self.encoders[candidate.encoders[0]].config).hidden_sizes[-1]
        return candidate.layer_fusion(hidden_size).needs

    def source(self, key: int | None) -> torch.nn.Module:
        """The model whose `encode` gives the features: an encoder with all its layers, or the tower."""
        if key is not None:
            (layers,) = self.layers[key]
            fusion = layer_candidate(0, tuple(layers), ALONE, self.dense)
            model = LayerFusionModel.from_encoder(
                self.encoders[key], layers=layers, fusion_type="weighted_sum", fusion_options=fusion.options
            )
            return FeatureSource(tower_of(model), needs=self.needs[key])
        return MultiEncoderModel.from_encoders(self.encoders, fusion_type=PLAIN, **self.tower_fields(self.layers[None]))

    def tower_fields(self, layers: Sequence[Sequence[int]], encoders: Sequence[int] | None = None) -> dict:
        """How a tower of some of the encoders sees the images, and reads these layers of each."""
        fields = dict(self.tower)
        given = fields.pop("encoder_options", None) or [{}] * len(self.encoders)
        encoders = range(len(self.encoders)) if encoders is None else encoders
        options = [
            {**given[index], "layer": list(chosen), "frozen": True}
            for index, chosen in zip(encoders, layers, strict=True)
        ]
        return {**fields, "encoder_options": options}

    def compute(self, folder: Path, dtype: torch.dtype | None) -> None:
        """Run every image through the encoders, unless an earlier search has."""
        for key, source in self.sources.items():
            train, validation = self.parts[key or 0]
            validation = cache_features(source, validation, folder, dtype)  # the smaller one first
            self.kept[key] = (cache_features(source, train, folder, dtype), validation)

    @property
    def digest(self) -> str:
        """Stands for the data: what was kept of which images."""
        found = {}
        for key, parts in self.kept.items():
            found[str(key)] = [
                digest_of([part.shard(number).keys[place] for number, place in part.places.tolist()]) for part in parts
            ]
        return digest_of(found)

    def chooser(self, candidate: Candidate) -> Callable[[dict], dict]:
        """Takes what a candidate reads of what was kept."""
        if candidate.is_tower:
            return lambda kept: {"maps": self.chosen_maps(kept["maps"], candidate)}
        known = self.layers[candidate.encoders[0]][0]
        places = torch.tensor([known.index(layer) for layer in candidate.layers[0]])

        def choose(kept: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: part.index_select(1, places) if name in LAYERED else part for name, part in kept.items()}

        return choose

    def chosen_maps(self, maps: Sequence[Tensor], candidate: Candidate) -> tuple[Tensor, ...]:
        """Of every encoder that a candidate reads the channels of its layers."""
        found = []
        for index, layers in zip(candidate.encoders, candidate.layers, strict=True):
            known = self.layers[None][index]
            parts = maps[index].unflatten(1, (len(known), -1))
            found.append(parts[:, [known.index(layer) for layer in layers]].flatten(1, 2))
        return tuple(found)

    def names_read(self, candidate: Candidate) -> list[str]:
        """The entries of the kept features that a candidate reads."""
        if candidate.is_tower:
            return ["maps"]
        needs = self.needs_of(candidate)
        dense = ["patches", "base_patches"] if "patches" in needs else []
        return [*PARTS, *FUSION_PARTS, *dense, *(["patch_means"] if "patch_means" in needs else [])]

    def of(self, candidate: Candidate, part: int, stride: int = 1) -> ChosenFeatures:
        """The training (0) or validation (1) images as a candidate reads them."""
        features = self.kept[None if candidate.is_tower else candidate.encoders[0]][part]
        return ChosenFeatures(features.only(self.names_read(candidate)), self.chooser(candidate), stride)

    @torch.no_grad()
    def sample(self, key: int | None, images: int) -> tuple[dict, Tensor]:
        """Features and pixels of the first validation images, computed here and now."""
        dataset = self.parts[key or 0][1]
        items = [dataset[index] for index in range(min(images, len(dataset)))]
        pixel_values = torch.stack([item["pixel_values"] for item in items])
        masks = [item["patch_mask"] for item in items if "patch_mask" in item]
        given = [pixel_values, *([torch.stack(masks)] if masks else [])]
        return self.sources[key].eval().encode(*(part.to(self.device) for part in given)), pixel_values
