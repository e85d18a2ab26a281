"""The house: what may import what, and that nothing goes round in a circle."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import singe_plugin

ROOT = Path(singe_plugin.__file__).parent
FLOORS = ("ground", "method", "axes", "loop", "run", "shrink", "integrations", "app", "face")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("singe_plugin", *(part for part in parts if part != "__init__")))


FILES = {name_of(path): path for folder in (ROOT, ROOT / "integrations") for path in folder.rglob("*.py")}


def floor_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "face"
    return parts[1] if parts[1] in FLOORS else "ground"


@cache
def imports_of(module: str) -> frozenset[tuple[str, str]]:
    """``(module, name)`` of everything that is imported from us: at the top, inside functions, for types only."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            home = ".".join(p for p in (base if node.level else "", node.module or "") if p)
            for alias in node.names:
                inner = f"{home}.{alias.name}"
                found.add((inner, "") if inner in FILES else (home, alias.name))
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
    return frozenset((home, name) for home, name in found if home.split(".")[0] == "singe_plugin")


def test_all_files_are_seen() -> None:
    assert len(FILES) > 90
    assert {floor_of(module) for module in FILES} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_run_one_way(floor: str) -> None:
    """Down, or beside; lazy ones and those for types, too."""
    wrong = [
        f"{module} imports {home}"
        for module in FILES
        if floor_of(module) == floor
        for home, _ in imports_of(module)
        if FLOORS.index(floor_of(home)) > FLOORS.index(floor)
    ]
    assert wrong == []


def test_nothing_goes_round_in_a_circle() -> None:
    graph = {module: {home for home, _ in imports_of(module) if home != module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nothing_private_is_used_across_modules() -> None:
    wrong = [
        f"{module} imports {home}.{name}"
        for module in FILES
        for home, name in imports_of(module)
        if name.startswith("_") and not name.startswith("__") and home != module
    ]
    assert wrong == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_what_a_module_calls_public_is_there_and_its_own(module: str) -> None:
    if ".nni" in module and importlib.util.find_spec("nni") is None:
        pytest.skip("NNI is an extra")
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(loaded, name)] == []
    if FILES[module].name == "__init__.py":
        return
    own = {
        node.name
        for node in ast.parse(FILES[module].read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    }
    used = {name for other in FILES for home, name in imports_of(other) if home == module}
    assert used & own <= set(names), "used elsewhere, and not in __all__"


def test_files_have_a_size_that_can_be_read() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}
