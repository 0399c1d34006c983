"""An index of image embeddings on disk, in shards, and the nearest images to a text."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitweave.training.retrieval_evaluation import embed_all, image_embeddings, text_embeddings
from vitweave.training.retrieval_ranking import CombinedRanking, blocks
from vitweave.training.retrieval_records import name_of

MANIFEST, RECORDS, PREVIEWS, FAISS = "index.json", "records.jsonl", "previews", "pooled.faiss"
PREVIEW_SIZE = 384  # pixels of the longer side
KEPT_FIELDS = ("caption", "description")  # what a hit shows beside its name
BACKENDS = ("torch", "faiss")


class ImagesToIndex(Dataset):
    """Images of records through an image processor."""

    def __init__(self, records: Sequence[Mapping], numbers: Sequence[int], image_processor, image_column: str):
        self.records, self.numbers = records, numbers
        self.image_processor, self.image_column = image_processor, image_column

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        number = int(self.numbers[position])
        record = self.records[number]
        try:
            encoded = self.image_processor(record[self.image_column], return_tensors="pt")
        except ValueError as error:
            raise ValueError(f"{name_of(record, number)}: {error}") from error
        return {name: values[0] for name, values in encoded.items()}


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """(batch, ...) of every field."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def shard_name(number: int, count: int) -> str:
    """The file of one shard."""
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def build_index(
    model: nn.Module,
    processor,
    records: Sequence[Mapping],
    folder: str | Path,
    source: str = "",
    batch_size: int = 32,
    shard_size: int = 4096,
    num_workers: int = 0,
    image_column: str = "image",
) -> Path:
    """Write the embeddings of all images, tiles too if the model aligns them, as safetensors shards and a manifest.

    Under `accelerate launch` the processes share the shards; what is written does not depend on how many there are.

    Args:
        source: what the manifest names as the model, so that a search can load it again.
        shard_size: images per shard; one shard is in memory at a time.
    """
    state, folder = PartialState(), Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} already holds an index; choose another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    image_processor = getattr(processor, "image_processor", processor)
    shards = list(blocks(len(records), shard_size))
    for number in range(state.process_index, len(shards), state.num_processes):
        rows = range(shards[number].start, shards[number].stop)
        images = ImagesToIndex(records, rows, image_processor, image_column)
        pooled, tiles, mask = embed_all(model, images, stacked, image_embeddings, batch_size, num_workers)
        tensors = {"pooled": pooled}
        if tiles is not None:
            tensors |= {
                "tiles": tiles.half(),
                "tile_mask": mask,
            }  # the tiles are most of it, and only order a shortlist
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / shard_name(number, len(shards))
        )
    state.wait_for_everyone()
    if state.is_main_process:
        write_records(records, folder, image_column)
        names = [shard_name(number, len(shards)) for number in range(len(shards))]
        manifest = {"model": str(source), "images": len(records), "shard_size": shard_size, "shards": names}
        if getattr(model, "alignment", None) is not None:
            config = model.config
            manifest["ranking"] = asdict(CombinedRanking(config.ranking_alpha, config.local_temperature))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")  # last: it is complete
    state.wait_for_everyone()
    return folder


