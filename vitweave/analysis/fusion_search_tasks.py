"""What a search over fusions needs to know of a task: how a candidate is built, trained and judged, image by image."""

import io
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    set_seed,
)

from vitweave.analysis.bootstrap import resampled_sums
from vitweave.analysis.encoder_fusion_comparison import split, to_device
from vitweave.analysis.fusion_candidates import Candidate
from vitweave.analysis.fusion_search_features import KeptFeatures
from vitweave.auto import register
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone, LayerFusionForImageClassification
from vitweave.modeling.modeling_multi_encoder import MultiEncoderBackbone, MultiEncoderForImageClassification
from vitweave.training.classification import train_classification
from vitweave.training.classification_data import collate_classification
from vitweave.training.depth import train_depth
from vitweave.training.depth_data import collate_depth
from vitweave.training.depth_metrics import DepthMetrics, predicted_depth_at_labels
from vitweave.training.feature_cache import FeatureCollator
from vitweave.training.metrics import predicted_classes
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import collate_segmentation


class SearchTask:
    """Frozen encoders, their kept features, and a head that is trained on each candidate.

    What is measured of an image is a row of sums, such that the metric is a function of the sum of all rows: so one
    bootstrap over images serves every task.

    Args:
        label_stride: train and choose on every n-th row and column of label maps; the report is on all.
    """

    metric: str
    auto: type  # loads what `save` has written
    lower_is_better = False
    dense = True
    recipe: Callable
    collate: Callable

    def __init__(self, features: KeptFeatures, label_stride: int = 1):
        if label_stride < 1:
            raise ValueError(f"expected a label_stride of 1 or more, every n-th row and column, got {label_stride}")
        self.features, self.label_stride = features, label_stride

    def facts(self) -> dict:
        """What a run depends on besides the features, the candidate and the training options."""
        return {"task": type(self).__name__, "label_stride": self.label_stride}

    def build(self, candidate: Candidate) -> PreTrainedModel:
        """A new head, and fusion, on the encoders themselves."""
        raise NotImplementedError

    def fused(self, candidate: Candidate, of_layers: type, of_encoders: type | None = None, **options):
        """A candidate's new fusion on the encoders: an `of_layers` where it reads one, else an `of_encoders`."""
        encoders = [self.features.encoders[index] for index in candidate.encoders]
        options |= {"fusion_type": candidate.fusion_type, "fusion_options": candidate.options}
        if candidate.is_tower:
            fields = self.features.tower_fields(candidate.layers, candidate.encoders)
            return of_encoders.from_encoders(encoders, **options, **fields)
        return of_layers.from_encoder(encoders[0], layers=candidate.layers[0], **options)

    def cost_model(self, candidate: Candidate) -> PreTrainedModel:
        """The part whose cost is measured."""
        return self.build(candidate)

    def data(self, candidate: Candidate, held_out: float) -> tuple[Dataset, Dataset]:
        """What a candidate trains on and what it is measured on: of the training images all but a share and that
        share, or without a share all of them and the validation images."""
        if not held_out:
            train = self.features.of(candidate, 0, self.label_stride)
            return train, self.features.of(candidate, 1)
        return split(self.features.of(candidate, 0, self.label_stride), held_out)

    def train(self, candidate: Candidate, dataset: Dataset, seed: int, arguments: dict) -> PreTrainedModel:
        """A candidate after training; `arguments` are of `TrainingArguments`."""
        set_seed(seed)
        model = self.build(candidate)
        # without its bars the Trainer prints a line per run
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            type(self).recipe(
                model,
                dataset,
                output_dir=folder,
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **arguments,
            )
        return model.eval()

    @torch.no_grad()
    def sums(self, model: PreTrainedModel, dataset: Dataset, batch_size: int) -> Tensor:
        """(images, numbers) float64: what each image adds to the metric."""
        found = []
        for batch in DataLoader(dataset, batch_size, collate_fn=FeatureCollator(type(self).collate)):
            inputs = {name: batch[name] for name in ("pixel_values", "encoder_outputs") if name in batch}
            found.append(self.batch_sums(model(**to_device(inputs, model.device)), batch["labels"]))
        return torch.cat(found).double()

    def batch_sums(self, outputs, labels: Tensor) -> Tensor:
        """`sums` of a batch."""
        raise NotImplementedError

    def save(self, model: PreTrainedModel, candidate: Candidate, folder: Path) -> None:
        """A trained model, and the processor of its images."""
        model.save_pretrained(folder)
        self.features.parts[candidate.encoders[0] if not candidate.is_tower else 0][0].processor.save_pretrained(folder)

    def load(self, folder: Path) -> PreTrainedModel:
        """What `save` has written."""
        register()
        return self.auto.from_pretrained(folder).eval()

    def value(self, sums: Tensor) -> Tensor:
        """The metric of sums over images (..., numbers)."""
        return sums[..., 0] / sums[..., 1]

    def score(self, value: float) -> float:
        """Higher is better, whatever the metric; what is not a number is worst."""
        if math.isnan(value):
            return -math.inf
        return -value if self.lower_is_better else value


