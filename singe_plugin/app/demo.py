"""``singe demo``: train a small residual network on real digits, prune it four ways, show what is left.

Settings are fixed: nothing is chosen by looking at the validation images.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from singe_plugin.app.cli import typed_command
from singe_plugin.app.datasets import Splits, data_config, digits
from singe_plugin.app.inspection import figure_two
from singe_plugin.app.plots import Point
from singe_plugin.app.report import Table, write_report
from singe_plugin.errors import ArtifactError
from singe_plugin.files import write_atomically
from singe_plugin.loop.finetune import FineTune
from singe_plugin.loop.pace import Pace
from singe_plugin.loop.survivors import repair
from singe_plugin.run.architecture import Builder
from singe_plugin.run.artifact import load, save
from singe_plugin.run.data import evaluate
from singe_plugin.run.latency import measure_latency
from singe_plugin.run.result import Result
from singe_plugin.state import RngState, preserved
from singe_plugin.tables import markdown_table

__all__ = ["METHODS", "Demo", "DemoSettings", "run_demo"]

METHODS = {"SInGE": "ig", "obs (default)": "obs", "l2": "l2", "Taylor (torch-pruning)": None}
Bare = tuple[float | None, float | None]
"""Accuracies without training: as pruned, and repaired."""
HONESTY = "one seed: an illustration, not a comparison"
_HEADER = ("", "parameters", "MACs", "as pruned", "repaired", "fine-tuned", "ms per batch of 64")


@dataclass(frozen=True)
class DemoSettings:
    """The fixed settings of the demo.

    Attributes:
        img_size: the digits are scaled up to this.
        channels: widths of the network's four stages.
        train_steps, lr: of the training from scratch (SGD, one-cycle schedule, batches of 64).
        targets: fractions of the parameters to remove.
        finetune_steps, finetune_lr: of the fine-tuning, which starts from the repaired network.
    """

    img_size: int = 24
    channels: tuple[int, ...] = (16, 32, 64, 128)
    train_steps: int = 240
    lr: float = 0.1
    targets: tuple[float, ...] = (0.5, 0.75)
    finetune_steps: int = 120
    finetune_lr: float = 0.02

    @classmethod
    def quick(cls) -> DemoSettings:
        """A few seconds' worth, for tests: the accuracies mean nothing."""
        return cls(16, (8, 16, 24, 32), 40, 0.1, (0.5,), 10, 0.02)


@dataclass(frozen=True)
class DemoRow:
    """One pruned network: who chose the units, and what is left.

    Attributes:
        accuracy_pruned, accuracy_repaired, accuracy: top-1 in [0, 1] right after pruning, with the survivors repaired,
            and fine-tuned from there.
        latency_ms: time for a batch of 64, of the fine-tuned network.
    """

    method: str
    target: float
    params: int
    macs: int
    accuracy_pruned: float | None
    accuracy_repaired: float | None
    accuracy: float | None
    latency_ms: float | None


@dataclass
class Demo:
    """What the demo found.

    Attributes:
        baseline: the trained network.
        rows: one per method and target.
        seconds: of everything.
        reloaded: whether the saved network computed the same bits after loading.
        files: what was written.
    """

    baseline: DemoRow
    rows: list[DemoRow]
    seconds: float = 0.0
    reloaded: bool = False
    files: list[Path] = field(default_factory=list)

    def table(self) -> str:
        """The before/after table, Markdown that reads as text."""
        return markdown_table(_HEADER, [_cells(r) for r in [self.baseline, *self.rows]])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "note": HONESTY,
            "baseline": asdict(self.baseline),
            "rows": [asdict(r) for r in self.rows],
            "reloaded_identically": self.reloaded,
            "seconds": self.seconds,
            "files": [str(f) for f in self.files],
        }


