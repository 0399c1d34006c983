"""The evaluations that measure the metrics of a card again, on data laid out as the examples read it.

A part of a data set is the folder `<split>/`, or what `<split>.txt` names of the whole folder. In it lie, as for
training, `image/` and `label/`; a folder per modality, and `label/` or one of the image to be drawn; or `rgb/` or
`image/` and `depth/`. Classes have a folder each in `<split>/`. A retriever reads `captions.jsonl` (or a jsonl file),
where the field `split` names the part.
"""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from vitweave.hub.families import auto_class_of, find_family
from vitweave.processing.image_steps import check_sides
from vitweave.processing.sensor_encodings import read_sensor
from vitweave.training.classification_data import ImageClassificationDataset
from vitweave.training.classification_evaluation import evaluate_classification
from vitweave.training.depth_data import DepthDataset
from vitweave.training.depth_evaluation import evaluate_depth
from vitweave.training.modality_data import ModalityDataset, ModalityFolder
from vitweave.training.modality_evaluation import evaluate_modalities
from vitweave.training.paired_data import place_of_part
from vitweave.training.retrieval_data import RetrievalDataset
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.retrieval_records import open_records
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.segmentation_evaluation import evaluate_segmentation
from vitweave.training.translation_data import TranslationDataset
from vitweave.training.translation_evaluation import evaluate_translation

ONE_BY_ONE = 1  # images of a data set may differ in size
NAME = re.compile(r"[\w-]+")  # of what lies in the data's folder, never a path


def check_names(names: Iterable[str]) -> list[str]:
    """Refuse names of folders that could lead out of the data."""
    strange = [name for name in names if not NAME.fullmatch(name)]
    if strange:
        raise ValueError(f"expected names of letters, digits, _ and - for the folders of a part, got {strange!r:.100}")
    return list(names)


@strict
@dataclass
class Windowed:
    """Predictions over windows. Fields, here as below: the `options` that a metric on a card may have."""

    window: int | None = None
    stride: int | None = None

    def __post_init__(self):
        check_sides("window", self.window)
        check_sides("stride", self.stride)


@strict
@dataclass
class Segmentation(Windowed):
    """Class maps of pictures."""

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        folder, names = place_of_part(data, split)
        dataset = SegmentationDataset.from_folder(folder, processor, names=names, num_labels=model.config.num_labels)
        return evaluate_segmentation(model, dataset, ONE_BY_ONE, self.window, self.stride)


@strict
@dataclass
class ModalitySegmentation:
    """Class maps of several sensors, of which some may be hidden."""

    keep: list[str] | None = None  # the modalities that are not hidden

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        folder, names = place_of_part(data, split)
        samples = ModalityFolder(folder, check_names(processor.modalities), names=names)
        return evaluate_modalities(model, ModalityDataset(samples, processor, keep=self.keep), self.keep, ONE_BY_ONE)


@strict
@dataclass
class ImageToImage:
    """Images of one sensor, drawn from those of others."""

    target: str
    sensor: dict  # of the target, see `Sensor`

    def __post_init__(self):
        check_names([self.target])
        read_sensor(self.sensor, self.target)

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        folder, names = place_of_part(data, split)
        folders = check_names([*processor.modalities, self.target])
        samples = ModalityFolder(folder, folders, label_folder=None, names=names)
        return evaluate_translation(model, TranslationDataset(samples, processor, self.target, self.sensor), ONE_BY_ONE)


@strict
@dataclass
class Depth(Windowed):
    """Depth under a protocol."""

    protocol: str = "nyu_eigen"

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        folder, names = place_of_part(data, split)
        dataset = DepthDataset.from_folder(folder, processor, names=names)
        return evaluate_depth(model, dataset, batch_size=ONE_BY_ONE, **dataclasses.asdict(self))


@strict
@dataclass
class Classification:
    """One class per picture."""

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        dataset = ImageClassificationDataset.from_folder(data / split, processor, id2label=model.config.id2label)
        return evaluate_classification(model, dataset)


@strict
@dataclass
class Retrieval:
    """Pictures by their texts, and texts by their pictures."""

    text_columns: list[str] = dataclasses.field(default_factory=lambda: ["caption"])

    def __call__(self, model: PreTrainedModel, processor, data: Path, split: str) -> dict:
        return evaluate_retrieval(model, RetrievalDataset(open_records(data, split), processor, self.text_columns))


EVALUATIONS = {  # by the Auto class that opens a model, or by a class that is evaluated otherwise
    "AutoModelForSemanticSegmentation": Segmentation,
    "ModalityFusionForSemanticSegmentation": ModalitySegmentation,
    "AutoModelForImageToImage": ImageToImage,
    "AutoModelForDepthEstimation": Depth,
    "AutoModelForImageClassification": Classification,
    "AutoModelForZeroShotImageClassification": Retrieval,
}


def find_evaluation(model: PreTrainedModel) -> type | None:
    """The evaluation of a model's kind; None where there is none."""
    auto_class = auto_class_of(model, find_family(model.config.model_type))
    return EVALUATIONS.get(type(model).__name__, EVALUATIONS.get(auto_class))
