"""Every image and every text of a dataset through a dual encoder, and what retrieval among them gives."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitweave.training.feature_cache import FeatureCollator
from vitweave.training.modes import evaluating
from vitweave.training.retrieval_data import RetrievalCollator, RetrievalDataset, text_id
from vitweave.training.retrieval_metrics import retrieval_metrics, retrieval_ranks
from vitweave.training.retrieval_ranking import CombinedRanking, GallerySide


class TextsOf(Dataset):
    """All texts of a retrieval dataset; `owners` says which record each belongs to."""

    def __init__(self, dataset: RetrievalDataset):
        self.dataset = dataset
        self.entries = [(index, text) for index in range(len(dataset)) for text in dataset.texts(index)]
        self.owners = torch.tensor([index for index, _ in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        index, text = self.entries[number]
        return self.dataset.encode_text(text, index)


def record_groups(dataset: RetrievalDataset) -> Tensor:
    """A group per record (records,): records that share a text or an image file are right answers to each other."""
    groups, seen = list(range(len(dataset))), {}

    def root(index: int) -> int:
        while groups[index] != index:
            index = groups[index]
        return index

    for index in range(len(dataset)):
        texts = (text if isinstance(text, str) else " ".join(text) for text in dataset.texts(index))
        keys = {("text", text_id(text)) for text in texts} | {("path", dataset.fields(index).get("path", index))}
        for key in keys:
            groups[root(index)] = root(seen.setdefault(key, index))
    return torch.tensor([root(index) for index in range(len(dataset))])


def known_inputs(function, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a function takes by name."""
    return {name: value for name, value in batch.items() if name in inspect.signature(function).parameters}


def image_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Unit vectors (batch, hidden), tiles (batch, tiles, hidden), their mask; both None without alignment."""
    if hasattr(model, "encode_images"):
        return tuple(model.encode_images(**known_inputs(model.encode_images, batch)))
    features = model.get_image_features(**known_inputs(model.get_image_features, batch))
    return F.normalize(getattr(features, "pooler_output", features), dim=-1), None, None


def text_embeddings(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Unit vectors (batch, hidden), sentences (batch, sentences, hidden) and their mask, as for images."""
    if hasattr(model, "encode_texts"):
        return tuple(model.encode_texts(**known_inputs(model.encode_texts, batch)))
    features = model.get_text_features(**known_inputs(model.get_text_features, batch))
    return F.normalize(getattr(features, "pooler_output", features), dim=-1), None, None


def embed_all(model: nn.Module, dataset: Dataset, collator, embed, batch_size: int, num_workers: int = 0) -> tuple:
    """`embed(model, batch)` of everything in `dataset`, joined on the CPU in float32."""
    device = next(model.parameters()).device
    parts = []
    with evaluating(model):
        for batch in DataLoader(dataset, batch_size, collate_fn=collator, num_workers=num_workers):
            found = embed(model, send_to_device(batch, device))
            parts.append([None if one is None else one.cpu() for one in found])
    return tuple(None if column[0] is None else join_padded(column) for column in zip(*parts, strict=True))


def join_padded(parts: Sequence[Tensor]) -> Tensor:
    """Join batches whose second axis (sentences) may differ in length; what is filled up is 0 or False."""
    parts = [part if part.dtype == torch.bool else part.float() for part in parts]
    if parts[0].ndim == 2 and parts[0].dtype != torch.bool:
        return torch.cat(parts)
    longest = max(part.shape[1] for part in parts)
    tail = [0, 0] * (parts[0].ndim - 2)
    return torch.cat([F.pad(part, [*tail, 0, longest - part.shape[1]]) for part in parts])


def embed_dataset(
    model: nn.Module, dataset: RetrievalDataset, batch_size: int = 32, num_workers: int = 0
) -> tuple[GallerySide, GallerySide]:
    """All images and all texts of a dataset as the two sides of a gallery."""
    run = partial(
        embed_all,
        model,
        collator=FeatureCollator(RetrievalCollator(dataset.processor.tokenizer)),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    groups, texts = record_groups(dataset), TextsOf(dataset)
    pooled, tiles, tile_mask = run(dataset=dataset.images(), embed=image_embeddings)
    images = GallerySide(pooled, groups, tiles, tile_mask)
    pooled, sentences, sentence_mask = run(dataset=texts, embed=text_embeddings)
    return images, GallerySide(pooled, groups[texts.owners], sentences, sentence_mask)


def model_ranking(model: nn.Module, alpha: float | None = None, shortlist: int = 100) -> CombinedRanking | None:
    """The combined ranking of a retriever with tile <-> sentence alignment; None for any other model."""
    if getattr(model, "alignment", None) is None:
        return None
    alpha = model.config.ranking_alpha if alpha is None else alpha
    return CombinedRanking(alpha, model.config.local_temperature, shortlist)


def evaluate_retrieval(
    model: nn.Module,
    dataset: RetrievalDataset,
    batch_size: int = 32,
    num_workers: int = 0,
    alpha: float | None = None,
    shortlist: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of images found by text and texts found by image, among all records of `dataset`.

    Records with an equal text count as right answers to each other.

    Args:
        model: an `ImageTextRetrieverModel`, or anything with `get_image_features` and `get_text_features`.
        alpha, shortlist: of the combined ranking of a retriever with tile <-> sentence alignment.
        resamples, seed: of the bootstrap.

    Returns:
        see `retrieval_metrics`; with alignment the combined ranking's too, as `combined_<name>`.
    """
    images, texts = embed_dataset(model, dataset, batch_size, num_workers)
    metrics = retrieval_metrics(images, texts, None, resamples, seed)
    ranking = model_ranking(model, alpha, shortlist)
    if ranking is not None:
        combined = retrieval_metrics(images, texts, ranking, resamples, seed)
        metrics |= {f"combined_{name}": value for name, value in combined.items() if name not in ("images", "texts")}
    return metrics


def best_alpha(
    images: GallerySide, texts: GallerySide, temperature: float, shortlist: int = 100, steps: int = 10
) -> float:
    """The weight of the cosine, among `steps` + 1 even ones, with the best mean reciprocal rank of both directions.

    To be chosen on validation data; the larger of equally good weights is taken.
    """
    scores = {}
    for step in range(steps, -1, -1):
        ranks = retrieval_ranks(images, texts, CombinedRanking(step / steps, temperature, shortlist))
        scores[step / steps] = sum((1 / found.double()).mean().item() for found in ranks.values())
    return max(scores, key=scores.get)
