"""The directions of imports that docs/design.md states, and the lightness of the doors."""

import ast
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SRC = ROOT / "src"
# modules that any room may import
FOUNDATION = {"errors", "randomness"}
# room or module -> the other rooms and modules of the project that it may import
MAY_IMPORT = {
    "errors": set(),
    "randomness": set(),
    "memory": set(),
    "diffusion": set(),
    "model": set(),
    "data": set(),
    "metrics": set(),
    "interop": {"model", "diffusion"},
    "generation": {"diffusion", "data"},
    "pictures": {"diffusion", "data"},
    "command_line": {"sweep"},
    "sweep": {"command_line"},
    "run_folder": {"command_line", "training"},
    "configuration": set(),
    "training": {"diffusion", "data", "metrics", "generation", "pictures", "run_folder", "command_line"},
    "experiment": {
        "configuration", "data", "diffusion", "model", "metrics", "training", "generation", "run_folder", "memory",
        "command_line",
    },
    "loading": {"experiment", "configuration", "diffusion", "metrics", "generation", "run_folder", "training", "data"},
    "tasks": {"loading", "experiment", "data", "diffusion", "pictures", "generation", "run_folder"},
    "train": {"command_line", "run_folder", "experiment", "training"},
    "sample": {"command_line", "run_folder", "loading", "tasks", "configuration"},
    "evaluate": {"command_line", "run_folder", "loading", "configuration"},
    "train_classifier": {"data", "metrics"},
    "fetch_inception": {"metrics"},
}  # fmt: skip
LIGHTNING = {"training", "data", "experiment"}
HYDRA = {
    "experiment",
    "loading",
    "configuration",
    "command_line",
    "sweep",
    "train",
    "sample",
    "evaluate",
    "train_classifier",
}


def room_of(path):
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path):
    """Names of all modules that a file imports, at its top or inside functions."""
    found = set()
    package = ("src", *path.relative_to(SRC).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = f"{base}{node.module or ''}".rstrip(".")
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "src" else {module}
    return found


FILES = sorted(path for path in SRC.rglob("*.py") if path != SRC / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_directions(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is not in docs/design.md's table of directions"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "src" and rest:
            assert rest[0] in MAY_IMPORT[room] | FOUNDATION | {room}, f"{room} imports {name}"
        if top in ("lightning", "pytorch_lightning"):
            assert room in LIGHTNING, f"{room} imports {name}"
        if top in ("hydra", "omegaconf"):
            assert room in HYDRA, f"{room} imports {name}"


def test_diffusion_imports_torch_only():
    allowed = {"torch", "src", *sys.stdlib_module_names}
    for path in (SRC / "diffusion").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert tops <= allowed, f"{path}: {tops - allowed}"


def test_no_circles():
    """Rooms import one another in one direction."""
    used = {room: set() for room in MAY_IMPORT}
    for path in FILES:
        tops = {name.split(".")[1] for name in imports(path) if name.startswith("src.")}
        used[room_of(path)] |= tops - {room_of(path)}
    # the sweep's table and the command line are two halves of one thing
    used["sweep"].discard("command_line")

    def reaches(start, goal, seen):
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in used.get(start, ()))

    circles = [room for room in used if reaches(room, room, frozenset())]
    assert not circles, circles


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


@pytest.mark.parametrize("door", ["train", "sample", "evaluate"])
def test_help_answers_at_once(door):
    def seconds():
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", f"src.{door}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0
        assert "sampler=ddim" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


def test_doors_import_nothing_heavy():
    heavy = "[m for m in ('torch', 'hydra') if m in sys.modules]"
    check = f"import sys, src.train, src.sample, src.evaluate; print({heavy})"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
