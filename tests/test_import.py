"""What ``import singe_plugin`` does, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
import torch_pruning as tp

import singe_plugin
from singe_plugin import errors
from singe_plugin.app import cli, commands
from singe_plugin.integrations import torch_pruning as integration


def python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import singe_plugin; dir(singe_plugin); singe_plugin.SingeError, singe_plugin.__version__",
        "from singe_plugin.app.cli import main; main(['--help'], standalone_mode=False)",
        "from singe_plugin.app.cli import main; main(['--version'], standalone_mode=False)",
        "import importlib.util; import singe_plugin; importlib.util.find_spec('torch_pruning')",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    """PyTorch takes seconds; who asks for help or a version does not wait for it."""
    heavy = {"torch", "torch_pruning", "timm", "torchvision", "numpy", "nni", "sklearn", "matplotlib", "tqdm"}
    assert python(f"{code}\nimport sys; print(sorted({heavy!r} & set(sys.modules)))", "-W", "error").endswith("[]")


def test_it_draws_no_random_numbers_and_nothing_of_ours_warns() -> None:
    code = """
import random, sys, warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other packages do when they are imported
    import torch, torch_pruning as tp, tqdm, safetensors.torch
before = torch.get_rng_state(), random.getstate()
present = set(sys.modules)
import singe_plugin
assert singe_plugin.score_units and singe_plugin.prune and singe_plugin.SInGEPruner is tp.pruner.SInGEPruner
assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
added = set(sys.modules) - present  # torch-pruning itself imports timm
print(sorted({"nni", "timm", "sklearn", "matplotlib", "pandas", "setuptools"} & added))
print(sorted({"nni", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    assert python(code, "-W", "error") == "[]\n[]"


ORDERS = """
import torch_pruning as tp; import singe_plugin
import singe_plugin; import torch_pruning as tp
import singe_plugin.integrations.torch_pruning; import torch_pruning as tp
import torch_pruning as tp; import singe_plugin.integrations.torch_pruning
import singe_plugin; singe_plugin.SInGEImportance; import torch_pruning as tp
import singe_plugin; singe_plugin.prune; import torch_pruning as tp
import singe_plugin; from torch_pruning import importance; import torch_pruning as tp
import singe_plugin; from torch_pruning.pruner.importance import TaylorImportance; import torch_pruning as tp
import singe_plugin; importlib.reload(singe_plugin); import torch_pruning as tp
import singe_plugin; importlib.util.find_spec("torch_pruning").loader.get_source; import torch_pruning as tp
import singe_plugin; copy.deepcopy(importlib.util.find_spec("torch_pruning")); import torch_pruning as tp
import singe_plugin; import torch_pruning as tp; importlib.reload(tp)
import singe_plugin; imported_by_threads(); import torch_pruning as tp
import singe_plugin; interrupted(); import torch_pruning as tp
"""


def test_the_names_are_registered_in_every_order_of_imports() -> None:
    """And the finder that waited is gone, with the modules as if it had never been there."""
    code = f"""
import copy, importlib.machinery, importlib.util, sys, threading
import torch, timm  # not to be imported again each time

def imported_by_threads():
    names = ["torch_pruning", "singe_plugin.integrations.torch_pruning"] * 4
    threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in names]
    [thread.start() for thread in threads], [thread.join() for thread in threads]

def interrupted():
    sys.modules["torch_pruning._helpers"] = None
    try:
        import torch_pruning
    except ImportError:
        del sys.modules["torch_pruning._helpers"]

others = list(sys.meta_path)
for order in {ORDERS.strip().splitlines()!r}:
    space = {{**globals()}}
    exec(order, space)
    tp, ours = space["tp"], sys.modules["singe_plugin.integrations.torch_pruning"]
    for place, name in ((tp.importance, "SInGEImportance"), (tp.pruner, "SInGEPruner")):
        assert vars(place).get(name) is getattr(sys.modules["singe_plugin"], name) is getattr(ours, name), order
    assert sys.meta_path == others, order
    for module in (tp, ours):
        assert type(module.__spec__.loader) is type(module.__loader__) is importlib.machinery.SourceFileLoader, order
    for name in [n for n in sys.modules if n.split(".")[0] in ("singe_plugin", "torch_pruning")]:
        del sys.modules[name]
"""
    python(code)


def test_without_torch_pruning_nothing_is_lost() -> None:
    code = """
import importlib.util, sys, warnings
from importlib.machinery import PathFinder
found, PathFinder.find_spec = PathFinder.find_spec, classmethod(
    lambda cls, name, *rest: None if name == "torch_pruning" else found(name, *rest)
)
import singe_plugin
assert importlib.util.find_spec("torch_pruning") is None
try:
    import torch_pruning
except ModuleNotFoundError as error:
    print(error)
assert singe_plugin.ConfigError and singe_plugin.DataError
"""
    assert python(code) == "No module named 'torch_pruning'"


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
    assert singe_plugin.Builder.__module__ == "singe_plugin.run.architecture"
    assert singe_plugin.load.__module__ == "singe_plugin.run.artifact"
    with pytest.raises(AttributeError, match="module 'singe_plugin' has no attribute 'prune_all'"):
        _ = singe_plugin.prune_all  # type: ignore[attr-defined]


def test_the_lists_of_public_names_agree() -> None:
    lazy = [name for names in singe_plugin._LAZY.values() for name in names]
    errors_too = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert sorted({*lazy, *errors_too}) == singe_plugin.__all__
    assert set(singe_plugin.__all__) <= set(dir(singe_plugin))


def test_help_says_of_every_command_what_it_says_of_itself() -> None:
    for name, text in cli.COMMANDS.items():
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        assert command.name == name
        assert command.get_short_help_str(1000) == text
    assert cli.COMMANDS.keys() == {*commands.__all__, *cli._MODULES}


def test_the_names_come_with_a_star_import() -> None:
    space: dict[str, object] = {}
    exec("from singe_plugin import *", space)
    assert set(singe_plugin.__all__) <= set(space)
