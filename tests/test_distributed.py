"""Two processes, each with its own data, would end with two networks: everything that scores or removes refuses."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from click.testing import CliRunner
from torch import distributed

from singe_plugin import UnstructuredPruner, prune, prune_weights
from singe_plugin.app.cli import main
from singe_plugin.errors import ConfigError
from singe_plugin.integrations.nni import SInGEPruner as NNIPruner
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner

from asked import asked
from small_nets import Chain, images, values_of

GOOD = images()
X = GOOD[0][0][:2]
CONFIG = [{"op_names": ["conv1"], "sparse_ratio": 0.5}]
COMMAND = ["prune", "--model", "resnet18", "--dataset", "digits", "--output"]


def entry_points(folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that scores or removes; pruners that were made before the process group are among them."""
    model, early = Chain(), Chain()
    magnitude = tp.importance.MagnitudeImportance()
    pruner = SInGEPruner(early, X, magnitude, target="params=0.5")
    weights = UnstructuredPruner(Chain(), GOOD, sparsity=0.5)
    nni = NNIPruner(Chain(), CONFIG, batches=GOOD)
    scored = Chain()
    importance = SInGEImportance().bind(scored, GOOD)
    graph = tp.DependencyGraph().build_dependency(scored, X)
    group = graph.get_pruning_group(scored.conv1, tp.prune_conv_out_channels, list(range(8)))
    return {
        "prune_weights": lambda: prune_weights(model, GOOD),
        "SInGEPruner": lambda: SInGEPruner(model, X, magnitude),
        "SInGEPruner.run": pruner.run,
        "SInGEPruner.step": pruner.step,
        "SInGEPruner.step, interactive": lambda: pruner.step(interactive=True),
        "SInGEImportance.bind": lambda: SInGEImportance().bind(model, GOOD),
        "SInGEImportance": lambda: importance(group),
        "UnstructuredPruner": lambda: UnstructuredPruner(model, GOOD),
        "UnstructuredPruner.run": weights.run,
        "NNI's pruner": lambda: NNIPruner(model, CONFIG, batches=GOOD),
        "NNI's pruner, compress": nni.compress,
        "the command": lambda: _command(folder),
    }


def _command(folder: Path) -> None:
    found = CliRunner().invoke(main, [*COMMAND, str(folder / "out"), "--granularity", "weight"])
    assert found.exit_code == 1
    raise ConfigError(found.stderr)


def _rank(rank: int, points: dict[str, Callable[[], Any]], store: Path, answer: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    said = {}
    for name, act in points.items():
        try:
            act()
            said[name] = "it went on"
        except BaseException as error:
            said[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    answer.send(said)


def test_every_entry_point_refuses_in_two_processes(tmp_path: Path) -> None:
    points = entry_points(tmp_path)
    context = multiprocessing.get_context("fork")  # nothing is imported again, and what is refused does not compute
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, points, tmp_path / "store", pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        for rank, (receive, _) in enumerate(pipes):
            assert receive.poll(60), "a process did not answer"
            for name, said in receive.recv().items():
                assert said.startswith("ConfigError: "), (name, said)
                assert f"process {rank} of 2" in said, (name, said)
                assert "prune in one process" in said, (name, said)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert not (tmp_path / "out").exists()


def test_a_group_of_one_process_is_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        result = prune(Chain(), GOOD, **asked(target="params=0.5", criterion="l2", finetune_steps=0, min_width=1))
    finally:
        distributed.destroy_process_group()
    assert result.removed_params == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("count", ["2", "8"])
def test_the_command_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    found = CliRunner().invoke(main, [*COMMAND, str(tmp_path / "out")])
    assert found.exit_code == 1
    assert f"WORLD_SIZE={count}" in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_library_call_is_not_judged_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an initialised group is sure: batch systems set the variable for jobs of one process, too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = Chain()
    before = values_of(model)
    SInGEPruner(model, X, tp.importance.MagnitudeImportance())
    assert all(torch.equal(now, before[name]) for name, now in values_of(model).items())
