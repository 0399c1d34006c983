"""Flatten modules of a package into one folder of files that load with transformers alone.

transformers copies remote code by scanning text: every line that reads `from .x import y` names a file `x.py` beside
it. So each own import becomes exactly such a line, and the modules of all depths become neighbours.

What the source has to look like (everything else is refused with the file and the line):
- own imports are absolute and name the defining module: `from vitweave.modeling.tokens import split_prefix`;
- other imports come from `ALLOWED_PACKAGES`, or, behind `try:` or `if is_..._available():`, from `GUARDED_PACKAGES`;
- a module of `LIBRARY_ONLY` (publishing, training, conversion) is imported inside a function, if at all. It stays out
  of the bundle: there the import raises an error that asks for the package.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# fmt: off
ALLOWED_PACKAGES = frozenset((
    "torch", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub",
    "__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "difflib", "enum", "fractions",
    "functools", "hashlib", "inspect", "itertools", "json", "logging", "math", "numbers", "operator", "os", "pathlib",
    "random", "re", "shutil", "statistics", "string", "tempfile", "textwrap", "types", "typing", "warnings", "weakref",
))
# fmt: on
GUARDED_PACKAGES = frozenset({"torchvision"})
LIBRARY_ONLY = ("analysis", "auto", "cli", "hub", "training", "modeling.conversion", "modeling.specialize")
FORBIDDEN_CALLS = frozenset({"eval", "exec", "__import__"})

# What transformers' loader takes for a relative import, wherever it stands in the text (docstrings included).
READS_AS_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", flags=re.MULTILINE)


@dataclass(frozen=True)
class OwnImport:
    """One `from package.module import names` of a source file."""

    node: ast.ImportFrom
    bundled: bool  # False: the module is library-only, the import becomes an error


@dataclass(frozen=True)
class SourceModule:
    """A module of the package with its own imports, already checked."""

    name: str  # dotted
    text: str
    imports: tuple[OwnImport, ...]


@dataclass(frozen=True)
class Bundle:
    """Flattened code."""

    files: dict[str, str]  # file name -> source text, e.g. {"tokens.py": "..."}
    names: dict[str, str]  # dotted module -> flat module, e.g. {"vitweave.modeling.tokens": "tokens"}

    def reference(self, dotted: str) -> str:
        """`vitweave.modeling.modeling_x.XModel` as an `auto_map` names it: `modeling_x.XModel`."""
        module, _, class_name = dotted.rpartition(".")
        return f"{self.names[module]}.{class_name}"


def flatten(entries: list[str], package: str = "vitweave") -> Bundle:
    """Flatten the modules named in `entries` and all they import from their own package.

    Args:
        entries: dotted module names, e.g. `["vitweave.modeling.modeling_specialized_vit"]`.
        package: the package they belong to.
    """
    modules: dict[str, SourceModule] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in modules:
            modules[name] = _read_module(name, package)
            waiting.extend(own.node.module for own in modules[name].imports if own.bundled)
    names = flat_names(modules, package)
    return Bundle({f"{names[name]}.py": _rewrite(modules[name], names, package) for name in sorted(modules)}, names)


def flat_names(modules: Iterable[str], package: str = "vitweave") -> dict[str, str]:
    """Name each dotted module without dots, uniquely.

    `vitweave.modeling.tokens` is `tokens` and `vitweave.modeling.layer_fusion.concat` is `layer_fusion_concat`: what
    follows the package and its first folder. Only names that would clash keep the first folder too.
    """
    parts = {module: module.removeprefix(package + ".").split(".") for module in modules}
    names = {module: "_".join(path[1:] or path) for module, path in parts.items()}
    taken = list(names.values())
    names = {m: name if taken.count(name) == 1 else "_".join(parts[m]) for m, name in names.items()}
    clashes = sorted(m for m, name in names.items() if list(names.values()).count(name) > 1)
    if clashes:
        raise ValueError(f"the modules {clashes} would share one flat file name; rename one of them")
    return names


def module_source(name: str) -> Path:
    """The source file of a dotted module, found without running it; a package is refused."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"cannot find the source of module {name!r}")
    if spec.submodule_search_locations is not None:
        raise ValueError(f"{name} is a package; import from the module that defines the name instead")
    return Path(spec.origin)


