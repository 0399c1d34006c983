import pytest
import torch
import torch.nn.functional as F

from vitweave.modeling.contrastive_losses import (
    CONTRASTIVE_LOSSES,
    filip,
    hardest_negative_loss,
    info_nce,
    late_interaction,
    pair_targets,
    siglip,
)

EQUAL = torch.tensor([0, 1, 0, 2])  # samples 0 and 2 have one caption


def logits(rows: int = 4, columns: int | None = None) -> torch.Tensor:
    return 3 * torch.randn(rows, columns or rows, dtype=torch.float64)


def tokens(batch: int, count: int) -> torch.Tensor:
    return F.normalize(torch.randn(batch, count, 6, dtype=torch.float64), dim=-1)


def test_info_nce_is_the_mean_of_two_cross_entropies():
    given, target = logits(), torch.arange(4)
    expected = (F.cross_entropy(given, target) + F.cross_entropy(given.T, target)) / 2
    torch.testing.assert_close(info_nce(given), expected)


def test_siglip_sums_over_pairs_and_divides_by_images():
    given = logits()
    signs = 2 * torch.eye(4, dtype=torch.float64) - 1
    torch.testing.assert_close(siglip(given), -F.logsigmoid(signs * given).sum() / 4)


@pytest.mark.parametrize("name", CONTRASTIVE_LOSSES)
def test_a_pair_with_an_equal_caption_is_no_negative(name):
    given = logits().requires_grad_()
    CONTRASTIVE_LOSSES[name](given, *pair_targets(EQUAL)).backward()
    assert given.grad[0, 2] == given.grad[2, 0] == 0
    assert (given.grad[~torch.eye(4, dtype=torch.bool)] > 0).sum() == 10  # all other negatives push apart


@pytest.mark.parametrize("name", CONTRASTIVE_LOSSES)
def test_an_equal_caption_may_count_as_positive(name):
    given = logits().requires_grad_()
    CONTRASTIVE_LOSSES[name](given, *pair_targets(EQUAL, "positives")).backward()
    low = torch.full((4, 4), -20.0, dtype=torch.float64)
    low[EQUAL[:, None] == EQUAL] = 20.0
    found = CONTRASTIVE_LOSSES[name](low, *pair_targets(EQUAL, "positives"))
    expected = {"infonce": torch.tensor(2.0).log() / 2, "siglip": torch.tensor(0.0)}[name]  # two of four rows share
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-5, rtol=0)


def test_several_positives_are_a_uniform_target():
    given = logits()
    positive, ignored = pair_targets(EQUAL, "positives")
    target = positive.double() / positive.sum(1, keepdim=True)
    expected = (F.cross_entropy(given, target) + F.cross_entropy(given.T, target)) / 2
    torch.testing.assert_close(info_nce(given, positive, ignored), expected)


@pytest.mark.parametrize("name", CONTRASTIVE_LOSSES)
def test_samples_that_take_no_part_change_nothing(name):
    given = logits()
    keep = torch.tensor([True, True, False, True])  # text 2 takes no part, and so image 2 has no positive
    positive = torch.eye(4, dtype=torch.bool) & keep
    found = CONTRASTIVE_LOSSES[name](given, positive, ~keep.expand(4, 4))
    if name == "siglip":
        rows = F.softplus(torch.where(positive, -given, given))[:, keep].sum() / 3
    else:
        over_texts = F.cross_entropy(given[keep][:, keep], torch.arange(3))
        over_images = F.cross_entropy(given[:, keep].T, torch.tensor([0, 1, 3]))
        rows = (over_texts + over_images) / 2
    torch.testing.assert_close(found, rows)
    nothing = given.clone().requires_grad_()
    loss = CONTRASTIVE_LOSSES[name](nothing, torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and not nothing.grad.any()


def test_unpaired_similarities_are_refused():
    with pytest.raises(ValueError, match="as many images as texts"):
        info_nce(logits(3, 4))


def test_half_precision_is_computed_in_float32():
    given = logits().bfloat16()
    torch.testing.assert_close(info_nce(given), info_nce(given.float()))
    assert siglip(given).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_late_interaction_leaves_padding_out(temperature):
    queries, documents = tokens(3, 4), tokens(2, 5)
    found = late_interaction(queries[:, :2], documents[:, :3], temperature=temperature)
    query_mask = torch.arange(4).expand(3, 4) < 2
    document_mask = torch.arange(5).expand(2, 5) < 3
    torch.testing.assert_close(late_interaction(queries, documents, query_mask, document_mask, temperature), found)
    mean = late_interaction(queries, documents, query_mask, document_mask, temperature, reduction="mean")
    torch.testing.assert_close(mean, found / 2)


def test_the_soft_maximum_goes_over_into_the_hard_one():
    queries, documents = tokens(3, 4), tokens(2, 5)
    hard = late_interaction(queries, documents)
    torch.testing.assert_close(late_interaction(queries, documents, temperature=1e-5), hard, atol=1e-4, rtol=0)
    soft = late_interaction(queries[:, :1], documents, temperature=0.05)
    similarity = torch.einsum("qh,dnh->qdn", queries[:, 0], documents)
    torch.testing.assert_close(soft, 0.05 * (similarity / 0.05).logsumexp(-1))


def test_queries_and_documents_without_tokens_score_zero_and_get_no_gradient():
    queries, documents = tokens(2, 3).requires_grad_(), tokens(2, 3).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for temperature in (0.0, 0.05):
        scores = late_interaction(queries, documents, mask, mask, temperature, reduction="mean")
        assert (scores[1] == 0).all() and (scores[:, 1] == 0).all() and scores[0, 0] != 0
        gradients = torch.autograd.grad(scores.sum(), (queries, documents))
        assert all(gradient.isfinite().all() and not gradient[1].any() for gradient in gradients)


def test_filip_compares_each_direction_by_its_own_tokens():
    images, texts = tokens(3, 5), tokens(3, 4)
    image_mask, text_mask = torch.rand(3, 5) > 0.3, torch.rand(3, 4) > 0.3
    image_mask[:, 0] = text_mask[:, 0] = True
    similarity = torch.einsum("irh,jkh->ijrk", images, texts)
    of_images, of_texts = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    for i in range(3):
        for j in range(3):
            valid = similarity[i, j][image_mask[i]][:, text_mask[j]]
            of_images[i, j], of_texts[j, i] = valid.amax(1).mean(), valid.amax(0).mean()
    target = torch.arange(3)
    expected = (F.cross_entropy(10 * of_images, target) + F.cross_entropy(10 * of_texts, target)) / 2
    torch.testing.assert_close(filip(images, texts, 10.0, image_mask, text_mask), expected)


def test_the_hardest_negative_is_another_document():
    scores = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 4.0], [1.0, 1.0, 1.0]])
    expected = F.softplus(torch.tensor([-3.0, 1.0, 0.0])).mean()
    torch.testing.assert_close(hardest_negative_loss(scores), expected)
