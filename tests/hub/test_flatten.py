"""Modules of a package become neighbours in one folder, or are refused with the reason."""

import ast
import re
import sys
import textwrap

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from vitweave.hub.flatten import flat_names, flatten

# What each module of the small package says.
TOY = {
    "modeling/modeling_toy.py": '''
        """A model."""

        import torch
        from toyweave.modeling.blocks.mlp import (
            WIDTH,
            Mlp as Block,  # renamed here
        )


        def build():
            from toyweave.configuration.configuration_toy import ToyConfig  # late, because of a cycle

            return ToyConfig, Block, WIDTH, torch.ones(1)


        def push():
            from toyweave.hub.export import push

            return push
    ''',
    "modeling/blocks/mlp.py": "from toyweave.modeling.blocks.base import Mlp\n\nWIDTH = 4\n",
    "modeling/blocks/base.py": "class Mlp:\n    pass\n",
    "modeling/unused.py": "import os\n",
    "configuration/configuration_toy.py": "class ToyConfig:\n    pass\n",
    "hub/export.py": "import subprocess\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Write the toy package, with some files changed, and give the function that flattens its model."""

    def write(**changes):
        for name, text in (TOY | changes).items():
            path = tmp_path / "toyweave" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        for folder in (tmp_path / "toyweave").rglob("*"):
            if folder.is_dir():
                (folder / "__init__.py").touch()
        (tmp_path / "toyweave" / "__init__.py").touch()
        return flatten(["toyweave.modeling.modeling_toy"], package="toyweave")

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyweave"]:
        del sys.modules[name]


def with_model(text):
    return {"modeling/modeling_toy.py": text}


def test_only_the_needed_modules_are_taken_and_named_without_folders(toy):
    assert sorted(toy().files) == ["blocks_base.py", "blocks_mlp.py", "configuration_toy.py", "modeling_toy.py"]


def test_own_imports_become_one_relative_line_each(toy):
    text = toy().files["modeling_toy.py"]
    assert re.findall(r"^ *from \..*$", text, flags=re.MULTILINE) == [
        "from .blocks_mlp import WIDTH, Mlp as Block",
        "    from .configuration_toy import ToyConfig",
    ]
    assert "import torch\n" in text


def test_transformers_loader_finds_exactly_the_files_of_the_bundle(toy, tmp_path):
    bundle = toy()
    for name, text in bundle.files.items():
        (tmp_path / name).write_text(text)
    found = {name: set(get_relative_imports(tmp_path / name)) for name in bundle.files}
    assert found["modeling_toy.py"] == {"blocks_mlp", "configuration_toy"}
    assert found["blocks_mlp.py"] == {"blocks_base"}
    assert get_imports(tmp_path / "modeling_toy.py") == ["torch"]  # and not the toy package
    assert bundle.reference("toyweave.modeling.blocks.mlp.Mlp") == "blocks_mlp.Mlp"


def test_a_library_only_import_becomes_an_error_that_names_the_package(toy):
    tree = ast.parse(toy().files["modeling_toy.py"])
    (push,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "push")
    assert ast.unparse(push.body[0]) == (
        "raise ImportError('this needs toyweave.hub.export, which is not bundled: pip install toyweave')"
    )


def test_names_that_would_clash_keep_their_first_folder():
    modules = ["vitweave.modeling.layer_fusion.concat", "vitweave.modeling.encoder_fusion.concat"]
    assert list(flat_names(modules).values()) == ["layer_fusion_concat", "encoder_fusion_concat"]
    modules = ["vitweave.modeling.masks", "vitweave.processing.masks", "vitweave.modeling.tokens"]
    assert list(flat_names(modules).values()) == ["modeling_masks", "processing_masks", "tokens"]
    with pytest.raises(ValueError, match="share one flat file name"):
        flat_names(["vitweave.a.b_c", "vitweave.a.b.c", "vitweave.a_b.c", "vitweave.x.c"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import toyweave.modeling.blocks.mlp\n", "cannot be flattened; write `from toyweave.module import name`"),
        ("from .blocks.mlp import Mlp\n", "is relative"),
        ("from toyweave.modeling.blocks.mlp import *\n", "hides which names"),
        ("from torch import *\n", "hides which names"),
        ("from toyweave.modeling.blocks import mlp\n", "is a package; import from the module that defines"),
        ("from toyweave import __version__\n", "is a package"),
        ("from toyweave.modeling.absent import x\n", "cannot find the source"),
        ("from toyweave.modeling.blocks.mlp import Mlp; x = 1\n", "line of its own"),
        ("if True: from toyweave.modeling.blocks.mlp import Mlp\n", "line of its own"),
        ("from toyweave.hub.export import push\n", "never belongs to published code"),
        ("import subprocess\n", "not 'subprocess'"),
        ("def f():\n    import peft\n", "line 2: `import peft`: published code may import torch"),
        ("import torchvision\n", "must stand under `if is_torchvision_available"),
        ("x = eval('1')\n", r"eval\(\) has no place"),
        ('"""Like\n\n    from .vit import Model\n"""\n', "reads like an import"),
        ('"""Write\n    import .vit\n"""\n', "reads like an import"),
    ],
)
def test_what_cannot_be_published_is_refused(toy, text, reason):
    with pytest.raises(ValueError, match=reason):
        toy(**with_model(text))


def test_an_error_names_the_file_and_the_line(toy):
    with pytest.raises(ValueError, match=r"toyweave\.modeling\.blocks\.base, line 3: `import socket`"):
        toy(**{"modeling/blocks/base.py": "import math\n\nimport socket\n"})


@pytest.mark.parametrize("guard", ["try", "if"])
def test_torchvision_may_be_imported_where_it_is_optional(toy, guard):
    head = {
        "try": "try:",
        "if": "from transformers.utils import is_torchvision_available\nif is_torchvision_available():",
    }
    tail = {"try": "except ImportError:\n    torchvision = None\n", "if": ""}
    text = f"{head[guard]}\n    import torchvision\n{tail[guard]}"
    assert "    import torchvision\n" in toy(**with_model(text)).files["modeling_toy.py"]


def test_cyclic_imports_end(toy):
    config = "def model():\n    from toyweave.modeling.modeling_toy import build\n\n    return build\n"
    files = toy(**{"configuration/configuration_toy.py": config}).files
    assert "    from .modeling_toy import build\n" in files["configuration_toy.py"]
