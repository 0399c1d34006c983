"""The README of a published model: what it is, how to load it, what was measured and how to measure it again."""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from vitweave.hub.checksums import sum_rows

CARD_FILE = "vitweave_card.json"  # lies beside the model; a recipe writes it, the export reads it
PIPELINE_TAGS = {
    "AutoModel": "image-feature-extraction",
    "AutoBackbone": "image-feature-extraction",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForImageToImage": "image-to-image",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
}
NESTED = ("backbone_config", "encoder_config", "stream_config", "vision_config", "text_config")
GENERAL_FACTS = (
    "num_hidden_layers",
    "hidden_size",
    "hidden_sizes",
    "depths",
    "num_attention_heads",
    "patch_size",
    "image_size",
)
OWN_FACTS = (
    "modalities",
    "head_type",
    "loss_type",
    "fusion_type",
    "layers",
    "num_register_tokens",
    "projection_dim",
    "contrastive_loss",
    "tile_levels",
)
LARGEST_VALUE = 1e300
SHA256 = re.compile(r"[0-9a-f]{64}")
CLS_WEIGHT = re.compile(r"_cls(_down|_up)?(\.|$)")
CITATION = """@software{vitweave,
  title = {vitweave: woven vision encoders for Hugging Face transformers},
  license = {Apache-2.0}
}"""

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

| fact | value |
| --- | --- |
{% for name, value in facts %}| {{ name }} | {{ value }} |
{% endfor %}
## Load it

```python
{{ loading }}
```

`trust_remote_code=True` runs the Python files of this repository; read them first. With `pip install vitweave` and
`import vitweave` the same lines work without it, on the installed code.

## Training data

{{ training_data }}
{% if training_command %}
```bash
{{ training_command }}
```
{% endif %}
## Results

{% if metrics %}| metric | dataset | split | value | recompute with |
| --- | --- | --- | --- | --- |
{% for row in metrics %}| {{ row | join(" | ") }} |
{% endfor %}{% else %}Not evaluated.
{% endif %}
{% if checksums %}## Checksums

SHA-256; `vitweave verify FOLDER`, or `sha256sum --check SHA256SUMS` in the folder, compares all files; with
`--data DATASET=PATH` the command also measures the results again.

| what | SHA-256 |
| --- | --- |
{% for what, digest in checksums %}| {{ what }} | `{{ digest }}` |
{% endfor %}
{% endif %}## Limitations

{{ limitations }}

## Citation

```bibtex
{{ citation }}
```

## Licence

