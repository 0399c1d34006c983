"""Train attentive probes on the tokens of a frozen encoder, which are computed once."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vitweave.modeling.heads.registry import build_token_classifier
from vitweave.modeling.vision_encoder import VisionEncoder
from vitweave.training.linear_probes import FIGURES_FILE, WEIGHTS_FILE, shuffled_batches
from vitweave.training.probe_features import (
    EncodedImages,
    FrozenEncoder,
    PooledEncoder,
    TokenEncoder,
    compute_features,
    count_classes,
    label_names,
)

RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class AttentiveFigure:
    """What one probe reached on the evaluation images."""

    learning_rate: float
    accuracy: float
    loss: float


@dataclass
class TrainedAttentiveProbe:
    """The figures, the best first, and the probe of the best.

    Args:
        probe: `AttentiveProbe`, in eval mode.
        settings: its constructor arguments, and what the figures depend on beside encoder and data.
    """

    figures: list[AttentiveFigure]
    probe: nn.Module
    id2label: dict[int, str]
    settings: dict

    @property
    def best(self) -> AttentiveFigure:
        return self.figures[0]

    def save(self, folder: str | Path) -> None:
        """Write the probe as safetensors and the figures as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.probe.state_dict().items()}, folder / WEIGHTS_FILE
        )
        figures = [asdict(figure) for figure in self.figures]
        record = {"figures": figures, "id2label": self.id2label, "settings": self.settings}
        (folder / FIGURES_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "TrainedAttentiveProbe":
        """Read what `save` wrote."""
        record = json.loads(Path(folder, FIGURES_FILE).read_text(encoding="utf-8"))
        probe = build_token_classifier("attentive", **record["settings"]["probe"])
        probe.load_state_dict(load_file(Path(folder, WEIGHTS_FILE)))
        figures = [AttentiveFigure(**figure) for figure in record["figures"]]
        id2label = {int(index): label for index, label in record["id2label"].items()}
        return cls(figures, probe.eval(), id2label, record["settings"])


def probe_tokens(features: dict) -> Tensor:
    """What is attended over, (images, tokens, hidden): all tokens of a layer, or [c_1, mean_1, c_2, mean_2, ...]."""
    if "tokens" in features:
        return features["tokens"]
    pairs = zip(features["class_tokens"], features["mean_patches"], strict=True)
    return torch.stack([token for pair in pairs for token in pair], dim=1)


def fit_attentive_probe(
    tokens: Tensor,
    labels: Tensor,
    probe: nn.Module,
    learning_rate: float,
    steps: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
    progress: bool = True,
) -> nn.Module:
    """AdamW with 5 % linear warm-up and cosine to 0, on batches in the order that `seed` gives."""
    device = probe.query.device
    matrices, vectors = ([p for p in probe.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    warm_up = max(1, steps // 20)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    probe.train()
    batches = shuffled_batches(len(labels), min(batch_size, len(labels)), steps, seed)
    for rows in tqdm(batches, total=steps, desc=f"attentive probe, lr {learning_rate:g}", disable=not progress):
        loss = F.cross_entropy(probe(tokens[rows].to(device).float()), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe.eval()


@torch.no_grad()
def score_probe(probe: nn.Module, tokens: Tensor, labels: Tensor, batch_size: int = 256) -> tuple[float, float]:
    """Accuracy and mean cross entropy."""
    hits, loss = 0, 0.0
    for chunk, truth in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
        truth = truth.to(probe.query.device)
        logits = probe(chunk.to(truth.device).float())
        hits += int((logits.argmax(dim=1) == truth).sum())
        loss += F.cross_entropy(logits, truth, reduction="sum").item()
    return hits / len(labels), loss / len(labels)


def train_attentive_probe(
    encoder: VisionEncoder,
    train_dataset: Dataset | EncodedImages,
    eval_dataset: Dataset | EncodedImages,
    output_dir: str | Path | None = None,
    num_layers: int | None = None,
    num_heads: int = 8,
    rates: Sequence[float] = RATES,
    epochs: int = 20,
    batch_size: int = 64,
    weight_decay: float = 0.05,
    seed: int = 0,
    encode_batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> TrainedAttentiveProbe:
    """Train one probe per learning rate on frozen tokens and keep the best on `eval_dataset`.

    Args:
        num_layers: None attends over all tokens of the last layer, which are kept in memory (a ViT-B at 224 pixels:
            0.6 MB per image); n attends over class token and mean patch of the last n layers.
        output_dir: where to save the best probe and the figures; None saves nothing.
    """
    reader: FrozenEncoder = TokenEncoder(encoder) if num_layers is None else PooledEncoder(encoder, num_layers)
    id2label = label_names(train_dataset, eval_dataset)
    options = {"batch_size": encode_batch_size, "num_workers": num_workers, "progress": progress}
    train, labels = compute_features(reader, train_dataset, description="training features", **options)
    held_out, truth = compute_features(reader, eval_dataset, description="evaluation features", **options)
    num_labels = count_classes([labels, truth], id2label)
    train, held_out = probe_tokens(train), probe_tokens(held_out)
    if len(labels) < 2 or batch_size < 2:
        raise ValueError("the probe's batch norm needs batches of at least 2 images")
    form = {"hidden_size": train.shape[-1], "num_labels": num_labels, "options": {"num_heads": num_heads}}
    steps, found = epochs * math.ceil(len(labels) / batch_size), []
    for rate in rates:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # every rate starts from the same weights
            probe = build_token_classifier("attentive", **form).to(next(encoder.parameters()).device)
        fit_attentive_probe(train, labels, probe, rate, steps, batch_size, weight_decay, seed, progress)
        found.append((AttentiveFigure(rate, *score_probe(probe, held_out, truth)), probe))
    found.sort(key=lambda pair: (-pair[0].accuracy, pair[0].loss))
    settings = {"probe": form, "num_layers": num_layers, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    result = TrainedAttentiveProbe(
        figures=[figure for figure, _ in found],
        probe=found[0][1],
        id2label=id2label or {index: str(index) for index in range(num_labels)},
        settings={**settings, "weight_decay": weight_decay, "model_type": encoder.config.model_type},
    )
    if output_dir is not None:
        result.save(output_dir)
    return result