def _read_module(name: str, package: str) -> SourceModule:
    path = module_source(name)
    text = path.read_text(encoding="utf-8")
    imports = []
    tree = ast.parse(text, filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            raise ValueError(f"{name}, line {node.lineno}: {node.func.id}() has no place in published code")
    for node, guarded, in_function in _walk_imports(tree):
        try:
            if _is_own(node, package):
                imports.append(_check_own_import(node, in_function, text, package))
            else:
                _check_foreign_import(node, guarded)
        except ValueError as error:
            raise ValueError(f"{name}, line {node.lineno}: {error}") from None
    return SourceModule(name, text, tuple(imports))


def _walk_imports(
    node: ast.AST, guarded: bool = False, in_function: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Each import with whether it is optional (as transformers sees it) and whether it stands inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, guarded, in_function
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _walk_imports(child, guarded or _is_guard(child), inside)


def _is_guard(node: ast.AST) -> bool:
    """`try:` or `if is_torchvision_available():`, where transformers' loader does not require the import."""
    if isinstance(node, ast.Try):
        return True
    if not isinstance(node, ast.If):
        return False
    called = [n.func.id for n in ast.walk(node.test) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return any(name.startswith("is_") and name.endswith("_available") for name in called)


def _is_own(node: ast.Import | ast.ImportFrom, package: str) -> bool:
    targets = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    relative = isinstance(node, ast.ImportFrom) and node.level > 0
    return relative or any(target.partition(".")[0] == package for target in targets)


def _check_own_import(node: ast.Import | ast.ImportFrom, in_function: bool, text: str, package: str) -> OwnImport:
    wanted = f"write `from {package}.module import name`"
    if isinstance(node, ast.Import):
        raise ValueError(f"`{ast.unparse(node)}` cannot be flattened; {wanted}")
    if node.level > 0:
        raise ValueError(f"`{ast.unparse(node)}` is relative; {wanted}")
    if node.names[0].name == "*":
        raise ValueError(f"`{ast.unparse(node)}` hides which names are needed; {wanted}")
    lines = text.splitlines()
    before = lines[node.lineno - 1].encode()[: node.col_offset].strip()
    after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].strip()
    if before or (after and not after.startswith(b"#")):
        raise ValueError(f"`{ast.unparse(node)}` must stand on a line of its own")
    below = node.module.removeprefix(package).removeprefix(".")
    if any(below == part or below.startswith(part + ".") for part in LIBRARY_ONLY):
        if not in_function:
            raise ValueError(
                f"{node.module} never belongs to published code; import it inside the function that needs it"
            )
        return OwnImport(node, bundled=False)
    module_source(node.module)  # refuses a package's __init__, from which nothing can be flattened
    return OwnImport(node, bundled=True)


def _check_foreign_import(node: ast.Import | ast.ImportFrom, guarded: bool) -> None:
    targets = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    if node.names[0].name == "*":
        raise ValueError(f"`{ast.unparse(node)}` hides which names are needed; import them by name")
    for top in (target.partition(".")[0] for target in targets):
        if top in GUARDED_PACKAGES and not guarded:
            raise ValueError(
                f"`{ast.unparse(node)}` must stand under `if is_{top}_available():`; not everybody has {top}"
            )
        if top not in ALLOWED_PACKAGES | GUARDED_PACKAGES:
            raise ValueError(
                f"`{ast.unparse(node)}`: published code may import torch, transformers, numpy, PIL, safetensors,"
                f" huggingface_hub and a safe part of the standard library, not {top!r}; move what needs it to one of"
                f" {', '.join(LIBRARY_ONLY)} and import it inside a function"
            )


def _rewrite(module: SourceModule, names: dict[str, str], package: str) -> str:
    """The module's text with its own imports made relative, checked against what transformers' loader will read."""
    lines = module.text.splitlines()
    for own in sorted(module.imports, key=lambda own: own.node.lineno, reverse=True):
        node = own.node
        if own.bundled:
            imported = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in node.names)
            statement = f"from .{names[node.module]} import {imported}"
        else:
            statement = f'raise ImportError("this needs {node.module}, which is not bundled: pip install {package}")'
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + statement]
    text = "\n".join(lines) + "\n"
    imported = {names[own.node.module] for own in module.imports if own.bundled}
    for match in READS_AS_IMPORT.finditer(text):
        if (match[1] or match[2]) not in imported:
            raise ValueError(
                f"{module.name}: the text {match[0].strip()!r} (in a docstring or a string) reads like an import to"
                " transformers' loader, which then looks for that file; word it differently"
            )
    ast.parse(text)
    version = getattr(sys.modules.get(package), "__version__", "")
    return f"# {module.name}, {package} {version}".rstrip() + f": flattened to load without {package}.\n{text}"
