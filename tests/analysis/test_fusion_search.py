"""The parts of a search that need no training; the command is tested in test_cli_search_fusion.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import build

from vitweave.analysis.bootstrap import resampled_sums
from vitweave.analysis.fusion_candidates import Candidate, search_space
from vitweave.analysis.fusion_search import FusionSearch, SearchOptions, round_plan
from vitweave.analysis.fusion_search_costs import Budget, CostMeter, affordable
from vitweave.analysis.fusion_search_features import KeptFeatures
from vitweave.analysis.fusion_search_reasons import column_shares
from vitweave.analysis.fusion_search_report import pareto_front
from vitweave.analysis.fusion_search_tasks import (
    ClassificationSearch,
    DepthSearch,
    SegmentationSearch,
    overlaps,
    resampled_values,
)
from vitweave.training.metrics import ConfusionMatrix
from vitweave.training.retrieval_metrics import interval

NAMES = ("small", "large")
COSTS = {"small 1": {"milliseconds": 1.0, "mebibytes": 9.0}, "large 1": {"milliseconds": 4.0, "mebibytes": 2.0}}
CANDIDATES = [Candidate((0,), ((1,),), name, {}) for name in NAMES]


def test_every_round_halves_the_candidates_and_doubles_the_steps():
    assert round_plan(9, 640) == [(9, 40), (5, 80), (3, 160), (2, 320)]
    assert round_plan(2, 100) == [(2, 50)] and round_plan(1, 100) == []
    assert round_plan(9, 96) == [(9, 24), (5, 48), (3, 96)] and round_plan(2, 3) == [(2, 3)]
    assert round_plan(4, 100, first_steps=7) == [(4, 7), (2, 14)]


def test_budget():
    assert affordable(CANDIDATES, COSTS, Budget()) == CANDIDATES
    assert affordable(CANDIDATES, COSTS, Budget(ms=1.0)) == CANDIDATES[:1]
    assert affordable(CANDIDATES, COSTS, Budget(mib=8)) == CANDIDATES[1:]
    with pytest.raises(ValueError, match=r"cheapest costs 1 ms \(small 1, allowed 0.5\) per image, 'whole'"):
        affordable(CANDIDATES, COSTS, Budget(ms=0.5, scope="whole"))
    with pytest.raises(ValueError, match=r"1 ms \(small 1, allowed 2\) and 2 mib \(large 1, allowed 8\)"):
        affordable(CANDIDATES, COSTS, Budget(ms=2, mib=8))
    for wrong in ({"ms": 0}, {"mib": float("nan")}, {"scope": "half"}):
        with pytest.raises(ValueError, match="expected"):
            Budget(**wrong)


def test_pareto_front():
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (1, 0.6), (4, 0.9)]
    assert pareto_front(points) == [3, 0]
    assert pareto_front([]) == []


def test_overlaps_give_the_mean_iou_of_all_pixels():
    generator = torch.Generator().manual_seed(0)
    predicted, labels = (torch.randint(0, 4, (5, 6, 7), generator=generator) for _ in range(2))
    labels[labels == 3] = 255  # class 3 is predicted, but never true
    predicted[1:] %= 3
    confusion = ConfusionMatrix(5)
    confusion.update(predicted, labels)
    sums = overlaps(predicted, labels, 5).double()
    task = SegmentationSearch(SimpleNamespace())
    assert sums.shape == (5, 10)
    assert task.value(sums.sum(dim=0)).item() == pytest.approx(confusion.compute()["mean_iou"])


def test_bootstrap_is_paired_and_its_mean_is_that_of_the_seeds():
    task = SegmentationSearch(SimpleNamespace())
    first = overlaps(*(torch.randint(0, 2, (40, 4, 4), generator=torch.Generator().manual_seed(s)) for s in (0, 1)), 2)
    samples = resampled_values(task, [first.double()], 500)
    assert samples.std() > 0
    torch.testing.assert_close(samples, resampled_values(task, [first.double()] * 2, 500))
    assert samples.mean().item() == pytest.approx(task.value(first.double().sum(dim=0)).item(), abs=0.01)


def test_bootstrap_counts_every_image_as_often_as_it_is_drawn():
    values = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picks = torch.randint(7, (50, 7), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resampled_sums(values, 50), values[picks].sum(dim=1))


def test_a_candidate_that_diverged_is_left_out_first(monkeypatch, tmp_path):
    values = {"one": float("nan"), "two": 0.5, "three": 0.4}
    candidates = [Candidate((0,), ((1,),), name, {}) for name in values]
    task = DepthSearch(SimpleNamespace())
    search = FusionSearch(task, candidates, [], tmp_path, SearchOptions())
    monkeypatch.setattr(search, "finished", lambda one, *_: {"value": values[one.fusion]})
    assert search.halve(candidates, [(3, 1), (2, 2)])[0].fusion == "three"
    assert all(map(math.isnan, interval(torch.full((5,), math.nan))))


def test_costs_are_kept_for_the_same_question_only(monkeypatch, tmp_path):
    asked = []

    def costs(meter, missing, rounds):
        asked.append([one.name for one in missing])
        return {one.name: {"milliseconds": 1.0} for one in missing}

    monkeypatch.setattr(CostMeter, "costs", costs)
    images = [{"pixel_values": torch.zeros(3, 32, 32)}]
    tasks = [
        task(KeptFeatures([build(name)], [(images, images)], {}, [], dense=False), **options)
        for name, task, options in (
            ("vit", ClassificationSearch, {"id2label": {0: "a"}}),
            ("vit", ClassificationSearch, {"id2label": {0: "a"}}),
            ("vit", ClassificationSearch, {"id2label": {0: "a", 1: "b"}}),
            ("dinov2", ClassificationSearch, {"id2label": {0: "a"}}),
        )
    ]
    for task in tasks:
        FusionSearch(task, CANDIDATES, [], tmp_path, SearchOptions()).costs(CANDIDATES)
    assert len(asked) == 3 and all(names == ["small 1", "large 1"] for names in asked)


def test_costs_are_measured_where_the_encoders_are():
    encoders = [build("vit").to("meta"), build("dinov2").to("meta")]
    space = search_space([one.config for one in encoders], False, ["last4"], ["concat"], ["add"])
    images = [{"pixel_values": torch.zeros(3, 32, 32)}]
    tower = {"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    features = KeptFeatures(encoders, [(images, images)] * 2, tower, space, dense=False)
    task = ClassificationSearch(features, id2label={0: "a", 1: "b"})
    found = CostMeter(task, "whole").costs(
        space, 1
    )  # behind the encoders the grid is read, which meta tensors have not
    assert all(cost["gigaflops"] > 0 for cost in found.values())
    assert features.sample(0, 1)[0]["cls"].device.type == "meta"


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="label_stride of 1 or more"):
        SegmentationSearch(SimpleNamespace(), 0)
    with pytest.raises(ValueError, match="depth in metres"):
        DepthSearch(SimpleNamespace(), protocol="affine_invariant_disparity")
    with pytest.raises(ValueError, match="first_steps=0"):
        SearchOptions(first_steps=0)


def test_column_shares():
    weight = torch.cat([torch.ones(2, 2), 3 * torch.ones(2, 2)], dim=1)
    torch.testing.assert_close(column_shares(weight, 2), torch.tensor([0.1, 0.9]))