class DenseSearchTask(SearchTask):
    """A linear head on the fused map."""

    model_class: type[PreTrainedModel]

    def __init__(self, features: KeptFeatures, label_stride: int = 1, **head):
        super().__init__(features, label_stride)
        self.head = head

    def facts(self) -> dict:
        return {**super().facts(), "head": self.head}

    def build(self, candidate: Candidate) -> PreTrainedModel:
        backbone = self.fused(candidate, LayerFusionBackbone, MultiEncoderBackbone)
        return self.model_class.from_backbone(backbone, freeze_backbone=True, **self.head)


class SegmentationSearch(DenseSearchTask):
    """Mean IoU of all pixels."""

    metric, auto = "mIoU", AutoModelForSemanticSegmentation
    model_class, recipe = DensePredictorForSemanticSegmentation, train_segmentation
    collate = collate_segmentation

    def batch_sums(self, outputs, labels: Tensor) -> Tensor:
        predicted = predicted_classes(outputs.logits, labels).cpu()
        return overlaps(predicted, labels, outputs.logits.shape[1])

    def value(self, sums: Tensor) -> Tensor:
        hits, union = sums.unflatten(-1, (2, -1)).unbind(-2)
        return (hits / union).nanmean(dim=-1)  # 0 / 0: a class that neither occurs nor is predicted does not count


def overlaps(predicted: Tensor, labels: Tensor, num_labels: int, ignore_index: int = 255) -> Tensor:
    """(batch, 2 * num_labels): pixels of each class that were found, and pixels in it or said to be in it."""
    images = torch.arange(len(labels)).view(-1, 1, 1).expand_as(labels)
    valid = labels != ignore_index
    place = (images * num_labels + labels) * num_labels + predicted
    counts = torch.bincount(place[valid], minlength=len(labels) * num_labels**2).view(-1, num_labels, num_labels)
    hits = counts.diagonal(dim1=1, dim2=2)
    return torch.cat([hits, counts.sum(dim=1) + counts.sum(dim=2) - hits], dim=1)


class DepthSearch(DenseSearchTask):
    """AbsRel, averaged per image and then over the images."""

    metric, auto, lower_is_better = "AbsRel", AutoModelForDepthEstimation, True
    model_class, recipe = DensePredictorForDepthEstimation, train_depth
    collate = collate_depth

    def __init__(self, features: KeptFeatures, label_stride: int = 1, protocol: str = "nyu", **head):
        # DINOv3's linear head; a fused map has no class token beside it
        options = {"use_batch_norm": True, "use_cls_token": False, "upsample": 1}
        super().__init__(features, label_stride, head_options=options, **head)
        self.metrics = DepthMetrics(protocol)
        if self.metrics.protocol.prediction != "metres" or self.metrics.protocol.flip:
            raise ValueError(f"expected a protocol of depth in metres without mirrored images, got {protocol!r}")

    def facts(self) -> dict:
        return {**super().facts(), "protocol": asdict(self.metrics.protocol)}

    def batch_sums(self, outputs, labels: Tensor) -> Tensor:
        depth = predicted_depth_at_labels(outputs.predicted_depth, labels).cpu()
        values, counted = self.metrics.per_image(depth, labels)
        return torch.stack([torch.from_numpy(values["abs_rel"]), torch.from_numpy(counted).double()], dim=1)


class ClassificationSearch(SearchTask):
    """Accuracy of a linear classifier on the fused embedding."""

    metric, auto, dense = "accuracy", AutoModelForImageClassification, False
    recipe, collate = train_classification, collate_classification

    def __init__(self, features: KeptFeatures, label_stride: int = 1, id2label: dict[int, str] | None = None):
        super().__init__(features)
        self.id2label = id2label

    def facts(self) -> dict:
        return {**super().facts(), "id2label": self.id2label}

    def build(self, candidate: Candidate) -> PreTrainedModel:
        classes = (LayerFusionForImageClassification, MultiEncoderForImageClassification)
        return self.fused(candidate, *classes, id2label=self.id2label)

    def batch_sums(self, outputs, labels: Tensor) -> Tensor:
        right = (outputs.logits.argmax(dim=1).cpu() == labels).double()
        return torch.stack([right, torch.ones_like(right)], dim=1)


SEARCH_TASKS: dict[str, type[SearchTask]] = {
    "classification": ClassificationSearch,
    "depth": DepthSearch,
    "segmentation": SegmentationSearch,
}


def resampled_values(task: SearchTask, sums: Sequence[Tensor], resamples: int) -> Tensor:
    """(resamples,) metrics over images drawn with replacement, the mean of the seeds; see `resampled_sums`.

    Args:
        sums: of every seed, (images, numbers).
    """
    return torch.stack([task.value(resampled_sums(one, resamples)) for one in sums]).mean(dim=0)
