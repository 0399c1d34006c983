"""Open an exported folder as a stranger would: a fresh process in which the package cannot be imported.

`check_bundle` runs this same file as a script, without the package: so the top imports nothing of vitweave.
"""

import importlib.abc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TIMEOUT_SECONDS = 1800


class PackageBlocker(importlib.abc.MetaPathFinder):
    """Makes one package impossible to import."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked: the bundle must load without it)")


def output_tensors(output: object, name: str = "output") -> dict[str, torch.Tensor]:
    """Every floating point tensor of a model output by its place, e.g. `output.feature_maps.0`, on the CPU."""
    if isinstance(output, torch.Tensor):
        return {name: output.detach().cpu().contiguous().clone()} if output.is_floating_point() else {}
    if isinstance(output, dict):
        items = output.items()
    else:
        items = enumerate(output) if isinstance(output, tuple | list) else ()
    return {k: v for key, part in items for k, v in output_tensors(part, f"{name}.{key}").items()}


def to_model(inputs: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The inputs on the model's device, floating point ones in its dtype."""
    reference = next(model.parameters())
    return {
        name: value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def check_bundle(
    folder: Path,
    work: Path,
    auto_class: str,
    package: str,
    inputs: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    tolerance: float = 1e-4,
) -> None:
    """Load `folder` where `package` cannot be imported, and compare the outputs.

    Args:
        folder: the exported folder.
        work: an empty folder for the exchange with the other process.
        auto_class: the Auto class to load with, e.g. "AutoModelForImageClassification".
        inputs: tensors of the forward pass; expected: what `output_tensors` gave for them.
        tolerance: largest difference, relative to the largest value of a tensor (at least 1).
    """
    save_file(inputs, work / "inputs.safetensors")
    job = {"folder": str(folder), "package": package, "auto_class": auto_class, "work": str(work), "path": sys.path}
    (work / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).resolve()), str(work / "job.json")],
        env=os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=work,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the exported folder does not load without {package}: {reason}")
    _compare(expected, load_file(work / "outputs.safetensors"), tolerance)


def tolerance_of(model: torch.nn.Module) -> float:
    """How far outputs may differ, relative to the largest: in the last digits where both processes compute alike.

    The other process runs on the CPU with the default attention. Half precision and the TF32 convolutions of a GPU keep
    two or three digits; lost or exchanged weights change the first.
    """
    parameter = next(model.parameters())
    return 1e-4 if parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64) else 5e-2


def _compare(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor], tolerance: float) -> None:
    if expected.keys() != got.keys():
        raise RuntimeError(f"the exported model returns {sorted(got)}, the original {sorted(expected)}")
    for name, value in expected.items():
        scale = max(1.0, value.double().abs().max().item())
        difference = (value.double() - got[name].double()).abs().max().item()
        if not difference <= tolerance * scale:
            raise RuntimeError(f"{name} of the exported model differs by {difference:.3g} from the original")


def open_bundle(folder: str, auto_class: str) -> torch.nn.Module:
    """Load the model, every other class of the `auto_map` and the image processors from the folder's own code."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    # trust_remote_code: this very code was written by the process that started this one, for this check
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    classes = {auto: get_class_from_dynamic_module(ref, folder) for auto, ref in config.auto_map.items()}
    options = {"config": config, "output_loading_info": True}
    if auto_class == "AutoBackbone":  # AutoBackbone.from_pretrained asks the Hub even for a folder
        model, loading = classes[auto_class].from_pretrained(folder, **options)
    else:
        auto = getattr(transformers, auto_class)
        model, loading = auto.from_pretrained(folder, trust_remote_code=True, **options)
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise RuntimeError(f"{problem}: {sorted(map(str, loading[problem]))[:3]}")
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"the model came from {type(model).__module__}, not from the exported folder")
    for backend, reference in own_processors(Path(folder)).items():
        processor_class = get_class_from_dynamic_module(reference, folder)
        if backend != "torchvision" or transformers.utils.is_torchvision_available():
            processor_class.from_pretrained(folder)
    open_joint_processor(Path(folder))
    return model


def open_joint_processor(folder: Path) -> None:
    """Load the processor of images and texts, if the folder has one of its own, by its own code."""
    from transformers.models.auto.processing_auto import AutoProcessor

    path = folder / "processor_config.json"
    if not path.exists() or "auto_map" not in json.loads(path.read_text()):
        return
    processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)  # as above
    for part in (processor, processor.image_processor):
        if not type(part).__module__.startswith("transformers_modules."):
            raise RuntimeError(f"the processor came from {type(part).__module__}, not from the exported folder")


def own_processors(folder: Path) -> dict[str, str]:
    """backend -> class of the bundle; AutoImageProcessor itself needs torchvision in older transformers."""
    path = folder / "preprocessor_config.json"
    auto_map = json.loads(path.read_text()).get("auto_map", {}) if path.exists() else {}
    found = auto_map.get("AutoImageProcessor", {})
    return found if isinstance(found, dict) else {"the saved one": found}  # saving again keeps one class


def main(job_file: str) -> None:
    """The other process: load, run, leave the outputs beside the job."""
    job = json.loads(Path(job_file).read_text())
    sys.path[:] = [entry for entry in job["path"] if entry]
    sys.meta_path.insert(0, PackageBlocker(job["package"]))
    model = open_bundle(job["folder"], job["auto_class"]).eval()
    work = Path(job["work"])
    with torch.no_grad():
        output = model(**to_model(load_file(work / "inputs.safetensors"), model))
    save_file(output_tensors(output), work / "outputs.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
