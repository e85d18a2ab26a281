"""What type checkers and editors see of the installed package, in a folder of the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import singe_plugin
from singe_plugin.integrations.torch_pruning import SInGEPruner

result = singe_plugin.prune(None, [])
reveal_type(result)
reveal_type(result.before.params)
reveal_type(SInGEPruner)
reveal_type(singe_plugin.SInGEImportance)
singe_plugin.prune(None, [], no_such_option=1)
"""
# what others' packages are made of takes most of the time, and is not what is asked here
CONFIG = """
[mypy]
strict = True
[mypy-torch.*,torch_pruning.*,timm.*,numpy.*,click.*,safetensors.*,tqdm.*,PIL.*,nni.*]
follow_imports = skip
"""


def test_a_users_script_is_checked_against_our_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    lines = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert len(lines) == 7, f"{done.stdout}\nis the package installed as it is now? pip install -e ."
    revealed = [line.removeprefix('note: Revealed type is "').rstrip('"') for line in lines[:4]]
    assert revealed[0].startswith("singe_plugin.")
    assert revealed[0].endswith(".Result")
    assert revealed[1] == "int"
    assert "SInGEPruner" in revealed[2]
    assert "SInGEImportance" in revealed[3]
    assert lines[4].startswith('error: Unexpected keyword argument "no_such_option" for "prune"')


def test_every_package_is_installed() -> None:
    """And integrations/ is one of them: singe_plugin/integrations is a link to it."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    folders = [file.parent for top in ("singe_plugin", "integrations") for file in (ROOT / top).rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == {f"singe_plugin.{n}" if n.startswith("integrations") else n for n in names}
    assert (ROOT / "singe_plugin" / "integrations").resolve() == ROOT / "integrations"
    assert len(listed) == len(set(listed))
