"""Imports run one way, down; and `import sparsify` loads neither triton nor transformers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A unit is a module or folder directly inside sparsify/. It imports from its own level and those below it. What is
# not named here stands on the middle level, with the layers, the pruner contract and the checkpoint.
LEVELS = {
    "errors": 0,
    "blocks": 1,
    "kernels": 1,
    "stages": 3,
    "sensitivity": 3,
    "sweep": 3,
    "pipeline": 4,
    "api": 5,
    "cli": 6,
}
MIDDLE = 2
# `__init__` names everything, `__main__` is the command, `_autoload` is for torch to call.
OUTSIDE = {"__init__", "__main__", "_autoload"}
# Pruners are reached through their registry alone, and know the contract alone.
PRUNER_MAY_IMPORT = {"pruner", "patterns", "blocks", "errors"}
SCRIPT_MAY_IMPORT = {
    "bench", "data", "masking", "measure", "patterns", "plots", "plots_speed", "pruner", "quality", "recipe",
    "recipes", "sensitivity", "sweep", "blocks", "errors", "kernels",
}  # fmt: skip


def level(unit: str) -> int:
    return LEVELS.get(unit, MIDDLE)


def python_files() -> Iterator[tuple[str, Path]]:
    """Every source file of the package, beside the unit it belongs to."""
    for path in sorted((ROOT / "sparsify").rglob("*.py")):
        inner = path.relative_to(ROOT / "sparsify").parts
        if inner[0] not in ("kernels", "pruners"):  # those are links, read below from where they point
            yield inner[0].removesuffix(".py"), path
    for unit in ("kernels", "pruners"):
        for path in sorted((ROOT / unit).rglob("*.py")):
            yield unit, path


def nodes(tree: ast.AST, typing: bool) -> Iterator[ast.AST]:
    """All nodes below `tree`, with or without those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if typing or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes(node, typing)


def imports(path: Path, typing: bool = True) -> Iterator[str]:
    """Full dotted names of all that a file imports, at its top or inside functions."""
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), typing):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house writes full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def units_imported(path: Path, typing: bool = True) -> set[str]:
    names = {name.split(".")[1] for name in imports(path, typing) if name.startswith("sparsify.")}
    return names - {"__version__"}


def packages_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"sparsify"}


FILES = [pytest.param(unit, path, id=str(path.relative_to(ROOT))) for unit, path in python_files()]


@pytest.mark.parametrize(("unit", "path"), FILES)
def test_imports_point_down(unit: str, path: Path) -> None:
    used = units_imported(path) - {unit}
    if unit == "pruners":
        assert used <= PRUNER_MAY_IMPORT
        assert packages_imported(path) <= {"torch"}
    elif unit not in OUTSIDE:
        unreachable = used & {*OUTSIDE, "pruners"}
        assert not unreachable, f"{path.relative_to(ROOT)} imports {unreachable}, which no module may import"
        above = sorted(name for name in used if level(name) > level(unit))
        assert not above, f"{path.relative_to(ROOT)} imports upwards: {above}"


def test_units_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for unit, path in python_files():
        if unit not in OUTSIDE:
            graph.setdefault(unit, set()).update(units_imported(path, typing=False) - {unit})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for unit, path in python_files()
        if unit == "kernels"
    ],
)
def test_kernels_are_functions_on_tensors(path: Path) -> None:
    assert packages_imported(path) <= {"torch", "triton", "numpy"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.name) for path in sorted((ROOT / "scripts").glob("*.py"))]
)
def test_scripts_use_the_public_interface(path: Path) -> None:
    import sparsify

    public = SCRIPT_MAY_IMPORT | set(sparsify.__all__)
    assert units_imported(path) - {"cli"} <= public
    assert set(re.findall(r"sparsify\.cli[.\w]*", path.read_text())) <= {"sparsify.cli.console"}


LAYERS = """
import torch
from sparsify import BlockMask, BlockSparseConv2d, BlockSparseLinear, Pruner
BlockSparseLinear(64, 64, 32)(torch.randn(2, 64)).sum().backward()
BlockSparseConv2d(16, 16, 3, 8)(torch.randn(2, 16, 5, 5)).sum().backward()
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import sparsify", id="package"),
        pytest.param(LAYERS, id="layers-and-pruner"),
    ],
)
def test_import_stays_light(code: str) -> None:
    code += "\nimport sys\nprint({'triton', 'transformers'} & set(sys.modules) or 'light')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("light", "")
