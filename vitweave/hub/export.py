"""Export a model as a folder that loads with transformers alone, and push it to the Hub."""

import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import ImageProcessingMixin, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from vitweave.configuration.config_entries import without_auto_map
from vitweave.configuration.image_tokens import count_image_tokens
from vitweave.hub.card import CARD_FILE, CardInfo, model_card
from vitweave.hub.checksums import write_sums
from vitweave.hub.families import (
    Family,
    auto_class_of,
    find_family,
    find_joint_processor_class,
    find_processor_class,
    joint_processor_references,
    processor_references,
)
from vitweave.hub.flatten import flatten
from vitweave.hub.verify_bundle import check_bundle, output_tensors, to_model, tolerance_of
from vitweave.training.modes import evaluating

PROCESSOR_FILE = "preprocessor_config.json"
JOINT_PROCESSOR_FILE = "processor_config.json"


def export(
    model: PreTrainedModel,
    folder: str | Path,
    processor: object | None = None,
    card: CardInfo | None = None,
    *,
    overwrite: bool = False,
    verify: bool = True,
    example_inputs: dict[str, torch.Tensor] | None = None,
    name: str | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write weights, config, processor, flattened code and card into a folder that needs no vitweave to load.

    Everything is written beside `folder` first, loaded back in a process that cannot import vitweave and compared with
    the model's outputs; only then is it moved into place. A failure leaves `folder` as it was.

    Args:
        model: a model of vitweave, e.g. from `DensePredictorForSemanticSegmentation.from_pretrained(...)`.
        processor: its image processor, or its processor of images and texts, one of vitweave or of transformers;
            without it no pipeline can use the folder.
        card: what the README says beyond the facts of the config.
        overwrite: replace `folder` when it already holds a model.
        verify: load back and compare; `example_inputs` are the tensors of the forward pass to compare with
            (default: one random image of the config's size, and random texts for a model that reads them).
        name: what the card's loading lines say, the repository's name when pushing (default: the folder's name).

    Returns:
        The folder's path.
    """
    folder = Path(folder).absolute()
    family = _exportable(model)
    _check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        staging = Path(work) / folder.name
        staging.mkdir()
        write_bundle(model, staging, family, processor, card or CardInfo(), name or folder.name, max_shard_size)
        if verify:
            _verify(model, staging, Path(work), family, example_inputs)
        _move_into_place(staging, folder, Path(work))
    return folder


def write_bundle(
    model: PreTrainedModel,
    folder: Path,
    family: Family,
    processor: object | None,
    info: CardInfo,
    name: str,
    max_shard_size: int | str,
) -> None:
    """Write the files of an export into an empty folder."""
    auto_class = auto_class_of(model, family)
    # the Auto classes whose code the model itself needs: no other file is copied when a user saves the model again
    needed = flatten([type(model).__module__], family.package).names
    classes = {"AutoConfig": family.config_class} | family.models
    references = {
        auto: f"{kind.__module__}.{kind.__name__}" for auto, kind in classes.items() if kind.__module__ in needed
    }
    image_processor = getattr(processor, "image_processor", processor)
    backends = {} if processor is None else processor_references(image_processor)
    joint = {} if image_processor is processor else joint_processor_references(processor)
    read = (*references.values(), *backends.values(), *joint.values())
    modules = sorted({ref.rpartition(".")[0] for ref in read})
    bundle = flatten(modules, family.package)

    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _rewrite_json(folder / "config.json", {auto: bundle.reference(ref) for auto, ref in references.items()})
    if processor is not None:
        image_processor.save_pretrained(folder)
        flat = {backend: bundle.reference(ref) for backend, ref in backends.items()}
        _rewrite_json(folder / PROCESSOR_FILE, {"AutoImageProcessor": flat} if flat else {})
    if image_processor is not processor:
        processor.save_pretrained(folder)
        auto_map = {auto: bundle.reference(ref) for auto, ref in joint.items()}
        # without the copy of the image processor's settings, whose own file knows where its code is
        _rewrite_json(folder / JOINT_PROCESSOR_FILE, auto_map, drop=("image_processor",))
    for file_name, text in bundle.files.items():
        (folder / file_name).write_text(text, encoding="utf-8")
    if info != CardInfo():
        info.save(folder)
    sums = write_sums(folder)
    model_card(model, auto_class, info, name, processor is not None, sums).save(folder / "README.md")


def push_to_hub_with_code(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processor: object | None = None,
    card: CardInfo | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    verify: bool = True,
    example_inputs: dict[str, torch.Tensor] | None = None,
) -> CommitInfo:
    """`push_to_hub` with the code beside the weights: export, load back in a clean process, upload.

    The options of `PreTrainedModel.push_to_hub` keep their meaning; the others are those of `export`. Nothing is
    created on the Hub unless the export has been verified.
    """
    info = CardInfo(**vars(card)) if card else CardInfo()
    info.tags = [*info.tags, *(tags or [])]
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / repo_id.rpartition("/")[2]
        options = {"verify": verify, "example_inputs": example_inputs, "max_shard_size": max_shard_size}
        export(model, folder, processor, info, name=repo_id, **options)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model with its code",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def load_model(source: str | Path) -> PreTrainedModel:
    """Load a saved vitweave model by the class its config names, which must be one of ours.

    An `auto_map` in the config is ignored, and no weight may be missing.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{source} holds no saved model: config.json is missing")
    if not path.is_dir() and (path.is_absolute() or path.exists() or len(path.parts) != 2):
        raise FileNotFoundError(f"expected a folder or a Hub id like 'someone/model', got {str(source)!r}")
    settings, _ = PreTrainedConfig.get_config_dict(source)
    family = find_family(settings.get("model_type"))
    known = {model_class.__name__: model_class for model_class in family.models.values()}
    named = (settings.get("architectures") or [None])[0]
    if named not in known:
        raise ValueError(f"config.json of {source} names the class {named!r}, expected one of {sorted(known)}")
    model, loading = known[named].from_pretrained(source, output_loading_info=True)
    unset = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if unset:
        raise ValueError(f"the weights in {source} lack {len(unset)} tensors of {named}, e.g. {unset[:3]}")
    return model.eval()


def load_processor(source: str | Path) -> ImageProcessingMixin | ProcessorMixin | None:
    """The saved processor or None. Its class is ours or transformers'; an `auto_map` is ignored."""
    path = cached_file(source, JOINT_PROCESSOR_FILE, _raise_exceptions_for_missing_entries=False)
    if path is not None:
        named = json.loads(Path(path).read_text(encoding="utf-8")).get("processor_class")
        return find_joint_processor_class(named).from_pretrained(source)
    path = cached_file(source, PROCESSOR_FILE, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    named = json.loads(Path(path).read_text(encoding="utf-8")).get("image_processor_type")
    return find_processor_class(named).from_pretrained(source)


def load_card(source: str | Path) -> CardInfo:
    """The `vitweave_card.json` saved beside a model, in a folder or on the Hub; an empty card when there is none."""
    path = cached_file(source, CARD_FILE, _raise_exceptions_for_missing_entries=False)
    return CardInfo() if path is None else CardInfo.load(path)


def _exportable(model: PreTrainedModel) -> Family:
    if hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("the model carries an adapter; export the model that merge_and_unload() returns")
    config = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"expected a vitweave model, got {type(model).__module__}.{type(model).__name__}")
    family = find_family(config.model_type)
    auto_class_of(model, family)
    return family


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty; choose another folder, or overwrite it (--force)")
    if not (folder / "config.json").exists():
        raise FileExistsError(f"{folder} holds no model (no config.json): not overwritten, choose another folder")


def _move_into_place(staging: Path, folder: Path, work: Path) -> None:
    """Swap the finished folder in; what stood there goes away with `work`, or comes back if the swap fails."""
    old = work / "replaced"
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(staging, folder)
    except OSError:
        if old.exists():
            shutil.move(old, folder)
        raise


def _rewrite_json(path: Path, auto_map: dict, drop: tuple[str, ...] = ()) -> None:
    """Put our own `auto_map` into a saved JSON; one that came along, here or in a nested config, is dropped."""
    settings = without_auto_map(json.loads(path.read_text(encoding="utf-8")))
    settings = {name: value for name, value in settings.items() if name not in drop}
    if auto_map:
        settings["auto_map"] = auto_map
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verify(
    model: PreTrainedModel, folder: Path, work: Path, family: Family, inputs: dict[str, torch.Tensor] | None
) -> None:
    inputs = inputs or random_inputs(model)
    with evaluating(model):
        expected = output_tensors(model(**to_model(inputs, model)))
    auto_class, tolerance = auto_class_of(model, family), tolerance_of(model)
    check_bundle(folder, work, auto_class, family.package, inputs, expected, tolerance)


def random_image(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """pixel_values (1, channels, height, width) of the size the config, or a config inside it, names; seeded."""
    size = _find(config, "image_size") or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(1, _find(config, "num_channels") or 3, height, width, generator=generator)}


def random_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A random image (of every modality) and, for a model that reads texts, random texts of eight tokens, or one with
    the placeholders of the image; seeded."""
    config, inputs = model.config, random_image(model.config)
    if hasattr(config, "modalities"):
        inputs["pixel_values"] = inputs["pixel_values"][:, None].repeat(1, len(config.modalities), 1, 1, 1)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    vocabulary = model.get_input_embeddings().num_embeddings
    inputs["input_ids"] = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    if hasattr(config, "image_token_id"):
        size = tuple(inputs["pixel_values"].shape[-2:])
        text = inputs["input_ids"][:1]
        text = text.masked_fill(text == config.image_token_id, 1 if config.image_token_id == 0 else 0)
        placeholders = torch.full((1, count_image_tokens(config, 1, size)), config.image_token_id)
        inputs["input_ids"] = torch.cat([placeholders, text], dim=1)
        inputs["image_sizes"] = torch.tensor([size])
    return inputs


def _find(config: PreTrainedConfig, name: str) -> object | None:
    value = getattr(config, name, None)
    nested = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return (
        value if value is not None or not nested else next(filter(None, (_find(part, name) for part in nested)), None)
    )
