"""Which own classes belong together: config, model classes by Auto class, image processors by backend."""

import ast
import importlib.util
from dataclasses import dataclass

import transformers
from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_torchvision_available

from vitweave.auto import FAMILIES
from vitweave.hub.flatten import module_source
from vitweave.processing.processing_figure_text import FigureTextProcessor
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor

JOINT_PROCESSORS = {  # of images and texts
    "FigureTextProcessor": FigureTextProcessor,
    "MultiEncoderVlmProcessor": MultiEncoderVlmProcessor,
}


@dataclass(frozen=True)
class Family:
    """One row of the registrations, with the Auto classes by name."""

    config_class: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]
    processors: tuple[dict[str, type | None], ...]  # by backend, one dict per task

    @property
    def package(self) -> str:
        """The top-level package the family lives in."""
        return self.config_class.__module__.partition(".")[0]


def families() -> dict[str, Family]:
    """All families by model_type."""
    found = {}
    for config_class, models, processors in FAMILIES:
        by_name = {getattr(auto, "__name__", auto): model for auto, model in models.items()}
        found[config_class.model_type] = Family(config_class, by_name, tuple(processors or ()))
    return found


def find_family(model_type: str | None) -> Family:
    """The family of a model_type; a foreign one is refused."""
    known = families()
    if model_type not in known:
        raise ValueError(
            f"expected a vitweave model, got model_type {model_type!r}; vitweave has {sorted(known)}. Models of other"
            " packages are published with their own push_to_hub."
        )
    return known[model_type]


def auto_class_of(model: PreTrainedModel, family: Family) -> str:
    """The name of the Auto class that opens this very model class."""
    for auto_name, model_class in family.models.items():
        if type(model) is model_class:
            return auto_name
    expected = sorted({model_class.__name__ for model_class in family.models.values()})
    raise ValueError(f"expected one of the classes {expected}, got {type(model).__module__}.{type(model).__name__}")


def own_processors() -> list[dict[str, type | None]]:
    """The image processors of all families, by backend."""
    return [by_backend for family in families().values() for by_backend in family.processors]


def processor_references(processor: object) -> dict[str, str]:
    """backend -> "module.Class" for an own image processor, empty for one of transformers itself.

    The torchvision class is looked up in the source, so that it is published where torchvision is not installed.
    """
    kind = type(processor)
    if kind.__module__.startswith("transformers."):
        return {}
    for by_backend in own_processors():
        classes = {backend: cls for backend, cls in by_backend.items() if cls is not None}
        if kind not in classes.values():
            continue
        found = {backend: f"{cls.__module__}.{cls.__name__}" for backend, cls in classes.items()}
        if "torchvision" not in found and "pil" in found:
            twin = _torchvision_twin(classes["pil"])
            found = ({"torchvision": twin} if twin else {}) | found
        return found
    raise ValueError(
        f"expected an image processor of vitweave or transformers, got {kind.__module__}.{kind.__name__}, whose code"
        " would be missing in the exported folder"
    )


def find_processor_class(named: str | None) -> type[ImageProcessingMixin]:
    """The class behind the `image_processor_type` of a saved processor, for the backend that is installed.

    Both backends are saved under the name of the torchvision class; the other one is called `...Pil`.
    """
    own = {cls.__name__: cls for by_backend in own_processors() for cls in by_backend.values() if cls is not None}
    base = str(named).removesuffix("Fast").removesuffix("Pil")
    for name in (base, f"{base}Pil") if is_torchvision_available() else (f"{base}Pil", base):
        found = own.get(name) or getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, ImageProcessingMixin):
            return found
    raise ValueError(f"expected an image processor of transformers or one of {sorted(own)}, got {named!r}")


def joint_processor_references(processor: ProcessorMixin) -> dict[str, str]:
    """`{"AutoProcessor": "module.Class"}` for an own processor of images and texts, empty for one of transformers."""
    kind = type(processor)
    if kind.__module__.startswith("transformers."):
        return {}
    if kind not in JOINT_PROCESSORS.values():
        raise ValueError(
            f"expected a processor of vitweave or transformers, got {kind.__module__}.{kind.__name__}, whose code would"
            " be missing in the exported folder"
        )
    return {"AutoProcessor": f"{kind.__module__}.{kind.__name__}"}


def find_joint_processor_class(named: str | None) -> type[ProcessorMixin]:
    """The class behind the `processor_class` of a saved processor of images and texts."""
    found = JOINT_PROCESSORS.get(str(named)) or getattr(transformers, str(named), None)
    if isinstance(found, type) and issubclass(found, ProcessorMixin):
        return found
    raise ValueError(f"expected a processor of transformers or one of {sorted(JOINT_PROCESSORS)}, got {named!r}")


def _torchvision_twin(pil_class: type) -> str | None:
    """`image_processing_x.X` for `image_processing_pil_x.XPil` when that source defines it."""
    module = pil_class.__module__.replace(".image_processing_pil_", ".image_processing_")
    name = pil_class.__name__.removesuffix("Pil")
    if module == pil_class.__module__ or importlib.util.find_spec(module) is None:
        return None
    tree = ast.parse(module_source(module).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return f"{module}.{name}" if name in defined else None
