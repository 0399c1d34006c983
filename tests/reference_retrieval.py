"""Replays of the retrieval vectors: contrastive losses, late interaction, ranks and their metrics."""

import torch
import torch.nn.functional as F

from vitweave.modeling.contrastive_losses import hardest_negative_loss, info_nce, late_interaction, siglip
from vitweave.training.retrieval_metrics import DIRECTIONS, retrieval_metrics, retrieval_ranks
from vitweave.training.retrieval_ranking import GallerySide


def replay_loss_clip_siglip(case):
    given = case.group("input")
    images, texts = F.normalize(given["image_raw"], dim=1), F.normalize(given["text_raw"], dim=1)
    logits = given["logit_scale"] * images @ texts.T
    case.check("output.clip", info_nce(logits))
    case.check("output.siglip", siglip(logits + given["logit_bias"]))


def replay_late_interaction(case):
    given = case.group("input")
    masks = [torch.arange(given[name].shape[1]) < given[f"{name}_lengths"][:, None] for name in ("query", "doc")]
    tokens = [given[name].masked_fill(~mask[..., None], 0) for name, mask in zip(("query", "doc"), masks, strict=True)]
    padded = late_interaction(*tokens)  # zero rows inside the maximum
    case.check("output.maxsim", padded)
    case.tolerance = max(case.tolerance, 1e-5)  # the rest was computed in float32
    case.check("output.maxsim_masked_st", late_interaction(*tokens, *masks))
    case.check("output.meanmaxsim_masked_st", late_interaction(*tokens, *masks, reduction="mean"))
    target = torch.arange(len(padded))
    normed = padded / given["query_lengths"][:, None]
    case.check("output.colbert_loss_t1_raw", F.cross_entropy(padded, target))
    case.check("output.colbert_loss_t0.02_norm", F.cross_entropy(normed / 0.02, target))
    case.check("output.pairwise_ce_raw", hardest_negative_loss(padded))


METRIC_NAMES = {"R@1": "R_at_1", "R@5": "R_at_5", "R@10": "R_at_10", "mrr": "MRR"}


def replay_retrieval_metrics(case):
    given = case.group("input")
    raw = (given["image_raw"], given["text_raw"])
    images, texts = (GallerySide(F.normalize(side, dim=1), torch.arange(len(side))) for side in raw)
    case.tolerance = max(case.tolerance, 1e-7)  # the recalls are stored in float32
    for way, ranks in retrieval_ranks(images, texts, block_size=7).items():
        case.check(f"output.{way}_ranks", ranks)
    metrics = retrieval_metrics(images, texts, resamples=0, block_size=13)
    for way in DIRECTIONS:
        for name in ("R@1", "R@5", "R@10", "mrr", "mean_rank", "median_rank"):
            value = torch.tensor(metrics[f"{way}_{name}"], dtype=torch.float64)
            case.check(f"output.{way}_{METRIC_NAMES.get(name, name)}", value)


KINDS = {
    "late_interaction_maxsim": replay_late_interaction,
    "loss_clip_siglip": replay_loss_clip_siglip,
    "retrieval_metrics": replay_retrieval_metrics,
}