def run_demo(
    output: str | Path,
    seed: int = 0,
    quick: bool = False,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> Demo:
    """Train, prune, compare, save and report, on one CPU thread.

    Args:
        output: the folder for the report, the plots and the pruned network.
        seed: of the initial weights, the split and the batches.
        quick: a far smaller version, for tests.
        say: gets one line of text at a time.
        progress: show a bar while training.

    Raises:
        DataError: if scikit-learn is missing.
        ArtifactError: if the saved network does not compute what it did.
    """
    from singe_plugin.files import make_folder

    started = time.perf_counter()
    settings = DemoSettings.quick() if quick else DemoSettings()
    rng, threads = RngState.capture(), torch.get_num_threads()
    torch.set_num_threads(1)  # more gain little on a network this small, and would change the last bits
    try:
        return _run(make_folder(output), seed, settings, say, progress, started)
    finally:
        torch.set_num_threads(threads)
        rng.restore()


def _run(
    output: Path, seed: int, settings: DemoSettings, say: Callable[[str], None], progress: bool, started: float
) -> Demo:
    builder = Builder.timm(
        "resnet18", layers=[1, 1, 1, 1], channels=list(settings.channels), stem_type="deep", stem_width=8, in_chans=1,
        num_classes=10,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = builder.build()
    splits = digits(data_config(network, settings.img_size), seed=seed)
    say(f"training a {sum(p.numel() for p in network.parameters()):,}-parameter timm residual network on {splits.name}")
    train(network, splits, settings, seed, progress)
    say(f"trained: top-1 accuracy {evaluate(network, _validation(splits)) or 0:.1%} on the validation images")
    results: dict[tuple[str, float], tuple[Bare, Result]] = {}
    for target in settings.targets:
        for method in METHODS:
            verify = not results  # the groups are the same ones every time
            results[method, target] = _prune_both(network, splits, method, target, settings, builder, seed, verify)
            (bare, repaired), tuned = results[method, target]
            found = ", ".join(f"{a or 0:.1%}" for a in (bare, repaired, tuned.after.accuracy))
            say(f"{method}, {target:.0%} of the parameters removed: as pruned, repaired and fine-tuned {found}")
    before = next(iter(results.values()))[1].before
    times = latencies([network, *(tuned.model for _, tuned in results.values())], splits)
    demo = Demo(
        DemoRow("unpruned", 0.0, before.params, before.macs, *(before.accuracy,) * 3, times[0]),
        [_row(*key, *pair, ms) for (key, pair), ms in zip(results.items(), times[1:], strict=True)],
    )
    saved = results["SInGE", 0.5][1]
    save(saved, output / "pruned")
    demo.reloaded = computes_the_same(saved.model, load(output / "pruned").model, splits)
    if not demo.reloaded:
        raise ArtifactError(f"{output / 'pruned'} was reloaded and does not compute what was saved")
    trained = {k: v.contiguous() for k, v in network.state_dict().items()}
    write_atomically(output / "trained.safetensors", partial(save_file, trained))
    curves = figure_two(network, splits.train, seed=seed)
    points = [Point("unpruned", 0.0, float(before.accuracy or 0))]
    points += [Point(r.method, 1 - r.params / before.params, float(r.accuracy or 0)) for r in demo.rows]
    demo.seconds = time.perf_counter() - started
    intro = [f"{HONESTY.capitalize()}. Seed {seed}, {splits.name}, settings fixed beforehand."]
    intro.append("What is reported in full is the network that SInGE pruned by half.")
    tables = [
        Table("Four ways to choose what goes", _HEADER, tuple(tuple(_cells(r)) for r in [demo.baseline, *demo.rows]))
    ]
    extra = {"demo": demo.as_dict(), "command": typed_command()}
    demo.files = write_report(saved, output, points, curves, "SInGE demo", intro, tables, extra)
    demo.files += [output / "pruned", output / "trained.safetensors"]
    return demo


def train(network: nn.Module, splits: Splits, settings: DemoSettings, seed: int, progress: bool) -> None:
    """Train from scratch: SGD with momentum, one-cycle schedule."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(splits.train, batch_size=64, shuffle=True, drop_last=True, generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=settings.train_steps)
    network.train()
    bar = tqdm(
        total=settings.train_steps, desc="training", unit="step", disable=None if progress else True, leave=False
    )
    done = 0
    while done < settings.train_steps:
        for images, labels in loader:
            if done == settings.train_steps:
                break
            loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update()
            done += 1
    bar.close()
    network.eval()


def computes_the_same(first: nn.Module, second: nn.Module, splits: Splits) -> bool:
    """Whether two networks give the same bits for the validation images."""
    with preserved(first), preserved(second), torch.no_grad():
        first.eval(), second.eval()
        return all(torch.equal(first(images), second(images)) for images, _ in _validation(splits))


def _validation(splits: Splits) -> Iterable[Any]:
    return DataLoader(splits.val, batch_size=250)


def _prune_both(
    network: nn.Module,
    splits: Splits,
    method: str,
    target: float,
    settings: DemoSettings,
    builder: Builder,
    seed: int,
    verify: bool,
) -> tuple[Bare, Result]:
    """The accuracies without training, as pruned and repaired, and the same removal with repair and fine-tuning."""
    from singe_plugin.integrations.prune import prune

    def once(steps: int, verify: bool, **options: Any) -> Result:
        model = copy.deepcopy(network)
        pruned: Result = prune(
            model, splits.train, target=f"params={target}", scoring=METHODS[method] or _taylor(),
            finetune=FineTune(steps=steps, lr=settings.finetune_lr), val_data=_validation(splits), seed=seed,
            device="cpu", pace=Pace(verify=verify), **options,
        )  # fmt: skip
        pruned.builder = builder
        return pruned

    bare = once(0, False, repair=None)
    generator = torch.Generator().manual_seed(seed)
    images = DataLoader(splits.train, batch_size=64, shuffle=True, generator=generator)
    repair(bare.model, network, images, seed=seed)
    without = bare.after.accuracy, evaluate(bare.model, _validation(splits))
    return without, once(settings.finetune_steps, verify)


def _taylor() -> Any:
    import torch_pruning

    # units of different layers are compared, so the scores are not divided by the group's mean
    return torch_pruning.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None)


def latencies(networks: Sequence[nn.Module], splits: Splits, rounds: int = 3) -> list[float]:
    """Milliseconds for a batch of 64, the networks in turn: the least of a few medians, as other work only adds."""
    images, _ = next(iter(DataLoader(splits.val, batch_size=64)))
    found = [[measure_latency(network, images, repeats=7, warmup=1) for network in networks] for _ in range(rounds)]
    return [min(times) for times in zip(*found, strict=True)]


def _row(method: str, target: float, bare: Bare, tuned: Result, latency_ms: float) -> DemoRow:
    after = tuned.after
    return DemoRow(method, target, after.params, after.macs, *bare, after.accuracy, latency_ms)


def _cells(row: DemoRow) -> list[str]:
    percent = ["-" if a is None else f"{a:.1%}" for a in (row.accuracy_pruned, row.accuracy_repaired, row.accuracy)]
    latency = "-" if row.latency_ms is None else f"{row.latency_ms:.2f}"
    name = row.method if not row.target else f"{row.method}, -{row.target:.0%}"
    return [name, f"{row.params:,}", f"{row.macs:,}", *percent, latency]
