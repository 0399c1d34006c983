"""The figures that ship: small, whole, attributed, with their splits kept apart."""

from pathlib import Path

import PIL.Image

from vitweave.training.retrieval_records import RetrievalRecords, open_records

FOLDER = Path(__file__).parents[2] / "examples" / "data" / "figures"
LICENCES = {"CC-BY-4.0", "MIT"}


def test_every_record_is_attributed_and_has_its_image():
    records = open_records(FOLDER)
    assert isinstance(records, RetrievalRecords) and len(records) == 481
    for record in records.records:
        assert record["license"] in LICENCES and all(
            record[name] for name in ("attribution", "source", "source_commit")
        )
        assert record["caption"] and record["sentences"]
    files = {f"images/{path.name}" for path in (FOLDER / "images").iterdir()}
    assert files == {record["image"] for record in records.records}
    for index in range(0, len(records), 25):
        picture = records[index]["image"]
        assert max(picture.size) <= 304 and isinstance(picture, PIL.Image.Image)


def test_the_readme_counts_what_is_there():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    records = open_records(FOLDER).records
    for source in {record["source"] for record in records}:
        assert f"| {sum(record['source'] == source for record in records)} | `{source}`" in readme
    sizes = {split: len(open_records(FOLDER, split)) for split in ("train", "validation", "test")}
    assert (
        f"{len(records)} figures ({sizes['train']} train, {sizes['validation']} validation, {sizes['test']} test"
        in readme
    )


def test_no_caption_is_in_two_splits_and_all_of_it_is_small():
    seen = {}
    for record in open_records(FOLDER).records:
        assert seen.setdefault(record["caption"], record["split"]) == record["split"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5_000_000
