"""TokenFusion: thresholds, partitions, penalties, absent sensors."""

from collections import Counter

import pytest
import torch
from modality_fusion_checks import (
    check_absent_sensors,
    check_bfloat16,
    check_compiles,
    check_exports,
    check_images_do_not_see_each_other,
    hosted,
    moved,
    random_streams,
)
from model_checks import check_saved_and_loaded_equal

from vitweave.modeling.modality_fusion.base import BlockInputs
from vitweave.modeling.modality_fusion.registry import build_modality_fusion
from vitweave.modeling.modality_fusion.token_exchange import TILE, TokenExchangeFusion

HIDDEN = 32
every_count = pytest.mark.parametrize("modalities", [2, 3, 4])


def trained(modalities: int, **options) -> TokenExchangeFusion:
    """Scores on both sides of a threshold in the middle."""
    torch.manual_seed(0)
    options = {"threshold": 0.5, "start_score": 0.5} | options
    fusion = moved(TokenExchangeFusion(modalities, HIDDEN, **options))
    with torch.no_grad():
        keep, replace = fusion.score_net.logits(random_streams(modalities)[1].residual).unbind(dim=-1)
        fusion.score_net.fc4.bias[:, 0] -= (keep - replace).flatten(1).median(dim=1).values
    return fusion


def lenders(fusion: TokenExchangeFusion, grid: tuple[int, int]) -> torch.Tensor:
    """(modalities, height, width)."""
    return fusion.lenders(grid, None)[:, 0].unflatten(1, grid)


@every_count
def test_the_exchange_is_the_formula_token_by_token(modalities):
    fusion = trained(modalities)
    streams, inputs = random_streams(modalities)
    fused, _ = fusion(streams, inputs)
    scores = fusion.score_net(inputs.residual)
    source = lenders(fusion, inputs.grid).flatten(1) if modalities > 2 else torch.tensor([[1], [0]]).expand(2, 24)
    for m, b, token in torch.cartesian_prod(*map(torch.arange, streams.shape[:3])).tolist():
        lender = m if scores[m, b, token] >= 0.5 else source[m, token]
        assert torch.equal(fused[m, b, token], streams[lender, b, token] * scores[lender, b, token])
    replaced = (scores < 0.5).float().mean(dim=(1, 2))
    assert replaced.min() > 0.1 and replaced.max() < 0.9
    torch.testing.assert_close(fusion.last_exchange_ratio, replaced)
    assert not fusion.last_exchange_ratio.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_score_equal_to_the_threshold_keeps_its_token(dtype):
    at = torch.tensor(0.02)
    scores = torch.stack([at, torch.nextafter(at, torch.tensor(0.0)), torch.nextafter(at, torch.tensor(1.0))])
    scores = torch.stack([scores, torch.full((3,), 0.9)])[:, None].to(torch.promote_types(dtype, torch.float32))
    streams = random_streams(grid=(1, 3), batch=1, dtype=dtype)[0]
    exchanged = TokenExchangeFusion(2, HIDDEN, scaled=False).exchange(streams, scores, (1, 3))
    assert torch.equal(exchanged[0, 0, [0, 2]], streams[0, 0, [0, 2]])
    assert torch.equal(exchanged[0, 0, 1], streams[1, 0, 1])
    assert torch.equal(exchanged[1], streams[1])


@every_count
def test_no_exchange_above_the_threshold_and_all_below_it(modalities):
    streams, inputs = random_streams(modalities)
    kept = trained(modalities, threshold=0.0)
    scores = kept.score_net(inputs.residual)
    assert torch.equal(kept(streams, inputs)[0], streams * scores[..., None]) and not kept.last_exchange_ratio.any()
    given = trained(modalities, threshold=1.1, scaled=False)
    fused = given(streams, inputs)[0]
    assert torch.equal(given.last_exchange_ratio, torch.ones(modalities))
    if modalities == 2:
        assert torch.equal(fused, streams.flip(0))
    for m in range(modalities):
        origins = [(fused[m] == streams[o]).all(dim=2).all(dim=0) for o in range(modalities)]
        assert not origins[m].any() and sum(o.int() for o in origins).eq(1).all()


@every_count
def test_the_penalty_is_the_sum_of_all_scores(modalities):
    fusion = trained(modalities)
    streams, inputs = random_streams(modalities, prefix=2)
    penalty = fusion(streams, inputs)[1]
    torch.testing.assert_close(penalty, fusion.score_net(inputs.residual[:, :, 2:]).sum())
    penalty, parts = check_images_do_not_see_each_other(trained(modalities), with_present=False)
    torch.testing.assert_close(penalty, sum(parts))
    inputs.present = torch.ones(modalities, 3, dtype=torch.bool)
    inputs.present[0, 0] = False
    expected = fusion.score_net(inputs.residual[:, :, 2:])
    expected[0, 0] = 0
    if modalities == 2:
        expected[1, 0] = 0  # without company
    torch.testing.assert_close(fusion(streams, inputs)[1], expected.sum())


def test_scores_learn_from_tokens_that_stay_or_are_borrowed():
    streams = random_streams(batch=1, grid=(1, 4))[0]
    scores = torch.tensor([[0.9, 0.001, 0.9, 0.001], [0.9, 0.9, 0.001, 0.001]])[:, None].requires_grad_()
    exchanged = TokenExchangeFusion(2, HIDDEN).exchange(streams, scores, (1, 4))
    exchanged.square().sum().backward()
    assert (scores.grad[:, 0] != 0).tolist() == [[True, False, True, True], [True, True, False, True]]
    exchanged = TokenExchangeFusion(2, HIDDEN, scaled=False).exchange(streams, scores, (1, 4))
    assert not exchanged.requires_grad


