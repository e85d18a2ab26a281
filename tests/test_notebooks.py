"""The notebooks are stored without outputs, and run from top to bottom; what they print is true."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything that a notebook prints or shows."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    book = nbformat.read(ROOT / "examples/notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in shown)


def test_all_are_here() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["from_torch_pruning", "timm_classifier", "yolo"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}


@pytest.mark.slow
def test_a_classifier_from_training_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("timm_classifier", tmp_path, monkeypatch)
    assert "loaded bit for bit: True" in shown
    assert "exported, and the same: True" in shown
    assert "'report.md'" in shown
    before, after = (float(x) for x in re.findall(r"accuracy +([\d.]+)% +([\d.]+)%", shown)[0])
    assert before > 90  # it was trained
    assert after > before - 10  # and repaired: as pruned it is far below
    solved = re.findall(r"^\S+ +([\d.]+) -> ([\d.]+)$", shown, re.M)
    assert len(solved) > 10
    assert all(float(now) <= float(was) for was, now in solved)


@pytest.mark.slow
def test_from_a_script_of_torch_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("from_torch_pruning", tmp_path, monkeypatch)
    lines = re.findall(r"^(\S.*?) +([\d.]+)% +([\d,]+) MACs", shown, re.M)
    assert [name for name, _, _ in lines] == [
        "trained", "torch-pruning, magnitude", "torch-pruning, SInGE", "SInGEPruner, repaired",
        "torch-pruning, magnitude", "the same, repaired",
    ]  # fmt: skip
    top1 = [float(accuracy) for _, accuracy, _ in lines]
    macs = [int(count.replace(",", "")) for _, _, count in lines]
    assert top1[5] > top1[4] + 20  # the repair, on the same units
    assert macs[5] == macs[4]
    assert 0.45 * macs[0] < macs[3] < 0.55 * macs[0]  # the target, as torch-pruning counts


@pytest.mark.slow
def test_a_yolo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics")
    shown = run("yolo", tmp_path, monkeypatch)
    mine, theirs = re.findall(r"the loaded one: (\d+) (\d+)", shown)[0]
    assert mine == theirs
    assert re.search(r"MACs .*-3[01]\.\d %", shown)
