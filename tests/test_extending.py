"""The examples of docs/extending.md run, each in a process of its own, and touch no file of the library."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, flags=re.M | re.S))


def test_everything_that_can_be_added_has_an_example() -> None:
    assert list(BLOCKS) == [
        "A criterion", "An objective", "An operator rule", "A kind of target", "A host", "A step after a removal",
    ]  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_the_example_runs(name: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import torch\ntorch.manual_seed(0)\n{BLOCKS[name]}"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
