"""What published code may import, read from the bundles themselves; and a bundle has the same bytes every time."""

import ast
import functools
import os
import subprocess
import sys

import pytest

from vitweave.auto import FAMILIES
from vitweave.hub.flatten import flatten

# Written out here, so that widening the library's own list is seen by a test.
LIBRARIES = {"torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub"}
OPTIONAL = {"torchvision"}
STANDARD = {"collections", "contextlib", "copy", "dataclasses", "difflib", "enum", "functools", "inspect", "itertools"}
STANDARD |= {
    "json",
    "logging",
    "math",
    "numbers",
    "os",
    "pathlib",
    "random",
    "re",
    "shutil",
    "tempfile",
    "types",
    "typing",
    "warnings",
}
parsed = functools.cache(ast.parse)  # bundles share most of their files
MODULES = sorted({model.__module__ for _, models, _ in FAMILIES for model in models.values()})


@pytest.fixture(scope="module")
def bundles() -> dict:
    return {module: flatten([module]) for module in MODULES}


def test_every_bundle_imports_from_the_list_alone(bundles):
    for module, bundle in bundles.items():
        for name, text in bundle.files.items():
            for node in ast.walk(parsed(text)):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1 and f"{node.module}.py" in bundle.files, (module, name, node.module)
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    found = [node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
                    tops = {one.partition(".")[0] for one in found}
                    assert tops <= LIBRARIES | OPTIONAL | STANDARD, (module, name, sorted(tops))


CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "importlib.import_module"}


def test_no_bundle_calls_what_runs_other_code(bundles):
    texts = {name: text for bundle in bundles.values() for name, text in bundle.files.items()}
    for name, text in texts.items():
        called = {ast.unparse(node.func) for node in ast.walk(parsed(text)) if isinstance(node, ast.Call)}
        assert not called & CALLS, name


EXPORT = """
import sys
import torch
from transformers import BitImageProcessorPil
from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.export import export
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
torch.manual_seed(0)
tiny = SpecializedViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28)
model = DensePredictorForSemanticSegmentation(DensePredictorConfig(backbone_config=tiny, num_labels=3))
export(model, sys.argv[1], BitImageProcessorPil(), verify=False, name="someone/model")
"""


@pytest.mark.slow
def test_an_export_has_the_same_bytes_in_every_process(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", EXPORT, str(folder)], env=environment, check=True, capture_output=True)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first.keys() == second.keys() and {"model.safetensors", "README.md", "config_entries.py"} < first.keys()
    assert not [name for name in first if first[name] != second[name]]
