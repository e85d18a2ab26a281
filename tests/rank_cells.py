"""What each of two processes does in tests/test_ranks.py: several prunings in one start, whose results are written."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from click.testing import CliRunner
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import singe_plugin
from singe_plugin import Callback, FineTune, Pace, Repair, Scoring
from singe_plugin.app.cli import main as cli
from singe_plugin.loop.events import LayerScored
from singe_plugin.loop.phase import Phase
from singe_plugin.ranks import current

Net = nn.Sequential
X = torch.randn(90, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = (X[:, :3] + X[:, 3:].abs()).argmax(1)
BATCHES = [(X[i : i + 9], Y[i : i + 9]) for i in range(0, 90, 9)]  # 9 rows: two ranks get 5 and 4


class Still(nn.BatchNorm1d):
    """Its statistics are held still: those of a batch are of its rows, and a rank has some of them only."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), Still(16).eval(), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)
    ).double()


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def outcome(result: Any) -> dict[str, Any]:
    """What must be the same however many prune."""
    after = result.after
    return {
        "weights": {name: t.clone() for name, t in result.model.state_dict().items()},
        "removals": result.history.removals(),
        "losses": [row["loss"] for row in result.history.rows if row["event"] == "finetune_step"],
        "measured": [result.before.accuracy, after.accuracy, after.params, after.macs],
    }


def runs(**more: Any) -> dict[str, Callable[[], Any]]:
    """Prunings whose outcome does not depend on the number of ranks."""
    usual: dict[str, Any] = {"target": "params=0.4", "val_data": BATCHES[:3]} | more

    def prune(**options: Any) -> Any:
        return outcome(singe_plugin.prune(net(), BATCHES, **(usual | options)))

    tuned, two = FineTune(steps=6, clip_grad=0.5), Pace(rounds=2)
    return {
        "ig in rounds": lambda: prune(scoring=Scoring("ig", batches=3), pace=two, finetune=tuned, repair=None),
        "obs and repair": lambda: prune(scoring=Scoring("obs", batches=5), pace=two, finetune=tuned, repair=40),
        "layers": lambda: prune(
            scoring=Scoring("norm_grad", batches=1), pace=Pace("layers", units_per_step=3),
            finetune=FineTune(steps=5, every="layer", distill="unpruned"), repair=Repair(20, every="round"),
        ),
        "a data set": lambda: outcome(
            singe_plugin.prune(
                net(), TensorDataset(X, Y), scoring=Scoring("ig_abs", batches=2, batch_size=20), pace=Pace(rounds=1),
                finetune=FineTune(DataLoader(TensorDataset(X, Y), 13, shuffle=True), steps=9), **usual,
            )
        ),
        "taylor": lambda: prune(scoring=Scoring(tp.importance.TaylorImportance(), batches=2), finetune=2),
    }  # fmt: skip


class Stops(Callback):
    """Ends a run in its second round."""

    done = 0

    def on_round_done(self, event: Any) -> None:
        self.done += 1

    def on_layer_scored(self, event: LayerScored) -> None:
        if self.done:
            raise KeyboardInterrupt


class Dies(Callback):
    """A rank that is gone without a word."""

    def on_finetune_step(self, event: Any) -> None:
        if current().rank == 1:
            os._exit(3)


class Confused(Callback):
    """A rank that sees other scores than the others."""

    def on_layer_scored(self, event: LayerScored) -> None:
        if current().rank == 1:
            event.scores.neg_()


