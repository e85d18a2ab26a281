"""What is not installed is an ``ImportError`` that says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDDEN = """
import sys
sys.modules["nni"] = None
try:
    import {module}
except ImportError as error:
    from singe_plugin import SingeError
    assert isinstance(error, SingeError), type(error).__mro__
    assert error.name == "nni"
    print(error)
else:
    print("imported")
import singe_plugin
assert callable(singe_plugin.prune)
"""


@pytest.mark.parametrize("module", ["singe_plugin.integrations.nni", "singe_plugin.integrations.nni.pruner"])
def test_nni(module: str) -> None:
    found = subprocess.run([sys.executable, "-c", HIDDEN.format(module=module)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "pip install nni==3.0" in found.stdout


def test_shrinking_needs_no_nni() -> None:
    script = HIDDEN.format(module="singe_plugin.shrink") + "\nassert 'singe_plugin.integrations.nni' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "imported"), found.stderr


@pytest.mark.parametrize(
    ("package", "name", "remedy"),
    [
        ("lightning", "singe_plugin.integrations.lightning.SInGEPruning", "pip install lightning"),
        ("transformers", "singe_plugin.integrations.transformers.SInGEPruningCallback", "pip install transformers"),
    ],
)
def test_callbacks(package: str, name: str, remedy: str) -> None:
    """Their modules are there without the package; what is made of them is not."""
    module, _, callback = name.rpartition(".")
    script = f"""
import sys
sys.modules[{package!r}] = None
from {module} import {callback}
try:
    {callback}([1])
except ImportError as error:
    from singe_plugin import SingeError
    assert isinstance(error, SingeError) and error.name == {package!r}
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert remedy in found.stdout