def write_records(records: Sequence[Mapping], folder: Path, image_column: str) -> None:
    """One line per image: its name, where its file is (or a preview, for images that have none), its texts."""
    with (folder / RECORDS).open("w", encoding="utf-8") as lines:
        for number in range(len(records)):
            record = records.fields(number) if hasattr(records, "fields") else records[number]
            kept = {name: record[name] for name in KEPT_FIELDS if isinstance(record.get(name), str)}
            path = record.get("path")
            if path is None:
                (folder / PREVIEWS).mkdir(exist_ok=True)
                path = f"{PREVIEWS}/{number}.jpg"
                picture = records[number][image_column].convert("RGB")
                picture.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
                picture.save(folder / path, quality=90)
            else:
                path = str(Path(path).resolve())
            lines.write(json.dumps({"name": name_of(record, number), "path": path, **kept}, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Hit:
    """One image found: its place in the index, its score, and its line in `records.jsonl`."""

    number: int
    score: float
    record: dict


class ImageIndex:
    """An index that `build_index` wrote.

    The shards are read one at a time, so that memory does not grow with their number.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"expected {MANIFEST} of a finished index in {folder}, found none; run vitweave index"
            )
        self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        lost = [name for name in self.manifest["shards"] if not (self.folder / name).is_file()]
        if lost:
            raise FileNotFoundError(
                f"{len(lost)} shards of {folder} are missing, the first is {lost[0]}; build it again"
            )

    def __len__(self) -> int:
        return self.manifest["images"]

    @property
    def ranking(self) -> CombinedRanking | None:
        """How tiles and sentences order a shortlist; None for an index without tiles."""
        found = self.manifest.get("ranking")
        return None if found is None else CombinedRanking(**found)

    def shards(self, name: str = "pooled") -> Iterator[tuple[int, Tensor]]:
        """The number of the first image of every shard, and one of its tensors."""
        for position, shard in enumerate(self.manifest["shards"]):
            with safe_open(self.folder / shard, framework="pt") as tensors:
                yield position * self.manifest["shard_size"], tensors.get_tensor(name)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """One tensor of some images, without reading whole shards."""
        found = []
        for number in numbers:
            shard, row = divmod(int(number), self.manifest["shard_size"])
            with safe_open(self.folder / self.manifest["shards"][shard], framework="pt") as tensors:
                found.append(tensors.get_slice(name)[row : row + 1])
        return torch.cat(found)

    def record(self, number: int) -> dict:
        """The line of one image, its path absolute."""
        if not hasattr(self, "_records"):
            lines = (self.folder / RECORDS).read_text(encoding="utf-8").splitlines()
            self._records = [json.loads(line) for line in lines]
        record = self._records[number]
        return {**record, "path": str(self.folder / record["path"])}

    def nearest(self, query: Tensor, count: int, backend: str = "torch") -> tuple[Tensor, Tensor]:
        """Cosines and numbers (count,) of the images nearest to a unit vector (hidden,)."""
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; known: {list(BACKENDS)}")
        count = min(count, len(self))
        if backend == "faiss":
            return self._nearest_with_faiss(query, count)
        scores, numbers = torch.empty(0), torch.empty(0, dtype=torch.int64)
        for start, pooled in self.shards():
            here = torch.arange(start, start + len(pooled))
            scores, numbers = torch.cat([scores, pooled @ query.float().cpu()]), torch.cat([numbers, here])
            scores, kept = scores.topk(min(count, len(scores)))
            numbers = numbers[kept]
        return scores, numbers

    def _nearest_with_faiss(self, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The same from `datasets`' FAISS index, which is built and saved when it is first asked for."""
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                "the faiss backend needs faiss: pip install vitweave[faiss], or use the torch one"
            ) from error
        from datasets import Dataset as Table

        table, path = Table.from_dict({"number": range(len(self))}), self.folder / FAISS
        if path.is_file():
            table.load_faiss_index("pooled", str(path))
        else:
            vectors = torch.cat([pooled for _, pooled in self.shards()]).numpy()
            table.add_faiss_index_from_external_arrays(vectors, "pooled", metric_type=faiss.METRIC_INNER_PRODUCT)
            table.save_faiss_index("pooled", str(path))
        found = table.get_index("pooled").search(query.float().cpu().numpy(), count)
        return torch.as_tensor(found.scores), torch.as_tensor(found.indices)

    def search(
        self,
        query: Tensor,
        sentences: Tensor | None = None,
        top: int = 10,
        backend: str = "torch",
        alpha: float | None = None,
    ) -> list[Hit]:
        """The `top` images for a text, best first.

        Args:
            query: (hidden,), the unit vector of the text.
            sentences: (sentences, hidden), unit vectors of its sentences; with tiles in the index they order a
                shortlist of 100 (or `top`, if that is more).
            alpha: weight of the cosine in that order; None takes the model's.
        """
        if top < 1:
            raise ValueError(f"expected top of 1 or more, got {top}")
        ranking = self.ranking if sentences is not None and len(sentences) else None
        if ranking is None:
            scores, numbers = self.nearest(query, top, backend)
        else:
            ranking = CombinedRanking(ranking.alpha if alpha is None else alpha, ranking.temperature, ranking.shortlist)
            cosines, numbers = self.nearest(query, max(top, ranking.shortlist), backend)
            tiles, mask = self.rows("tiles", numbers.tolist()).float(), self.rows("tile_mask", numbers.tolist())
            sentences = sentences.float().cpu()[None]
            valid = torch.ones(sentences.shape[:2], dtype=torch.bool)
            scores, order = ranking.scores(cosines, tiles, mask, sentences, valid).sort(descending=True, stable=True)
            scores, numbers = scores[:top], numbers[order][:top]
        pairs = zip(numbers.tolist(), scores.tolist(), strict=True)
        return [Hit(number, score, self.record(number)) for number, score in pairs]


@torch.no_grad()
def embed_query(model: nn.Module, processor, text: str) -> tuple[Tensor, Tensor | None]:
    """The unit vector (hidden,) of a text and those of its sentences (sentences, hidden), if the model has them."""
    encoded = processor(text=[text], truncation=True, return_tensors="pt").to(next(model.parameters()).device)
    pooled, sentences, mask = text_embeddings(model.eval(), encoded)
    return pooled[0].cpu(), None if sentences is None else sentences[0][mask[0]].cpu()