{{ licence }} The Python files are part of vitweave, Apache-2.0.
"""


@strict
@dataclass
class CardMetric:
    """One measured number; without the command that gives it again, it is not published."""

    type: str  # the Hub's id of the metric, e.g. "mean_iou"
    value: float | int
    command: str
    dataset: str  # the Hub's id of the data set, or a short name
    name: str | None = None  # e.g. "mIoU"
    split: str | None = None
    # of the evaluation, see `evaluations`, e.g. {"keep": ["rgb"]}; None: only the command measures it
    options: dict | None = field(default_factory=dict)

    def __post_init__(self):
        if not -LARGEST_VALUE < self.value < LARGEST_VALUE:
            raise ValueError(f"metric {self.type!r} needs a number that was measured, got {self.value!r:.100}")
        if json.loads(json.dumps(self.options)) != self.options:
            raise ValueError(f"metric {self.type!r} needs options that JSON gives back, got {self.options!r:.100}")
        if not self.command.strip():
            raise ValueError(f"metric {self.type!r} needs the command that recomputes it, got an empty one")


@strict
@dataclass
class CardInfo:
    """What a card says beyond the facts in the config. Whatever is not given is said to be missing."""

    model_name: str | None = None
    summary: str | None = None
    license: str | None = None  # of the weights, as an id of the Hub, e.g. "apache-2.0"
    base_model: str | list[str] | None = None
    datasets: list[str] = field(default_factory=list)
    training_data: str | None = None
    training_command: str | None = None
    metrics: list = field(default_factory=list)  # of `CardMetric`; a dict becomes one
    limitations: str | None = None
    citation: str | None = None
    tags: list[str] = field(default_factory=list)
    data_sha256: dict[str, str] = field(default_factory=dict)  # data set -> SHA-256, see `checksums.sha256`

    def __post_init__(self):
        self.metrics = [m if isinstance(m, CardMetric) else build(CardMetric, m, "metric") for m in self.metrics]
        strange = sorted(name for name, digest in self.data_sha256.items() if not SHA256.fullmatch(digest))
        if strange:
            raise ValueError(f"expected SHA-256 as 64 hexadecimal digits in data_sha256, got others for {strange}")

    @classmethod
    def load(cls, path: str | Path) -> "CardInfo":
        """Read a JSON file, or `vitweave_card.json` of a folder (an empty card when there is none)."""
        path = Path(path)
        if path.is_dir():
            path = path / CARD_FILE
            if not path.exists():
                return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return build(cls, values, f"card {path.name}")

    def save(self, folder: str | Path) -> Path:
        """Write `vitweave_card.json` into a model folder."""
        path = Path(folder) / CARD_FILE
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def build(kind: type, values: dict, role: str) -> Any:
    """A strict dataclass from a dict, with unknown and missing keys and wrong types refused by name."""
    if not isinstance(values, dict):
        raise ValueError(f"{role}: expected a mapping, got {type(values).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    required = {n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING}
    if unknown or required - set(values):
        raise ValueError(
            f"{role}: unknown keys {unknown}, missing {sorted(required - set(values))}; known {list(known)}"
        )
    try:
        return kind(**values)
    except StrictDataclassError as error:
        raise ValueError(f"{role}: {error}") from error


def model_card(
    model: PreTrainedModel,
    auto_class: str,
    info: CardInfo,
    name: str,
    processor: bool = False,
    sums: dict[str, str] | None = None,
) -> ModelCard:
    """Write the card of a model.

    Args:
        auto_class: the Auto class that opens the model, e.g. "AutoModelForSemanticSegmentation".
        name: what `from_pretrained` is given: the repository, or the folder's name.
        processor: an image processor is published with the model.
        sums: SHA-256 of the published files by name.
    """
    title = info.model_name or name.rpartition("/")[2]
    task = PIPELINE_TAGS.get(auto_class)
    results = [_eval_result(metric, task) for metric in info.metrics]
    data = ModelCardData(
        license=info.license,
        library_name="transformers",  # the code is shipped, so transformers alone loads it
        tags=["vitweave", model.config.model_type, *info.tags],
        pipeline_tag=task,
        datasets=info.datasets or None,
        metrics=sorted({metric.type for metric in info.metrics}) or None,
        base_model=info.base_model,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=title,
        summary=info.summary or f"A `{model.config.model_type}` model ({type(model).__name__}) made with vitweave.",
        facts=architecture_facts(model),
        loading=_loading_lines(name, auto_class, processor),
        training_data=info.training_data or f"Data sets: {', '.join(info.datasets) or 'not stated'}.",
        training_command=info.training_command,
        metrics=[_metric_row(metric) for metric in info.metrics],
        checksums=[(_cell(what), digest) for what, digest in sum_rows(sums, info.data_sha256)] if sums else [],
        limitations=info.limitations or "None were studied. Images unlike the training data may give wrong results.",
        citation=info.citation or CITATION,
        licence=f"Weights: {info.license}." if info.license else "The licence of the weights is not stated.",
    )


def architecture_facts(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(name, value) rows: the structure from the config, the parameter counts from the model."""
    rows = config_facts(model.config)
    kind = type(model).__name__
    if kind.endswith(("Classification", "Segmentation")):  # any config has default labels
        rows.append(("labels", str(model.config.num_labels)))
    if kind.endswith("DepthEstimation"):
        within = f", {model.config.min_depth:g} to {model.config.max_depth:g}"
        rows.append(("predicts", model.config.depth_target + within * (model.config.depth_target == "metres")))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, own = sum(counts.values()), sum(n for name, n in counts.items() if CLS_WEIGHT.search(name))
    rows.append(("parameters", f"{total:,}"))
    if own:
        rows.append(("of these added for [CLS]", f"{own:,} ({own / (total - own):.1%} of the rest)"))
    return rows


