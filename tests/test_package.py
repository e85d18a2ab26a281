"""The distribution: the check of the wheel notices what it is for, and what is said of the package agrees."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import singe_plugin

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / ".ci/check_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_of(folder: Path, names: set[str]) -> Path:
    with zipfile.ZipFile(folder / "singe_plugin-0-py3-none-any.whl", "w") as archive:
        for name in (*names, "singe_plugin-0.dist-info/METADATA"):
            archive.writestr(name, "")
    return folder / "singe_plugin-0-py3-none-any.whl"


def test_a_wheel_lacks_nothing_and_has_nothing_besides(checker: ModuleType, tmp_path: Path) -> None:
    ours = checker.of_the_package()
    assert {"singe_plugin/integrations/nni/pruner.py", "singe_plugin/py.typed"} <= ours
    checker.check_files(wheel_of(tmp_path, ours))
    with pytest.raises(SystemExit, match=r"lacks \['singe_plugin/py.typed'\] and has nothing"):
        checker.check_files(wheel_of(tmp_path, ours - {"singe_plugin/py.typed"}))
    with pytest.raises(SystemExit, match=r"lacks nothing and has \['tests/asked.py'\]"):
        checker.check_files(wheel_of(tmp_path, ours | {"tests/asked.py"}))


def test_the_citation_is_of_this_version_and_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["version"] == singe_plugin.__version__
    paper = said["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Yvinec", "Dapogny", "Cord", "Bailly"]
    assert paper["url"].endswith("2207.04089")


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_forms_are_forms(path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load(path.read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0


def test_hooks_are_local() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in found] == ["local"]
    assert {hook["language"] for hook in found[0]["hooks"]} == {"system"}
