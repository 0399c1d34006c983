"""DINOv2's linear protocol (arXiv:2304.07193): a grid of linear classifiers on frozen features, trained in one pass."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.probe_features import EncodedImages, PooledEncoder, compute_features, count_classes, label_names
from vitweave.training.probing import linear_probe_input

BASE_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
WEIGHTS_FILE, FIGURES_FILE = "probe.safetensors", "probe.json"


@dataclass(frozen=True)
class ProbeKind:
    """What a classifier reads: the class tokens of the last `num_layers` blocks and, if `avgpool`, the mean patch."""

    num_layers: int
    avgpool: bool

    @property
    def name(self) -> str:
        return f"last{self.num_layers}" + "_avgpool" * self.avgpool

    def read(self, features: dict[str, tuple[Tensor, ...]]) -> Tensor:
        """(images, features) of what `PooledEncoder.encode` returned."""
        mean = features["mean_patches"][-1][:, None] if self.avgpool else None
        return linear_probe_input(list(features["class_tokens"][-self.num_layers :]), mean)


@dataclass(frozen=True)
class ProbeFigure:
    """What one classifier reached on the evaluation images; `learning_rate` is the base rate, per 256 images."""

    num_layers: int
    avgpool: bool
    learning_rate: float
    accuracy: float
    loss: float

    @property
    def kind(self) -> ProbeKind:
        return ProbeKind(self.num_layers, self.avgpool)


@dataclass
class LinearProbes:
    """All figures, and the best classifier of every kind.

    Args:
        figures: one per classifier, the best first.
        heads: kind name -> (weight (num_labels, features), bias (num_labels,)).
        settings: what the figures depend on beside encoder and data.
    """

    figures: list[ProbeFigure]
    heads: dict[str, tuple[Tensor, Tensor]]
    id2label: dict[int, str]
    settings: dict

    @property
    def best(self) -> ProbeFigure:
        return self.figures[0]

    def best_of(self, num_layers: int, avgpool: bool) -> ProbeFigure:
        """The best figure of one kind."""
        kind = ProbeKind(num_layers, avgpool)
        if kind.name not in self.heads:
            raise ValueError(f"there is no probe {kind.name}; known: {sorted(self.heads)}")
        return next(figure for figure in self.figures if figure.kind == kind)

    def save(self, folder: str | Path) -> None:
        """Write the classifiers as safetensors and all figures as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: dict(zip(("weight", "bias"), head, strict=True)) for name, head in self.heads.items()}
        tensors = {f"{name}.{part}": value for name, head in named.items() for part, value in head.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        record = {
            "best": asdict(self.best),
            "figures": [asdict(figure) for figure in self.figures],
            "id2label": self.id2label,
            "settings": self.settings,
        }
        (folder / FIGURES_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "LinearProbes":
        """Read what `save` wrote."""
        record = json.loads(Path(folder, FIGURES_FILE).read_text(encoding="utf-8"))
        tensors = load_file(Path(folder, WEIGHTS_FILE))
        names = sorted({name.partition(".")[0] for name in tensors})
        return cls(
            figures=[ProbeFigure(**figure) for figure in record["figures"]],
            heads={name: (tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names},
            id2label={int(index): label for index, label in record["id2label"].items()},
            settings=record["settings"],
        )


class LinearGrid(torch.nn.Module):
    """One linear classifier per learning rate on the same features, as one matrix product.

    The loss is the sum of the classifiers' cross entropies, each times its own learning rate. Under SGD with momentum,
    without weight decay, that is the same as training each with its rate: both are linear in the gradient.
    """

    def __init__(self, in_features: int, num_labels: int, rates: Tensor, generator: torch.Generator):
        super().__init__()
        heads = len(rates)
        weight = torch.empty(heads, num_labels, in_features).normal_(std=0.01, generator=generator)
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(torch.zeros(heads, num_labels))
        self.register_buffer("rates", rates)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, features) -> logits (batch, heads, num_labels)."""
        logits = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return logits.unflatten(1, self.bias.shape)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The sum over classifiers of learning rate times cross entropy."""
        return (self.rates * cross_entropies(self(features), labels).mean(dim=0)).sum()

    @torch.no_grad()
    def evaluate(self, features: Tensor, labels: Tensor, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
        """Accuracy and mean loss of each classifier, (heads,) each."""
        hits, losses = torch.zeros(2, len(self.rates), dtype=torch.float64)
        for chunk, truth in zip(features.split(batch_size), labels.split(batch_size), strict=True):
            logits = self(chunk.to(self.weight))
            truth = truth.to(logits.device)
            hits += (logits.argmax(dim=-1) == truth[:, None]).sum(dim=0).double().cpu()
            losses += cross_entropies(logits, truth).sum(dim=0).double().cpu()
        return hits / len(labels), losses / len(labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every image and classifier: (batch, heads, num_labels), (batch,) -> (batch, heads)."""
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(logits.shape[:2]), reduction="none")


def shuffled_batches(length: int, batch_size: int, steps: int, seed: int):
    """`steps` batches of image indices; every image comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat((left, torch.randperm(length, generator=generator)))
        yield left[:batch_size]
        left = left[batch_size:]


def train_grids(
    inputs: dict[str, Tensor],
    labels: Tensor,
    num_labels: int,
    rates: Sequence[float] = BASE_RATES,
    steps: int = 12500,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, LinearGrid]:
    """Train every classifier of every kind on the same batches: SGD, momentum 0.9, cosine to 0.

    Args:
        inputs: kind name -> (images, features). labels: (images,) class ids.
        rates: base learning rates; they are scaled by batch size / 256.
    """
    batch_size = min(batch_size, len(labels))
    generator = torch.Generator().manual_seed(seed)
    scaled = torch.tensor(rates) * batch_size / 256
    grids = torch.nn.ModuleDict(
        {name: LinearGrid(given.shape[1], num_labels, scaled, generator) for name, given in inputs.items()}
    ).to(device)
    optimizer = torch.optim.SGD(grids.parameters(), lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = shuffled_batches(len(labels), batch_size, steps, seed)
    for rows in tqdm(batches, total=steps, desc="linear probes", disable=not progress):
        truth = labels[rows].to(device)
        loss = sum(grid.loss(inputs[name][rows].to(device).float(), truth) for name, grid in grids.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return dict(grids.items())


def probe_kinds(encoder: VisionEncoder, layer_counts: Sequence[int], avgpool: Sequence[bool]) -> list[ProbeKind]:
    """The kinds of input an encoder has. One without a class token has its pooled output alone."""
    if not encoder.facts.num_class_tokens:
        return [ProbeKind(1, False)]
    return [ProbeKind(count, pooled) for count in sorted(set(layer_counts)) for pooled in sorted(set(avgpool))]


def train_linear_probes(
    encoder: VisionEncoder,
    train_dataset: Dataset | EncodedImages,
    eval_dataset: Dataset | EncodedImages,
    output_dir: str | Path | None = None,
    layer_counts: Sequence[int] = (1, 4),
    avgpool: Sequence[bool] = (False, True),
    rates: Sequence[float] = BASE_RATES,
    steps: int = 12500,
    batch_size: int = 128,
    seed: int = 0,
    encode_batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> LinearProbes:
    """Train a linear classifier for every (number of layers, average pool, learning rate) and rank them.

    The features are computed once, so the images are not augmented (DINOv2 crops and flips them at random); everything
    else is its protocol. Which classifier is best is decided on `eval_dataset`, so its figure is a little too high.

    Args:
        encoder: any `VisionEncoder`; which layers it was asked for does not matter here. One without a class token
            (ConvNeXt, Swin, MobileNetV2) is probed on its pooled output, whatever `layer_counts` and `avgpool` say.
        output_dir: where to save the best classifiers and the figures; None saves nothing.
    """
    kinds = probe_kinds(encoder, layer_counts, avgpool)
    pooled = PooledEncoder(encoder, num_layers=max([kind.num_layers for kind in kinds]))
    id2label = label_names(train_dataset, eval_dataset)
    options = {"batch_size": encode_batch_size, "num_workers": num_workers, "progress": progress}
    train, labels = compute_features(pooled, train_dataset, description="training features", **options)
    held_out, truth = compute_features(pooled, eval_dataset, description="evaluation features", **options)
    num_labels = count_classes([labels, truth], id2label)
    inputs = {kind.name: kind.read(train) for kind in kinds}
    device = next(encoder.parameters()).device
    grids = train_grids(inputs, labels, num_labels, rates, steps, batch_size, seed, device, progress)
    figures, heads = [], {}
    for kind in kinds:
        grid = grids[kind.name]
        found = [values.tolist() for values in grid.evaluate(kind.read(held_out), truth)]
        ranked = [ProbeFigure(kind.num_layers, kind.avgpool, *row) for row in zip(rates, *found, strict=True)]
        best = ranked.index(min(ranked, key=rank))
        heads[kind.name] = (grid.weight[best].detach().cpu().clone(), grid.bias[best].detach().cpu().clone())
        figures += ranked
    probes = LinearProbes(
        figures=sorted(figures, key=rank),
        heads=heads,
        id2label=id2label or {index: str(index) for index in range(num_labels)},
        settings={"steps": steps, "batch_size": batch_size, "seed": seed, "model_type": encoder.config.model_type},
    )
    if output_dir is not None:
        probes.save(output_dir)
    return probes


def rank(figure: ProbeFigure) -> tuple[float, float]:
    """Sort key: the highest accuracy first, among equal ones the lowest loss; a diverged classifier comes last."""
    return (-figure.accuracy, figure.loss) if math.isfinite(figure.loss) else (1.0, 0.0)