def config_facts(config: PreTrainedConfig, prefix: str = "") -> list[tuple[str, str]]:
    """The facts of one config and, marked with their place, of the configs inside it."""
    rows = [(f"{prefix}type", f"`{config.model_type}`")]
    for name in (*GENERAL_FACTS, *OWN_FACTS):
        value = getattr(config, name, None)
        if value is not None and value != 0:
            rows.append((prefix + name.replace("num_", "").replace("_", " "), _cell(value)))
    rows += [(prefix + name, value) for name, value in _specialised_facts(config)]
    for name in NESTED:
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig):
            rows += config_facts(nested, prefix + name.removesuffix("_config") + ": ")
    for index, member in enumerate(getattr(config, "encoder_configs", None) or ()):
        rows += config_facts(member, f"{prefix}encoder {index}: ")
    return rows


def _specialised_facts(config: PreTrainedConfig) -> list[tuple[str, str]]:
    if config.model_type != "specialized_vit":
        return []
    total = config.num_hidden_layers
    rows = []
    if config.specialize_norm:
        rows.append(("norms owned by [CLS]", _blocks(config.norm_blocks, total)))
    rows.append((f"{'/'.join(config.qkv_parts)} owned by [CLS]", _blocks(config.qkv_blocks, total)))
    rows.append(("attention output owned by [CLS]", _blocks(config.proj_blocks, total)))
    rows.append(("MLP owned by [CLS]", _blocks(config.mlp_blocks, total)))
    rows = [(name, blocks) for name, blocks in rows if blocks]
    if config.specialize_final_norm:
        rows.append(("final norm", "owned by [CLS] too"))
    if config.cls_rank:
        rows.append(("rank of the [CLS] weights", str(config.cls_rank)))
    if config.attention_bias:
        rows.append(("attention bias", f"learnt {config.attention_bias}"))
    if config.class_attention_layers:
        rows.append(("class-attention layers", str(config.class_attention_layers)))
    return rows


def _blocks(blocks: list[int], total: int) -> str:
    """[0, 1, 2, 5] of 12 -> "blocks 0-2, 5 (4 of 12)"."""
    if not blocks:
        return ""
    runs = []
    for index in blocks:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return "blocks " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + f" ({len(blocks)} of {total})"


def _loading_lines(name: str, auto_class: str, processor: bool) -> str:
    variable = "backbone" if auto_class == "AutoBackbone" else "model"
    lines = [f'{variable} = {auto_class}.from_pretrained("{name}", trust_remote_code=True)']
    if processor:
        lines.insert(0, f'processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)')
    return "\n".join([f"from transformers import {'AutoImageProcessor, ' * processor}{auto_class}", *lines])


def _eval_result(metric: CardMetric, task: str | None) -> EvalResult:
    return EvalResult(
        task_type=task or "other",
        dataset_type=metric.dataset,
        dataset_name=metric.dataset,
        dataset_split=metric.split,
        metric_type=metric.type,
        metric_name=metric.name,
        metric_value=metric.value,
    )


def _metric_row(metric: CardMetric) -> list[str]:
    value = f"{metric.value:.4g}" if isinstance(metric.value, float) else str(metric.value)
    cells = [metric.name or metric.type, metric.dataset, metric.split or "", value]
    return [*map(_cell, cells), f"`{_cell(metric.command)}`"]


def _cell(value: object) -> str:
    """Text that cannot break out of a table cell."""
    return " ".join(str(value).replace("|", r"\|").split())
