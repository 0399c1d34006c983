"""An index on disk: what is found, in shards of any size, with tiles, with FAISS, from processes together."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from tiny_retriever import TinyRetriever, tiny_dataset

from vitweave.training.image_index import ImageIndex, build_index, embed_query
from vitweave.training.retrieval_evaluation import embed_dataset
from vitweave.training.retrieval_ranking import best_tile_scores
from vitweave.training.retrieval_records import open_records


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its data, and an index of 11 images in shards of 4."""
    torch.manual_seed(0)
    model, dataset = TinyRetriever(), tiny_dataset(11)
    folder = tmp_path_factory.mktemp("index") / "out"
    build_index(model, dataset.processor, dataset.records, folder, "here", batch_size=3, shard_size=4)
    return model, dataset, folder


def test_what_is_written(made):
    _, _, folder = made
    index = ImageIndex(folder)
    assert len(index) == 11 and index.manifest["model"] == "here" and len(index.manifest["shards"]) == 3
    assert sum(len(pooled) for _, pooled in index.shards()) == 11
    assert index.record(3)["name"] == "figure 3" and index.record(3)["caption"].startswith("(a)")
    with PIL.Image.open(index.record(3)["path"]) as picture:  # a dataset without files leaves previews
        assert picture.size == (64, 32)


@pytest.mark.parametrize("count", [1, 5, 99])
def test_the_nearest_are_those_of_the_whole_matrix(made, count):
    model, dataset, folder = made
    images, _ = embed_dataset(model, dataset)
    query = F.normalize(torch.randn(8), dim=0)
    scores, numbers = ImageIndex(folder).nearest(query, count)
    expected = (images.pooled @ query).topk(min(count, 11))
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(numbers, expected.indices)


def test_sentences_order_the_shortlist(made):
    model, dataset, folder = made
    query, sentences = embed_query(model, dataset.processor, "(a) A red disc. (b) A blue curve.")
    assert sentences.shape == (2, 8)
    images, _ = embed_dataset(model, dataset)
    local = best_tile_scores(images.parts, images.part_mask, sentences[None], torch.ones(1, 2).bool(), 0.05)
    expected = (0.5 * images.pooled @ query + 0.5 * local).sort(descending=True)
    hits = ImageIndex(folder).search(query, sentences, top=11)
    assert [hit.number for hit in hits] == expected.indices.tolist()
    torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), expected.values, atol=1e-3, rtol=0)
    plain = ImageIndex(folder).search(query, sentences, top=3, alpha=1.0)
    assert [hit.number for hit in plain] == [hit.number for hit in ImageIndex(folder).search(query, None, top=3)]
    assert [hit.number for hit in plain] != [hit.number for hit in hits[:3]]


@pytest.mark.skipif(find_spec("faiss") is None, reason="needs faiss")
def test_faiss_finds_the_same(made):
    _, _, folder = made
    query = F.normalize(torch.randn(8), dim=0)
    for _ in range(2):  # built, then read
        scores, numbers = ImageIndex(folder).nearest(query, 5, "faiss")
        expected = ImageIndex(folder).nearest(query, 5)
        torch.testing.assert_close(scores, expected[0])
        assert torch.equal(numbers, expected[1])
    assert (folder / "pooled.faiss").is_file()


@pytest.mark.skipif(find_spec("faiss") is not None, reason="faiss is installed")
def test_without_faiss_the_extra_is_named(made):
    with pytest.raises(ImportError, match=r"vitweave\[faiss\]"):
        ImageIndex(made[2]).nearest(torch.ones(8), 5, "faiss")


def test_files_are_named_by_their_path(tmp_path):
    for index in range(2):
        PIL.Image.new("RGB", (20, 10), (index, 0, 0)).save(tmp_path / f"{index}.png")
    model, dataset = TinyRetriever(alignment=False), tiny_dataset(2)
    build_index(model, dataset.processor, open_records(tmp_path), tmp_path / "out")
    index = ImageIndex(tmp_path / "out")
    assert index.ranking is None and index.record(1)["path"] == str((tmp_path / "1.png").resolve())
    assert not (tmp_path / "out" / "previews").exists()


def test_bad_states_are_named(made, tmp_path):
    model, dataset, folder = made
    with pytest.raises(FileExistsError, match="already holds an index"):
        build_index(model, dataset.processor, dataset.records, folder)
    with pytest.raises(FileNotFoundError, match=r"index\.json of a finished index"):
        ImageIndex(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"shards": ["shard-0"], "images": 1, "shard_size": 1}))
    with pytest.raises(FileNotFoundError, match=r"1 shards of .* are missing"):
        ImageIndex(tmp_path)
    with pytest.raises(ValueError, match="unknown backend"):
        ImageIndex(folder).nearest(torch.ones(8), 1, "annoy")
    with pytest.raises(ValueError, match="top of 1 or more"):
        ImageIndex(folder).search(torch.ones(8), top=0)


TOGETHER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tiny_retriever import TinyRetriever, tiny_dataset
from vitweave.training.image_index import build_index
dataset = tiny_dataset(11)
build_index(TinyRetriever(), dataset.processor, dataset.records, sys.argv[2], "here", batch_size=3, shard_size=4)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(made, tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    root = Path(__file__).parents[2]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command = [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run(
        [*command, str(script), str(root / "tests"), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    for name in ImageIndex(made[2]).manifest["shards"] + ["index.json", "records.jsonl"]:
        assert (tmp_path / "out" / name).read_bytes() == (made[2] / name).read_bytes(), name