class Broken:
    """Batches one of which cannot be read, on one rank."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __iter__(self) -> Any:
        for number, batch in enumerate(BATCHES):
            if number == self.at and current().rank == 1:
                raise OSError("the disk is gone")
            yield batch


def failing(function: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        function()
    except BaseException as error:
        return said(error), time.monotonic() - start
    return "it went on", 0.0


def failures() -> dict[str, Callable[[], Any]]:
    """What ends with an error on both ranks; with the model that must be as it was."""
    rank = distributed.get_rank()

    def prune(model: nn.Module | None = None, data: Any = BATCHES, **options: Any) -> None:
        model = net() if model is None else model
        before = copy.deepcopy(model.state_dict())
        try:
            singe_plugin.prune(model, data, **({"finetune": 4, "repair": None} | options))
        finally:
            after = model.state_dict()
            assert all(torch.equal(after[name], before[name]) for name in before), "it was not rolled back"

    def breaks(model: nn.Module) -> dict[str, float]:
        if rank == 1:
            raise RuntimeError("no such image")
        return {"mAP": 1.0}

    def unfit(model: nn.Module, batch: Any) -> Tensor:
        if rank == 1:
            raise ValueError("a bad batch")
        return model(batch[0]).square().mean()

    ragged = [(x, y, torch.zeros(4)) for x, y in BATCHES]
    ragged_step: Any = lambda model, batch: model(batch[0]).square().mean()  # noqa: E731
    return {
        "another model": lambda: prune(net(seed=rank)),
        "another choice": lambda: prune(callbacks=[Confused()]),
        "a bad scoring batch": lambda: prune(data=Broken(1)),
        "a bad training batch": lambda: prune(finetune=FineTune(Broken(2), steps=4)),
        "a bad step": lambda: prune(finetune=FineTune(steps=4, step_fn=unfit)),
        "a bad judge": lambda: prune(val_data=breaks),
        "an undivided batch": lambda: prune(finetune=FineTune(ragged, steps=4, step_fn=ragged_step)),
        "interrupted": lambda: prune(callbacks=[Stops()] if rank == 1 else []),
    }


def own_batches() -> dict[str, Any]:
    """Loaders with a sampler for each rank: every rank scores, judges and trains on batches of its own."""
    data, rank = TensorDataset(X, Y), distributed.get_rank()
    loader = DataLoader(data, batch_size=9, sampler=DistributedSampler(data, 2, rank, shuffle=False))
    found = singe_plugin.prune(
        net(), loader, target="params=0.4", scoring=Scoring("ig", batches=2), pace=Pace(rounds=1),
        finetune=FineTune(steps=3), repair=40, val_data=loader,
    )  # fmt: skip
    return outcome(found)


def as_if_own() -> dict[str, Any]:
    """What :func:`own_batches` comes to, in one process."""
    mine = [[(X[rank::2][i : i + 9], Y[rank::2][i : i + 9]) for i in range(0, 45, 9)] for rank in (0, 1)]
    whole = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in zip(*mine, strict=True)]
    found = singe_plugin.prune(
        net(), [batch for pair in zip(*mine, strict=True) for batch in pair], target="params=0.4",
        scoring=Scoring("ig", batches=4), pace=Pace(rounds=1), finetune=FineTune(whole, steps=3), repair=90,
        val_data=whole,
    )  # fmt: skip
    return outcome(found)


def wrappers() -> int:
    """How many phases are alive after a run: hooks of an old one would see parameters of other shapes."""
    import gc

    gc.collect()
    kinds = (Phase, nn.parallel.DistributedDataParallel)
    return sum(type(one) in kinds for one in gc.get_objects())


def accelerated(amp: Any) -> dict[str, Any]:
    """A run whose steps are of 16 examples, if the accelerator accumulates two batches, or if there is none."""
    pairs = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 64, 8)]
    whole = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
    tuned = FineTune(whole, steps=3) if amp is None else FineTune(pairs, steps=3, amp=amp)
    return outcome(
        singe_plugin.prune(
            net(), pairs, target="params=0.4", scoring=Scoring("ig", batches=2), pace=Pace(rounds=1),
            finetune=tuned, repair=None,
        )
    )  # fmt: skip


def command(folder: Path) -> tuple[int, str, list[str]]:
    """``singe prune`` in both processes: its exit code, what it prints, and what the folder holds."""
    words = "prune --model resnet18 --model-kwargs layers=1,1,1,1 --model-kwargs channels=8,8,8,8 --dataset digits"
    words += " --in-chans 1 --img-size 16 --target params=0.4 --rounds 1 --finetune-steps 1 --no-curves --no-repair"
    found = CliRunner().invoke(cli, [*words.split(), "--output", str(folder / "command")])
    distributed.barrier()
    return found.exit_code, found.stdout, sorted(file.name for file in (folder / "command").iterdir())


def everything(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"launched": runs()["ig in rounds"](), "left": distributed.is_initialized()}
    distributed.init_process_group("gloo")
    found |= {name: run() for name, run in runs().items()}
    found["own batches"], found["wrappers"] = own_batches(), wrappers()
    found |= {name: failing(run) for name, run in failures().items()}
    found["resumed"] = runs(out_dir=folder / "one", resume=True)["obs and repair"]()
    found["stopped"] = failing(lambda: runs(out_dir=folder / "two", callbacks=[Stops()])["obs and repair"]())
    if importlib.util.find_spec("sklearn") is not None:
        found["the command"] = command(folder)
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate import Accelerator

        found["accelerated"] = accelerated(Accelerator(cpu=True, gradient_accumulation_steps=2))
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found, file = everything(folder), folder / f"rank{os.environ['RANK']}.pt"
    torch.save(found, file)
    found["alone"] = failing(runs(callbacks=[Dies()])["ig in rounds"])
    torch.save(found, file)
    os._exit(0)  # there is nobody left to end the process group with


if __name__ == "__main__":
    main(Path(sys.argv[1]))
