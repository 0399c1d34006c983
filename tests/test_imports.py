"""The source keeps its shape: imports point one way, importing is light, files and functions stay short."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "vitweave").rglob("*.py"))

# part -> the parts it may import besides itself
ARROWS = {
    "configuration": set(),
    "processing": {"configuration"},
    "modeling": {"configuration"},
    "training": {"configuration", "modeling", "processing"},
}
# push_to_hub(with_code=True) is a method of the models; its import waits inside the method
DOORS = {"modeling/pretrained.py": {"vitweave.hub.export"}}
PRINTING = (
    "cli.py",
    "cli_compare.py",
    "cli_convert.py",
    "cli_compare_encoders.py",
    "cli_cost.py",
    "cli_search.py",
    "cli_search_fusion.py",
    "cli_specialize.py",
    "command.py",
)  # what stands behind the `vitweave` command
# folders whose files know nothing of each other; only their registry.py may import them all
FAMILIES = ("heads", "layer_fusion", "encoder_fusion", "modality_fusion")
SHARED = ("base", "registry", "__init__")
HEAVY = ("datasets", "evaluate", "peft", "transformers.trainer", "matplotlib", "torchvision", "timm")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def every_file(check: Callable[[Path], None]) -> Callable[[], None]:
    """One test of all files: as one test for each they would be a third of all tests."""

    def test():
        failed = []
        for path in FILES:
            try:
                check(path)
            except AssertionError as error:
                failed.append(f"{path.relative_to(ROOT)}: {error}")
        assert not failed, "\n".join(failed)

    return test


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def part(path: Path) -> str:
    """The folder below vitweave/ that a file lies in, or its own name: configuration, modeling, ..., cli."""
    inner = path.relative_to(ROOT / "vitweave")
    return inner.parts[0].removesuffix(".py")


def own_imports(tree: ast.Module) -> list[str]:
    """Every `vitweave...` module a file imports, at the top or inside a function."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if name.split(".")[0] == "vitweave"]


def wrong_arrows(path: Path, tree: ast.Module) -> list[str]:
    """Imports that point against ARROWS."""
    if part(path) not in ARROWS:
        return []  # __init__, auto, hub, analysis and cli stand on top
    allowed = ARROWS[part(path)] | {part(path)}
    doors = DOORS.get(path.relative_to(ROOT / "vitweave").as_posix(), set())
    names = [name for name in own_imports(tree) if name not in doors]
    return [name for name in names if name.partition(".")[2].split(".")[0] not in allowed]


def sibling_imports(path: Path, tree: ast.Module) -> list[str]:
    """Members of a family that are imported by a file other than the family's registry."""
    found = []
    for name in own_imports(tree):
        parts = name.split(".")
        if len(parts) < 4 or parts[2] not in FAMILIES or parts[3].startswith(SHARED):
            continue
        if path.name != "registry.py" or path.parent.name != parts[2]:
            found.append(name)
    return found


def unreadable_imports(tree: ast.Module) -> list[str]:
    """Imports the hub export cannot rewrite: relative ones, `import vitweave.x`, and names taken from a package."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"line {node.lineno}: relative import")
        if isinstance(node, ast.Import) and any(alias.name.startswith("vitweave.") for alias in node.names):
            found.append(f"line {node.lineno}: import vitweave.x instead of from vitweave.x import y")
        own = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitweave"
        if own and (ROOT / (node.module.replace(".", "/"))).is_dir() and part_is_package(node):
            found.append(f"line {node.lineno}: import a name from the module that defines it")
    return found


def part_is_package(node: ast.ImportFrom) -> bool:
    """True if a name is taken from a package's __init__ instead of from the module that defines it."""
    folder = ROOT / node.module.replace(".", "/")
    return any(not (folder / f"{alias.name}.py").exists() for alias in node.names) and node.module != "vitweave"


