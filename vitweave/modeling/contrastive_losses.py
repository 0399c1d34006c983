"""Losses and scores that compare a batch of images with a batch of texts.

Similarities are (images, texts), and pair i is image i with text i unless `positive` says otherwise. `positive` and
`ignored` are (images, texts), bool: the pairs that belong together, and those that count for nothing. All losses are
computed in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_targets(caption_ids: Tensor, duplicates: str = "mask") -> tuple[Tensor, Tensor]:
    """Which pairs of a batch are positive, and which are ignored.

    An image with the caption of another image is no negative pair: two equal captions fit both images.

    Args:
        caption_ids: (batch,), equal where the captions are.
        duplicates: "mask" ignores the pairs with an equal caption, "positives" counts them as positive.

    Returns:
        positive, ignored.
    """
    own = torch.eye(len(caption_ids), dtype=torch.bool, device=caption_ids.device)
    equal = caption_ids[:, None] == caption_ids[None, :]
    if duplicates == "positives":
        return equal, torch.zeros_like(own)
    return own, equal & ~own


def info_nce(logits: Tensor, positive: Tensor | None = None, ignored: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of images over texts and of texts over images (CLIP, arXiv:2103.00020).

    With several positives in a row the target is their uniform distribution. Rows and columns without a positive are
    left out of the mean; if none has one, the loss is zero.

    Args:
        logits: (images, texts), scaled similarities.
    """
    positive, ignored = default_targets(logits, positive, ignored)
    over_texts = row_cross_entropy(logits, positive, ignored)
    over_images = row_cross_entropy(logits.T, positive.T, ignored.T)
    return (over_texts + over_images) / 2


def siglip(logits: Tensor, positive: Tensor | None = None, ignored: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every pair, summed, over the number of images with a positive (arXiv:2303.15343).

    Args:
        logits: (images, texts), scaled and biased similarities.
    """
    positive, ignored = default_targets(logits, positive, ignored)
    logits = at_least_float32(logits)
    losses = F.softplus(torch.where(positive, -logits, logits)).masked_fill(ignored, 0)
    return losses.sum() / positive.any(dim=1).sum().clamp(min=1)


CONTRASTIVE_LOSSES = {"infonce": info_nce, "siglip": siglip}


def hardest_negative_loss(scores: Tensor) -> Tensor:
    """Softplus of the best wrong document's score minus that of the right one (ColPali's pairwise cross-entropy).

    Args:
        scores: (queries, documents), query i belongs to document i.
    """
    scores = at_least_float32(scores)
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    hardest = scores.masked_fill(own, torch.finfo(scores.dtype).min).amax(dim=1)
    return F.softplus(hardest - scores.diagonal()).mean()


def late_interaction(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    temperature: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """Each query token takes its best document token, and the query their "sum" (ColBERT, arXiv:2004.12832) or "mean".

    Masked tokens take no part. (ColPali leaves padded document tokens in as zero rows, which puts a floor of 0 under
    the scores of padded documents; without a mask this function does the same.) A query without valid tokens scores 0,
    and so does a document without.

    Args:
        queries: (queries, tokens, hidden).
        documents: (documents, tokens, hidden).
        query_mask, document_mask: (queries or documents, tokens), True = valid.
        temperature: above 0 the best is the soft maximum `temperature * logsumexp(similarity / temperature)`.

    Returns:
        (queries, documents).
    """
    similarity = torch.einsum("qmh,dnh->qdmn", queries, documents) / (temperature or 1.0)
    if document_mask is not None:
        similarity = similarity.masked_fill(~document_mask[None, :, None], torch.finfo(similarity.dtype).min)
    best = temperature * similarity.logsumexp(dim=-1) if temperature else similarity.amax(dim=-1)
    # best: (queries, documents, query tokens)
    if document_mask is not None:
        best = best.masked_fill(~document_mask.any(dim=1)[None, :, None], 0)
    if query_mask is not None:
        best = best.masked_fill(~query_mask[:, None], 0)
    total = best.sum(dim=-1)
    if reduction == "sum":
        return total
    return total / (queries.shape[1] if query_mask is None else query_mask.sum(dim=1).clamp(min=1)[:, None])


def filip(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Fine-grained contrastive loss: each direction has its own token-wise similarities (FILIP, arXiv:2111.07783).

    Args:
        image_tokens: (batch, image tokens, hidden), unit vectors.
        text_tokens: (batch, text tokens, hidden), unit vectors.
        logit_scale: factor on the similarities.
        image_mask, text_mask: (batch, tokens), True = valid.
    """
    images = late_interaction(image_tokens, text_tokens, image_mask, text_mask, reduction="mean")
    texts = late_interaction(text_tokens, image_tokens, text_mask, image_mask, reduction="mean")
    target = torch.arange(len(images), device=images.device)
    losses = [F.cross_entropy(at_least_float32(logit_scale * scores), target) for scores in (images, texts)]
    return (losses[0] + losses[1]) / 2


def default_targets(logits: Tensor, positive: Tensor | None, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonal where no positives are given, nothing where nothing is ignored."""
    if positive is None:
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(f"expected as many images as texts, one pair per row, got {tuple(logits.shape)}")
        positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return positive, torch.zeros_like(positive) if ignored is None else ignored


def row_cross_entropy(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """Mean over the rows with a positive of the cross-entropy towards the mean of the row's positives."""
    logits = at_least_float32(logits).masked_fill(ignored, torch.finfo(torch.float32).min)
    count = positive.sum(dim=1)
    target = logits.masked_fill(~positive, 0).sum(dim=1) / count.clamp(min=1)
    losses = (logits.logsumexp(dim=1) - target).masked_fill(count == 0, 0)
    return losses.sum() / (count > 0).sum().clamp(min=1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision to float32, anything else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
