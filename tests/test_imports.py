"""Checks the import rules of docs/design.md by parsing the source files, without importing them."""

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
ENTRY_POINTS = {
    "train",
    "sample",
    "evaluate",
    "explain",
    "search",
    "plan",
    "export",
    "import_weights",
    "train_classifier",
    "wandb_workspace",
    "fetch_inception",
}

# Layers from the bottom up. A package may import only packages of lower layers.
LAYERS: list[set[str]] = [
    {"errors", "randomness"},
    {"conditioning"},
    {"diffusion", "model", "data", "metrics", "runs"},
    {"generation", "interop"},
    {"evaluation"},
    {"report"},
    {"training"},
    {"app"},
    {"tools"},
    {*ENTRY_POINTS, "__main__"},
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}

ONLY_IN = {
    "lightning": {"training", "data", "app"},
    "hydra": {"app"},
    "omegaconf": {"app"},
    "wandb": {"training"},
    "optuna": {"training", "app"},
    "jinja2": {"report"},
    "torch_fidelity": {"metrics", "tools"},
    "diffusers": {"interop", "data"},
    "transformers": {"data"},
    "timm": {"training"},
}


@dataclass(frozen=True)
class Import:
    """One import: the importing file, the full name of the module, and whether it runs when the file is imported."""

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
    """All imports of a file, except those under TYPE_CHECKING."""
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


def package_of(name: str) -> str | None:
    """The package (or top-level module) under src that a module belongs to; None for third-party modules."""
    parts = name.split(".")
    if parts[-1] == "__main__":  # an entry point with the name of a package
        return "__main__"
    return parts[1] if parts[0] == "src" and len(parts) > 1 else None


def between_packages(found: list[Import]) -> Iterator[tuple[Import, str, str]]:
    for one in found:
        importer, imported = package_of(module_name(one.file)), package_of(one.module)
        if importer and imported and importer != imported:
            yield one, importer, imported


def test_imports_finds_every_kind_of_import():
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


def test_the_top_of_src_holds_packages_entry_points_and_two_shared_modules():
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert modules == ENTRY_POINTS | {"errors", "randomness"}
    assert {package_of(name) for name in MODULES} - {None} == set(LEVEL)


def test_imports_go_one_way():
    broken = [
        str(one) for one, importer, imported in between_packages(ALL) if LEVEL[imported] >= LEVEL[importer]
    ]
    assert not broken, broken


def test_entry_points_hold_no_logic():
    for path in [*(SOURCE / f"{name}.py" for name in ENTRY_POINTS), *SOURCE.glob("*/__main__.py")]:
        assert len(path.read_text().splitlines()) < 20, path


@pytest.mark.parametrize("name", ["diffusion", "model"])
def test_mathematics_and_networks_need_torch_only(name):
    foreign = [
        str(one)
        for one in ALL
        if package_of(module_name(one.file)) == name
        and one.module.split(".")[0] not in (*sys.stdlib_module_names, "torch", "src")
    ]
    assert not foreign, foreign


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_only_in_its_packages(library):
    users = {package_of(module_name(one.file)): one for one in ALL if one.module.split(".")[0] == library}
    elsewhere = [str(one) for name, one in users.items() if name not in ONLY_IN[library]]
    assert not elsewhere, elsewhere


@pytest.mark.parametrize("granularity", ["packages", "files"])
def test_no_import_cycles(granularity):
    """Imports inside functions count too."""
    graph: dict[str, set[str]] = {}
    for one in ALL:
        if not one.module.startswith("src."):
            continue
        importer, imported = module_name(one.file), one.module
        if granularity == "packages":
            importer, imported = package_of(importer), package_of(imported)
        if importer and imported != importer:
            graph.setdefault(importer, set()).add(imported)
    # raises CycleError, which names the cycle
    assert len(list(TopologicalSorter(graph).static_order())) > 10


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_public_names_have_docstrings(file):
    tree = ast.parse(file.read_text())
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in public if not ast.get_docstring(node)]
    if not ast.get_docstring(tree):
        silent.insert(0, "the module")
    assert not silent, f"{file.relative_to(ROOT)}: no docstring: {', '.join(silent)}"


def python(*arguments: str) -> tuple[str, float]:
    """Output and CPU seconds of a new interpreter."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, used() - before


@pytest.mark.parametrize("entry_point", ["train", "sample", "evaluate"])
def test_entry_point_imports_no_heavy_package(entry_point):
    heavy = ("torch", "hydra", "omegaconf", "lightning", "wandb", "numpy", "pydantic", "PIL")
    loaded, _ = python("-c", f"import sys, src.{entry_point}; print(*sys.modules)")
    assert f"src.{entry_point}" in loaded.split()
    assert not set(heavy) & set(loaded.split())


def test_help_takes_less_than_a_second():
    # CPU time, because it does not depend on other processes
    answers = [python("-m", "src.train", "--help") for _ in range(3)]
    assert answers[0][0].startswith("Train a diffusion model")
    assert min(seconds for _, seconds in answers) < 1
