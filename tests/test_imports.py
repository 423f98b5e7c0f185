"""The directions of imports that docs/design.md promises, read from the source files without running them."""

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
DOORS = ("train", "sample", "evaluate")
TOOLS = ("train_classifier", "fetch_inception")

# A room is a folder or a file directly in src/; which other rooms it may import, at the top or inside functions.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "randomness": set(),
    "memory": set(),
    "diffusion": {"errors", "randomness"},
    "model": {"errors", "randomness"},
    "data": {"errors", "randomness"},
    "metrics": {"errors", "randomness"},
    "interop": {"diffusion", "errors", "model"},
    "generation": {"data", "diffusion", "errors"},
    "pictures": {"data", "diffusion"},
    "configuration": {"errors"},
    "command_line": {"configuration", "errors", "sweep"},
    "sweep": {"command_line", "errors"},
    "run_folder": {"command_line", "errors", "sidecar"},
    "sidecar": {"errors"},
    "training": {
        "data",
        "diffusion",
        "errors",
        "generation",
        "metrics",
        "pictures",
        "randomness",
        "run_folder",
        "sidecar",
    },
}
JOINING = {"experiment", "loading", "nll", "tasks"}
"""The rooms that know all others."""

ONLY_IN = {
    "lightning": {"training", "data", "experiment"},
    "hydra": {"configuration", "command_line", "sweep", "experiment", "loading", "nll", *DOORS, *TOOLS},
    "omegaconf": {"configuration", "command_line", "sweep", "experiment", "loading", "nll", *DOORS, *TOOLS},
    "wandb": {"training", "train"},
    "torch_fidelity": {"metrics", "fetch_inception"},
    "diffusers": {"interop"},
}


@dataclass(frozen=True)
class Import:
    """One imported module: who imports it, its full name, and whether that happens as soon as the file is."""

    file: Path
    module: str
    at_top: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)} imports {self.module}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports(file: Path, text: str | None = None) -> list[Import]:
    """All imports of a file except those for type checkers only."""
    found: list[Import] = []
    package = module_name(file).split(".")[: None if file.name == "__init__.py" else -1]

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(file, alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.append(Import(file, whole if whole in MODULES else module, at_top))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not inside)

    visit(ast.parse(file.read_text() if text is None else text), True)
    return found


ALL = [one for file in FILES for one in imports(file)]


def room(name: str) -> str | None:
    """The room of a module of ours, None for other people's."""
    parts = name.split(".")
    return parts[1] if parts[0] == "src" and len(parts) > 1 else None


def between_rooms(found: list[Import]) -> Iterator[tuple[Import, str, str]]:
    for one in found:
        importer, imported = room(module_name(one.file)), room(one.module)
        if importer and imported and importer != imported:
            yield one, importer, imported


def test_the_reader_of_imports_sees_every_kind():
    file = SOURCE / "diffusion" / "sampler" / "ddim.py"
    text = (
        "from typing import TYPE_CHECKING\nimport torch.nn as nn\nfrom ..noise_level import NoiseLevel\n"
        "from .base import Sampler\nfrom src import errors\nfrom . import noise\n"
        "if TYPE_CHECKING:\n    import lightning\n"
        "class A:\n    import wandb\n    def f(self):\n        from src.data.stream import Batch\n"
    )
    assert {(one.module, one.at_top) for one in imports(file, text)} == {
        ("typing", True),
        ("torch.nn", True),
        ("src.diffusion.noise_level", True),
        ("src.diffusion.sampler.base", True),
        ("src.errors", True),
        ("src.diffusion.sampler.noise", True),
        ("wandb", True),
        ("src.data.stream", False),
    }


def test_every_room_is_known():
    rooms = {room(name) for name in MODULES} - {None}
    assert rooms <= set(MAY_IMPORT) | JOINING | set(DOORS) | set(TOOLS)


def test_rooms_import_only_what_they_may():
    broken = [
        str(one)
        for one, importer, imported in between_rooms(ALL)
        if importer in MAY_IMPORT and imported not in MAY_IMPORT[importer]
    ]
    assert not broken, broken


def test_the_four_rooms_import_none_of_one_another():
    four = {"diffusion", "model", "data", "metrics"}
    assert all(MAY_IMPORT[name].isdisjoint(four) for name in four)


def test_nobody_imports_a_door():
    broken = [str(one) for one, _, imported in between_rooms(ALL) if imported in (*DOORS, *TOOLS)]
    assert not broken, broken


def test_only_transforms_and_the_batch_leave_the_room_of_data():
    shared = {"src.data.transforms", "src.data.stream"}
    broken = [
        str(one)
        for one, importer, imported in between_rooms(ALL)
        if imported == "data" and importer in MAY_IMPORT and one.module not in shared
    ]
    assert not broken, broken


@pytest.mark.parametrize("name", ["diffusion", "model"])
def test_mathematics_and_networks_need_torch_only(name):
    foreign = [
        str(one)
        for one in ALL
        if room(module_name(one.file)) == name
        and one.module.split(".")[0] not in (*sys.stdlib_module_names, "torch", "src")
    ]
    assert not foreign, foreign


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_rooms(library):
    users = {room(module_name(one.file)): one for one in ALL if one.module.split(".")[0] == library}
    strangers = [str(one) for name, one in users.items() if name not in ONLY_IN[library]]
    assert not strangers, strangers


@pytest.mark.parametrize("granularity", ["rooms", "files"])
def test_no_circles(granularity):
    """A circle that an import inside a function breaks is none: it cannot keep a file from loading."""
    graph: dict[str, set[str]] = {}
    for one in ALL:
        if not one.at_top or not one.module.startswith("src."):
            continue
        importer, imported = module_name(one.file), one.module
        if granularity == "rooms":
            importer, imported = room(importer), room(imported)
        if importer and imported != importer:
            graph.setdefault(importer, set()).add(imported)
    assert (
        len(list(TopologicalSorter(graph).static_order())) > 15
    )  # raises CycleError, which names the circle


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_what_is_public_says_what_it_is(file):
    tree = ast.parse(file.read_text())
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    if not ast.get_docstring(tree):
        silent.insert(0, "the file itself")
    assert not silent, f"{file.relative_to(ROOT)}: no docstring: {', '.join(silent)}"


def python(*arguments: str) -> tuple[str, float]:
    """Output and processor seconds of a fresh interpreter."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, used() - before


@pytest.mark.parametrize("door", DOORS)
def test_a_door_opens_without_anything_heavy(door):
    heavy = ("torch", "hydra", "omegaconf", "lightning", "wandb", "numpy", "pydantic", "PIL")
    loaded, _ = python("-c", f"import sys, src.{door}; print(*sys.modules)")
    assert f"src.{door}" in loaded.split()
    assert not set(heavy) & set(loaded.split())


def test_help_answers_within_a_second():
    # processor time: on a machine of one's own it is the wall clock's, on a shared one it is still ours
    answers = [python("-m", "src.train", "--help") for _ in range(3)]
    assert answers[0][0].startswith("Train a diffusion model")
    assert min(seconds for _, seconds in answers) < 1