@pytest.mark.parametrize("options", [{}, {"threshold": 0.02}, {"start_score": 0.99}])
def test_every_parameter_gets_a_gradient(options):
    fusion = trained(3, **options)
    streams, inputs = random_streams(3)
    fused, penalty = fusion(streams.requires_grad_(), inputs)
    (fused.square().sum() + 0.01 * penalty).backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert streams.grad.any()


@every_count
def test_absent_sensors_lend_nothing(modalities):
    check_absent_sensors(trained(modalities))
    check_absent_sensors(trained(modalities), prefix=1)
    check_absent_sensors(trained(modalities, threshold=1.1))


@pytest.mark.parametrize("modalities", [3, 4])
def test_another_present_sensor_stands_in_for_an_absent_lender(modalities):
    fusion = trained(modalities)
    whole, grid = lenders(fusion, (12, 12)), (12, 12)
    present = torch.ones(modalities, 2, dtype=torch.bool)
    present[2, 1] = False
    found = fusion.lenders(grid, present).unflatten(2, grid)
    assert torch.equal(found[:, 0], whole)
    assert torch.equal(found[:, 1][whole != 2], whole[whole != 2])
    for m in range(modalities):
        assert not (found[m, 1] == m).any() and (m == 2 or not (found[m, 1] == 2).any())


def test_a_lone_stream_is_scaled_on_request():
    streams, inputs = random_streams()
    inputs.present = torch.tensor([[True] * 3, [False, True, True]])
    fusion = trained(2, scale_alone=True)
    fused, penalty = fusion(streams, inputs)
    scores = fusion.score_net(inputs.residual)
    torch.testing.assert_close(fused[0, 0], streams[0, 0] * scores[0, 0, :, None])
    torch.testing.assert_close(penalty, scores[inputs.present].sum())


@pytest.mark.parametrize("modalities", [3, 4])
def test_the_partition_is_equal_and_keeps_its_rule_at_every_resolution(modalities):
    fusion = trained(modalities)
    large = lenders(fusion, (40, 30))
    assert torch.equal(lenders(fusion, (7, 9)), large[:, :7, :9])
    assert torch.equal(large[:, TILE : 2 * TILE, :TILE], large[:, :TILE, :TILE])
    for m, tile in enumerate(large[:, :TILE, :TILE]):
        counts = Counter(tile.flatten().tolist())
        assert m not in counts and set(counts.values()) == {TILE * TILE // (modalities - 1)}
    assert torch.equal(lenders(trained(modalities), (12, 12)), large[:, :12, :12])
    assert not torch.equal(lenders(trained(modalities, seed=1), (12, 12)), large[:, :12, :12])


def test_a_given_partition_is_used_and_checked():
    partition = [[[1, 2]], [[2, 0]], [[0, 1]]]
    assert lenders(trained(3, partition=partition), (2, 3))[0].tolist() == [[1, 2, 1]] * 2
    with pytest.raises(ValueError, match=r"modality 1 to be replaced by \[0, 2\], got \[0, 1\]"):
        trained(3, partition=[[[1, 2]], [[1, 0]], [[0, 1]]])
    with pytest.raises(ValueError, match="3 tiles of one size"):
        trained(3, partition=[[[1, 2]], [[2]], [[0, 1]]])


def test_class_tokens_pass():
    streams, inputs = random_streams(prefix=3)
    fused, _ = trained(2)(streams, inputs)
    assert torch.equal(fused[:, :, :3], streams[:, :, :3])
    bare = BlockInputs(inputs.residual[:, :, 3:], inputs.grid)
    assert torch.equal(fused[:, :, 3:], trained(2)(streams[:, :, 3:], bare)[0])


def test_starts_near_the_identity_or_as_released():
    streams, inputs = random_streams()
    fused, _ = TokenExchangeFusion(2, HIDDEN)(streams, inputs)
    torch.testing.assert_close(fused, streams, rtol=0.02, atol=0)
    half, _ = TokenExchangeFusion(2, HIDDEN, start_score=0.5)(streams, inputs)
    torch.testing.assert_close(half, streams / 2, rtol=0.02, atol=0)


@every_count
def test_start_values_and_partition_survive_a_model_around_them(modalities, tmp_path):
    host = hosted("token_exchange", modalities, start_score=0.9, seed=4)
    torch.testing.assert_close((host.fusion.score_net.fc4.bias[:, 0] * 2).sigmoid(), torch.full((modalities,), 0.9))
    assert host.fusion.score_net.fc1.weight.std() > 0.01
    loaded = check_saved_and_loaded_equal(host, tmp_path)
    assert not any("groups" in name for name in host.state_dict())
    streams, inputs = random_streams(modalities)
    assert torch.equal(loaded.fusion(streams, inputs)[0], host.fusion(streams, inputs)[0])


@every_count
def test_images_do_not_see_each_other_and_bfloat16_comes_close(modalities):
    check_images_do_not_see_each_other(trained(modalities))
    check_bfloat16(trained(modalities, threshold=0.02))  # scores beside 0.5 may change sides


@pytest.mark.parametrize("modalities", [2, 3])
def test_compiles_to_one_graph(modalities):
    check_compiles(trained(modalities))


@pytest.mark.slow
@every_count
def test_exports_with_any_batch_size(modalities):
    check_exports(trained(modalities))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="start_score between 0 and 1, got 1"):
        TokenExchangeFusion(2, HIDDEN, start_score=1)
    with pytest.raises(ValueError, match="hidden_size of 4 or more, got 3"):
        TokenExchangeFusion(2, 3)
    with pytest.raises(ValueError, match="has no option 'treshold'"):
        build_modality_fusion("token_exchange", 2, HIDDEN, {"treshold": 0.1})
