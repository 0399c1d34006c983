"""Where sentences point: the mosaic test, whose right answers need no annotation (chance is 1 in 4).

Four figures of different records stand in a 2 x 2 grid; the best tile of every sentence must lie in the quadrant of its
own figure.
"""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from vitweave.processing.figure_steps import as_pair, covered_patches, figure_box
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.training.retrieval_data import RetrievalCollator, RetrievalDataset
from vitweave.training.retrieval_evaluation import record_groups

QUADRANTS = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column, in the order of a mosaic's records


def mosaic_records(dataset: RetrievalDataset, rounds: int = 1, seed: int = 0) -> list[tuple[int, ...]]:
    """Which four records stand in each mosaic: every round deals all records once, but for a rest of less than four.

    Records that share a text or an image file never meet.
    """
    groups = record_groups(dataset).tolist()
    if len(set(groups)) < len(QUADRANTS):
        raise ValueError(f"expected at least 4 records with different texts for a mosaic, got {len(set(groups))}")
    generator = torch.Generator().manual_seed(seed)
    mosaics = []
    for _ in range(rounds):
        waiting = torch.randperm(len(dataset), generator=generator).tolist()
        while len({groups[index] for index in waiting}) >= len(QUADRANTS):
            chosen: dict[int, int] = {}
            for index in waiting:
                if len(chosen) < len(QUADRANTS):
                    chosen.setdefault(groups[index], index)
            mosaics.append(tuple(chosen.values()))
            waiting = [index for index in waiting if index not in mosaics[-1]]
    return mosaics


