"""What ``import singe_plugin`` does, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch_pruning as tp

import singe_plugin
from singe_plugin.integrations import torch_pruning as integration


def python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_light_quiet_and_draws_no_random_numbers() -> None:
    """Packages that only some users need are not imported, and nothing of ours warns."""
    code = """
import random, sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages do when they are imported
    import torch, torch_pruning as tp, tqdm, safetensors.torch
before = torch.get_rng_state(), random.getstate()
present = set(sys.modules)
assert not hasattr(tp.importance, "SInGEImportance") and not hasattr(tp.pruner, "SInGEPruner")
import singe_plugin
assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
assert tp.importance.SInGEImportance.__module__.startswith("singe_plugin.")
assert tp.pruner.SInGEPruner.__module__.startswith("singe_plugin.")
added = set(sys.modules) - present  # torch-pruning itself imports timm
print(sorted({"nni", "timm", "sklearn", "matplotlib", "pandas", "singe_plugin.artifact"} & added))
print(sorted({"nni", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    assert python(code, "-W", "error") == "[]\n[]"


def test_a_name_that_is_taken_is_never_overwritten() -> None:
    code = """
import torch_pruning as tp
tp.importance.SInGEImportance = tp.pruner.SInGEPruner = "somebody else's"
import singe_plugin
print(tp.importance.SInGEImportance, tp.pruner.SInGEPruner)
"""
    assert python(code) == "somebody else's somebody else's"


def test_registering_again_changes_nothing() -> None:
    before = vars(tp.importance).copy(), vars(tp.pruner).copy()
    integration.register()
    integration.register()
    assert (vars(tp.importance), vars(tp.pruner)) == before
    assert tp.importance.SInGEImportance is integration.SInGEImportance
    assert tp.pruner.SInGEPruner is integration.SInGEPruner


def test_every_public_name_is_there() -> None:
    for name in singe_plugin.__all__:
        assert getattr(singe_plugin, name).__doc__
    assert singe_plugin.prune.__module__ == "singe_plugin.integrations.prune"
    assert singe_plugin.Builder.__module__ == "singe_plugin.architecture"
    assert singe_plugin.load.__module__ == "singe_plugin.artifact"
    with pytest.raises(AttributeError, match="module 'singe_plugin' has no attribute 'prune_all'"):
        _ = singe_plugin.prune_all  # type: ignore[attr-defined]


def test_the_names_come_with_a_star_import() -> None:
    space: dict[str, object] = {}
    exec("from singe_plugin import *", space)
    assert set(singe_plugin.__all__) <= set(space)
