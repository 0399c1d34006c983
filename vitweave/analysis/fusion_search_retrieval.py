"""A search over layer fusions in image-text retrieval, with a text model that is trained from scratch."""

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import AutoModel, PreTrainedModel

from vitweave.analysis.encoder_fusion_comparison import split
from vitweave.analysis.fusion_candidates import Candidate
from vitweave.analysis.fusion_search_features import KeptFeatures
from vitweave.analysis.fusion_search_tasks import SearchTask
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.text_encoder import build_text_model
from vitweave.training.retrieval import train_retrieval
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import embed_dataset
from vitweave.training.retrieval_features import CachedRetrieval
from vitweave.training.retrieval_metrics import CUTOFFS, DIRECTIONS, query_values, retrieval_ranks
from vitweave.training.text_tokenizer import small_text_config


class ChosenRecords(Sequence):
    """Some of the records, in the given order."""

    def __init__(self, records: Sequence[Mapping], places: Sequence[int]):
        self.records, self.places = records, list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping:
        return self.records[self.places[index]]

    def fields(self, index: int) -> Mapping:
        """A record, without its image where the source can do so."""
        read = self.records.fields if hasattr(self.records, "fields") else self.records.__getitem__
        return read(self.places[index])


class RetrievalSearch(SearchTask):
    """RSUM: the sum of R@1, 5 and 10 in both directions, 0 to 6.

    Args:
        train, validation: on one processor, whose tokenizer the text model is made for.
        text_size, text_layers: of the text model.
        projection_dim: channels of the space images and texts share.
    """

    metric, auto, dense = "RSUM", AutoModel, False
    recipe = train_retrieval

    def __init__(
        self,
        features: KeptFeatures,
        train: RetrievalDataset,
        validation: RetrievalDataset,
        text_size: int = 128,
        text_layers: int = 1,
        projection_dim: int = 256,
    ):
        super().__init__(features)
        self.texts = (train, validation)
        self.text_size, self.text_layers, self.projection_dim = text_size, text_layers, projection_dim

    def facts(self) -> dict:
        texts = [[part.corpus(), part.draw, part.seed] for part in self.texts]
        sizes = [self.text_size, self.text_layers, self.projection_dim]
        return {
            **super().facts(),
            "texts": texts,
            "tokens": self.texts[0].processor.tokenizer.get_vocab(),
            "sizes": sizes,
        }

    def cost_model(self, candidate: Candidate) -> PreTrainedModel:
        """The vision side: the text model is the same for all."""
        return self.fused(candidate, LayerFusionModel)

    def build(self, candidate: Candidate) -> PreTrainedModel:
        tokenizer, heads = self.texts[0].processor.tokenizer, max(1, self.text_size // 64)
        text = build_text_model(small_text_config(tokenizer, self.text_size, self.text_layers, heads))
        return ImageTextRetrieverModel.from_encoders(
            self.cost_model(candidate), text, freeze_vision_encoder=True, projection_dim=self.projection_dim
        )

    def data(self, candidate: Candidate, held_out: float) -> tuple[Dataset, Dataset]:
        parts = tuple(
            CachedRetrieval(texts, self.features.of(candidate, place)) for place, texts in enumerate(self.texts)
        )
        if not held_out:
            return parts
        return tuple(chosen_records(parts[0], subset.indices) for subset in split(parts[0], held_out))

    def sums(self, model: PreTrainedModel, dataset: Dataset, batch_size: int) -> Tensor:
        """(groups, 4): hits and queries of both directions, of records that belong together."""
        images, texts = embed_dataset(model, dataset, batch_size)
        ranks = retrieval_ranks(images, texts)
        groups = dict(zip(DIRECTIONS, (images.groups, texts.groups), strict=True))
        known, columns = torch.unique(torch.cat(list(groups.values()))), []
        for way in DIRECTIONS:
            place = torch.searchsorted(known, groups[way])
            hits = query_values(ranks[way].cpu())[:, : len(CUTOFFS)].sum(dim=1)
            for values in (hits, torch.ones_like(hits)):
                columns.append(torch.zeros(len(known), dtype=torch.float64).index_add_(0, place, values))
        return torch.stack(columns, dim=1)

    def value(self, sums: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]

    def save(self, model: PreTrainedModel, candidate: Candidate, folder: Path) -> None:
        model.save_pretrained(folder)
        self.texts[0].processor.save_pretrained(folder)


def chosen_records(dataset: CachedRetrieval, places: Sequence[int]) -> CachedRetrieval:
    """Some of the records with their features."""
    texts = copy(dataset)
    texts.records = ChosenRecords(dataset.records, places)
    return CachedRetrieval(texts, Subset(dataset.features, places))