def draw_mosaic(pictures: list, image_processor) -> tuple[PIL.Image.Image, np.ndarray]:
    """Four pictures in a 2 x 2 grid, each whole in its quadrant, as large as the processor's canvas.

    Returns:
        the mosaic, and which patches the pictures cover: (patches,) bool.
    """
    size = (image_processor.size.height, image_processor.size.width)
    cell = (size[0] // 2, size[1] // 2)
    colour = image_processor.pad_color
    colour = (colour,) * 3 if isinstance(colour, int) else tuple(colour)
    canvas, covered = PIL.Image.new("RGB", (size[1], size[0]), colour), False
    for picture, (row, column) in zip(pictures, QUADRANTS, strict=True):
        picture = picture_to_rgb(picture)
        top, left, height, width = figure_box((picture.height, picture.width), cell)
        top, left = top + row * cell[0], left + column * cell[1]
        canvas.paste(picture.resize((width, height), PIL.Image.Resampling.BICUBIC), (left, top))
        covered |= covered_patches((top, left, height, width), size, as_pair(image_processor.patch_size))
    return canvas, covered


def quadrant_of_tiles(boxes: Tensor) -> Tensor:
    """The quadrant every tile lies in as a whole (tiles,), -1 for one that reaches into several.

    Args:
        boxes: (tiles, 4), top, left, bottom and right edge as shares of height and width.
    """
    top, left, bottom, right = boxes.unbind(dim=1)
    above, below = bottom <= 0.5 + 1e-6, top >= 0.5 - 1e-6
    west, east = right <= 0.5 + 1e-6, left >= 0.5 - 1e-6
    inside = (above | below) & (west | east)
    return torch.where(inside, 2 * below.long() + east.long(), -1)


@dataclass
class Pointing:
    """What became of the sentences of some mosaics; all (sentences,).

    Args:
        hit: the best tile lies in the right quadrant.
        chance: the share of tiles that do.
        entropy: of the soft maximum over tiles, as a share of that of all tiles alike.
        mosaic: which mosaic a sentence belongs to.
    """

    hit: Tensor
    chance: Tensor
    entropy: Tensor
    mosaic: Tensor


def point(cosines: Tensor, valid: Tensor, quadrants: Tensor, own: int, temperature: float) -> tuple[Tensor, ...]:
    """Hit, chance and entropy of the sentences (sentences,) of one figure in a mosaic.

    Args:
        cosines: (sentences, tiles); valid: (tiles,) tiles that show something; quadrants: (tiles,), -1 takes no part.
        own: the figure's quadrant.
    """
    counted = valid & (quadrants >= 0)
    cosines = cosines[:, counted].double()
    hit = quadrants[counted][cosines.argmax(dim=1)] == own
    chance = (quadrants[counted] == own).double().mean().expand(len(cosines))
    weights = (cosines / max(temperature, 1e-6)).softmax(dim=1)
    entropy = torch.special.entr(weights).sum(dim=1) / np.log(max(2, int(counted.sum())))
    return hit, chance, entropy


@torch.no_grad()
def run_pointing(model: nn.Module, dataset: RetrievalDataset, mosaics: list, batch_size: int) -> Pointing:
    """Point at mosaics with every sentence of their records' first texts."""
    device = next(model.parameters()).device
    quadrants = quadrant_of_tiles(model.alignment.tile_boxes()).to(device)
    if set(quadrants.tolist()) <= {-1}:
        raise ValueError("no tile lies within one quadrant of a mosaic; use tile_levels of 2, 4, 6, ...")
    collate, processor = RetrievalCollator(dataset.processor.tokenizer), dataset.processor.image_processor
    temperature, rows, numbers = model.config.local_temperature, [], []
    for start in range(0, len(mosaics), batch_size):
        batch = mosaics[start : start + batch_size]
        drawn = [draw_mosaic([dataset.picture(index) for index in indices], processor) for indices in batch]
        pixels = processor([picture for picture, _ in drawn], return_tensors="pt")["pixel_values"].to(device)
        covered = torch.from_numpy(np.stack([mask for _, mask in drawn])).to(device)
        tiles, tile_mask = model.get_tile_features(pixels, covered)
        texts = [dataset.encode_text(dataset.texts(index)[0], index) for indices in batch for index in indices]
        texts = {name: value.to(device) for name, value in collate(texts).items()}
        sentences, mask = model.get_sentence_features(
            texts["input_ids"], texts["attention_mask"], sentence_ids=texts["sentence_ids"]
        )
        for number in range(len(batch) * len(QUADRANTS)):
            which, own = divmod(number, len(QUADRANTS))
            cosines = sentences[number][mask[number]] @ tiles[which].T
            rows.append(point(cosines, tile_mask[which], quadrants, own, temperature))
            numbers += [start + which] * len(cosines)
    hit, chance, entropy = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    return Pointing(hit, chance, entropy, torch.tensor(numbers))


def pointing_test(
    model: nn.Module,
    dataset: RetrievalDataset,
    rounds: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    resamples: int = 1000,
) -> dict[str, float]:
    """The mosaic pointing test of a retriever with tile <-> sentence alignment.

    Args:
        rounds: how often all records are dealt into mosaics.
        resamples: of the bootstrap over mosaics; 0 leaves the interval out.

    Returns:
        pointing_accuracy (share of the sentences) with `_low` and `_high` of its 95 % interval, pointing_chance (share
        of the tiles that lie right), pointing_entropy (1: a sentence takes all tiles alike), sentences, mosaics.
    """
    if getattr(model, "alignment", None) is None:
        raise ValueError("this retriever aligns no tiles and sentences; build it with local_loss_weight above 0")
    was_training = model.training
    model.eval()
    try:
        found = run_pointing(model, dataset, mosaic_records(dataset, rounds, seed), batch_size)
    finally:
        model.train(was_training)
    hits, count = found.hit.double(), int(found.mosaic.max()) + 1
    metrics = {"pointing_accuracy": hits.mean().item()}
    if resamples:
        sums, sizes = torch.zeros(2, count, dtype=torch.float64)
        sums.index_add_(0, found.mosaic, hits)
        sizes.index_add_(0, found.mosaic, torch.ones_like(hits))
        picks = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
        shares = sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)
        low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        metrics |= {"pointing_accuracy_low": low, "pointing_accuracy_high": high}
    metrics |= {"pointing_chance": found.chance.mean().item(), "pointing_entropy": found.entropy.mean().item()}
    return metrics | {"sentences": float(len(hits)), "mosaics": float(count)}
