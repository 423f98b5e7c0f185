"""Fingerprints of the code on which the results of a training depend.

The code consists of the modules that define the classes of the training's objects and of all modules they import, at
the top level or inside functions. A module's fingerprint is a hash of its syntax tree without docstrings and comments.
`from package import name` is resolved to the module that defines the name, not to all imports of the package's
__init__.
"""

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import nn

# The dump of a syntax tree depends on the Python version.
FORMAT = f"syntax trees 1, Python {sys.version_info.major}.{sys.version_info.minor}"
# Modules that do not affect the results.
UNRELATED = ("src.errors", "src.runs")
# Longer sequences are assumed to hold data, of which only this many elements are searched.
MOST_PARTS = 100


def code_fingerprints(
    objects: Iterable[Any], packages: Sequence[str] = ("src",), assembly: Sequence[str] = ()
) -> dict[str, Any]:
    """Fingerprints of the modules on which objects depend.

    Args:
        objects: for example a LightningModule and a data module; their attributes are included recursively.
        packages: only modules of these packages are included.
        assembly: modules that build the objects; what they import does not count.

    Returns:
        {"format": `FORMAT`, "modules": {name: start of the SHA-256 of its syntax tree}, "assembly": the same}.
    """
    found: set[str] = set()
    todo = modules_of(objects, packages)
    while todo:
        name = todo.pop()
        if name not in found and _source(name) is not None:
            found.add(name)
            todo |= {other for other in imports_of(name) if _counts(other, packages)}
    return {
        "format": FORMAT,
        "modules": {name: _parsed(name).digest for name in sorted(found)},
        "assembly": {name: _parsed(name).digest for name in assembly},
    }


def modules_of(objects: Iterable[Any], packages: Sequence[str]) -> set[str]:
    """The modules of the packages that define the classes of objects and, recursively, of their attributes."""
    found: set[str] = set()
    seen: dict[int, Any] = {}
    todo = list(objects)
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, partial):
            todo += [part.func, part.args, part.keywords]
        elif isinstance(part, dict):
            todo += islice(part.values(), MOST_PARTS)
        elif isinstance(part, list | tuple):
            todo += islice(part, MOST_PARTS)
        elif isinstance(part, type | FunctionType):
            found.add(part.__module__)
        elif _counts(type(part).__module__, packages) or isinstance(part, nn.Module):
            found.add(type(part).__module__)
            todo += vars(part).values() if hasattr(part, "__dict__") else ()
            todo += part.children() if isinstance(part, nn.Module) else ()
    return {name for name in found if _counts(name, packages)}


def imports_of(module: str) -> set[str]:
    """The modules that a module imports, anywhere in its source."""
    found = set()
    for node in _parsed(module).imports:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {_home(_absolute(node, module), alias.name) for alias in node.names}
    return found


def _counts(name: str, packages: Sequence[str]) -> bool:
    def within(parents: Sequence[str]) -> bool:
        return any(name == parent or name.startswith(f"{parent}.") for parent in parents)

    return within(packages) and not within(UNRELATED)


def _home(module: str, name: str) -> str:
    """The module that defines the `name` of `from module import name`."""
    source = _source(module)
    if source is None or source.name != "__init__.py":
        return module
    if _source(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    for node in _parsed(module).imports:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _home(_absolute(node, module), alias.name)
    return module


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module in a `from ... import` statement of `module`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    depth = node.level - (_source(module).name == "__init__.py")
    return ".".join([*parts[: len(parts) - depth], *([node.module] if node.module else [])])


def _source(module: str) -> Path | None:
    """The source file of a module; None if it has none or does not exist."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@dataclass(frozen=True)
class Parsed:
    """What is kept of a source file: the digest of its syntax tree, and its imports."""

    digest: str
    imports: tuple[ast.Import | ast.ImportFrom, ...]


def _parsed(module: str) -> Parsed:
    return _parse(_source(module).read_bytes())


@cache
def _parse(source: bytes) -> Parsed:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = list(_without_texts(body)) or [ast.Pass()]
    imports = tuple(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return Parsed(sha256(ast.dump(tree).encode()).hexdigest()[:12], imports)


def _without_texts(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not (text and isinstance(statement.value.value, str)):
            yield statement