def long_functions(tree: ast.Module) -> list[str]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{n.name} ({n.end_lineno - n.lineno + 1} lines)": n.end_lineno - n.lineno + 1 for n in functions}
    return [name for name, length in lengths.items() if length > MAX_FUNCTION_LINES]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes at the top of a module that have no docstring."""
    kinds = ast.FunctionDef | ast.ClassDef
    return [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and not ast.get_docstring(n)]


def forbidden_statements(tree: ast.Module) -> list[str]:
    """asserts, and calls that no library code makes."""
    found = [f"line {n.lineno}: assert" for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(f"line {node.lineno}: {node.func.id}")
    return found


@every_file
def test_imports_point_one_way(path):
    assert not wrong_arrows(path, parse(path))


@every_file
def test_only_the_registry_imports_the_members_of_a_family(path):
    assert not sibling_imports(path, parse(path))


@every_file
def test_the_hub_export_can_rewrite_every_import(path):
    assert not unreadable_imports(parse(path))


@every_file
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    assert not long_functions(parse(path))


@every_file
def test_public_names_have_docstrings(path):
    tree = parse(path)
    assert not undocumented(tree)
    assert ast.get_docstring(tree) or not tree.body


@every_file
def test_no_asserts_prints_or_loose_ends(path):
    text, tree = path.read_text(encoding="utf-8"), parse(path)
    assert not forbidden_statements(tree)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
    assert not prints or path.name in PRINTING


@every_file
def test_annotations_stay_objects_where_configs_are_checked(path):
    """`from __future__ import annotations` switches the type checks of strict configs off."""
    if part(path) in ("configuration", "modeling"):
        futures = [n for n in ast.walk(parse(path)) if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        assert not futures


def test_the_checks_above_can_fail():
    """Each check finds what it is for in a file that breaks every rule."""
    bad = ast.parse(
        "from vitweave.training.x import a\n"
        "from vitweave.modeling.heads.linear import b\n"
        "from . import c\n"
        "import vitweave.cli\n"
        "def f():\n    assert eval('1')\n" + "    pass\n" * MAX_FUNCTION_LINES
    )
    path = ROOT / "vitweave" / "configuration" / "bad.py"
    assert len(wrong_arrows(path, bad)) == 3
    assert sibling_imports(path, bad) == ["vitweave.modeling.heads.linear"]
    assert len(unreadable_imports(bad)) == 2
    assert long_functions(bad) and undocumented(bad) == ["f"] and len(forbidden_statements(bad)) == 2


def test_no_machine_paths_in_the_repository():
    pattern = re.compile(r"(?<![\w.])/(?:work|opt|root|home|tmp|Users)/\w")
    suffixes = {".py", ".md", ".cfg", ".toml", ".txt", ".cff", ".json", ".yaml", ".yml", ".in", ""}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in tracked.stdout.splitlines()]
    files = [path for path in files if path.suffix in suffixes and path.is_file()]
    found = {path.name: pattern.findall(path.read_text(encoding="utf-8", errors="ignore")) for path in files}
    assert not {name: hits for name, hits in found.items() if hits}


LIGHT_IMPORT = """
import importlib, json, socket, sys

def refuse(*args, **kwargs):
    raise RuntimeError("importing vitweave opened a connection")

socket.socket.connect = socket.getaddrinfo = refuse
heavy, modules = json.loads(sys.argv[1])
import vitweave
loaded = [name for name in heavy if name in sys.modules]
if loaded:
    sys.exit(f"importing vitweave also imported {loaded}")
for module in modules:
    importlib.import_module(module)
"""


def import_offline(modules: list[str]) -> None:
    command = [sys.executable, "-c", LIGHT_IMPORT, json.dumps([HEAVY, modules])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_is_light_and_offline():
    """`import vitweave` loads no training or plotting library."""
    import_offline([])


@pytest.mark.slow
def test_every_module_imports_offline_whatever_came_before_it():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in reversed(FILES)]
    import_offline([name.removesuffix(".__init__") for name in modules])
