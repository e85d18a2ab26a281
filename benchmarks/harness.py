"""One row of a table: prune a network by a method to a target, measure, fine-tune, measure.

Every method goes through one code path (:func:`singe_plugin.prune`, :func:`singe_plugin.prune_weights`), one
fine-tuning recipe and one budget. A row is identified by its :class:`Spec`; it is stored as soon as it is there.
"""

from __future__ import annotations

import copy
import inspect
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch.utils.data import DataLoader

import singe_plugin
from singe_plugin.loop.pace import BY_SCORE, Pace
from singe_plugin.loop.tuner import Tuner
from singe_plugin.method.folding import fold_batchnorm
from singe_plugin.method.options import Scoring
from singe_plugin.run.data import evaluate
from singe_plugin.state import model_device

from graphs import graphed_loss
from records import append, environment, peak_mb, read
from settings import Setting

__all__ = [
    "BASE", "COMPARED", "CROSSED", "DATA_FREE", "DEPTHWISE_TARGETS", "HIGHER_RATE", "LAYERS", "MORE_DATA", "NETWORKS",
    "OURS", "PAPER", "PEERS", "PEER_TARGETS", "RATE", "RATED", "RATES", "Spec", "accuracy", "compute", "run_rows",
]  # fmt: skip

PAPER = ("l1", "l2", "grad", "norm_grad", "sg", "ig")
OURS = (*PAPER, "ig_abs")
PEERS: dict[str, Callable[..., Any]] = {
    "random": tp.importance.RandomImportance,
    "magnitude_l1": partial(tp.importance.MagnitudeImportance, p=1),
    "magnitude_l2": partial(tp.importance.MagnitudeImportance, p=2),
    "bn_scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.TaylorImportance,
    "hessian": tp.importance.HessianImportance,
    "obdc": tp.importance.OBDCImportance,
}
DATA_FREE = ("l1", "l2", "magnitude_l1", "magnitude_l2", "bn_scale", "lamp", "fpgm")  # no seed changes them
PEER_TARGETS = (0.5, 0.75, 0.9)
DEPTHWISE_TARGETS = (0.3, 0.4, 0.5, 0.75, 0.9)  # the paper's Table 5, and the peers'
NETWORKS = {"resnet56": PEER_TARGETS, "resnet56_converged": PEER_TARGETS, "mobilenetv2_035": DEPTHWISE_TARGETS}
# of every row; a row's options replace it
BASE: dict[str, Any] = {
    "order": "rounds", "rounds": 4, "ratios": "per_cost", "mu": 0.95, "nodes": 3, "scoring_batch_count": 1,
    "min_width": 1,
}  # fmt: skip
# the paper's order: one layer after the other, each scored once; a ratio per block
LAYERS: dict[str, Any] = {"order": "layers", "units_per_step": "layer", "ratios": "block"}
# what the ablation chose on held-out images for the criteria that gain from more data
MORE_DATA: dict[str, dict[str, Any]] = {
    "ig": {"nodes": 1, "scoring_batch_count": 4},
    "ig_abs": {"nodes": 1, "scoring_batch_count": 4},
    "taylor": {"scoring_batch_count": 4},
}
# whose widths -> whose units -> the options of such a row
CROSSED: dict[str, dict[str, dict[str, Any]]] = {
    other: {method: {} if method == other else {"widths_of": other} for method in ("taylor", "ig_abs", "random")}
    for other in ("taylor", "ig_abs")
}
RATE, HIGHER_RATE = 0.01, 0.03  # of the fine-tuning, where nothing is said; and what the ablation of rates says
# what is fine-tuned for the learning rates: whose pruning, to which target, and fine-tuned when
RATES = (0.01, 0.03, 0.1, 0.003)
RATED: dict[str, tuple[str, float, str, dict[str, Any]]] = {
    "rounds": ("magnitude_l2", 0.9, "post", {}), "layers": ("ig", 0.9, "post", LAYERS),
    "layers, entwined": ("ig", 0.9, "layer", LAYERS), "rounds, less": ("magnitude_l2", 0.5, "post", {}),
}  # fmt: skip
# the same for the leads and for Table 2 on the test images, at HIGHER_RATE
COMPARED: list[tuple[str, float, str, dict[str, Any]]] = [
    (method, target, "post", MORE_DATA[method] if method == "ig_abs" else {})
    for target in (0.75, 0.9) for method in ("ig_abs", "taylor", "magnitude_l2")
] + [("ig", 0.9, every, LAYERS) for every in ("post", "layer")]  # fmt: skip
# what a row's options are called -> the fields of the library's options
OF_CRITERION = {name: name for name in ("mu", "p", "nodes", "quadrature", "steps", "path", "group_reduction")}
OF_DATA = {"objective": "objective", "scoring_batch_size": "batch_size", "scoring_batch_count": "batches"}
OF_PACE = {"schedule": "course"} | {
    name: name for name in ("ratios", "units_per_step", "order", "rounds", "max_pruning_ratio", "min_width")
}


def pace_of(options: dict[str, Any]) -> Pace:
    """The pace of a row's options. Widths are as they come, so that the figures are the criteria's alone."""
    return Pace(**{"round_to": 1} | taken(options, OF_PACE))


def taken(options: dict[str, Any], *names: dict[str, str]) -> dict[str, Any]:
    """Those of a row's options that have a name there, under that name."""
    return {new: options[old] for table in names for old, new in table.items() if old in options}


@dataclass(frozen=True)
class Spec:
    """What a row is.

    Attributes:
        network: the name of the setting.
        method: a criterion of ours, a peer, or ``"none"``: the network as it is.
        target: the fraction of the parameters (of the single weights) that goes.
        seed: of the scoring batch and everything else random.
        steps, every: fine-tuning; ``"post"`` is after pruning, the others are entwined.
        options: what differs from ``BASE``; ``widths_of`` names a method that decides how many units of each layer go,
            so that this row's only decides which ones; ``lr`` is the fine-tuning's learning rate, ``RATE`` by default.
        split: ``"test"``, or ``"held_out"`` for choices.
        granularity: ``"channel"`` or ``"weight"``.
        batch: of the fine-tuning; 0 where there is none.
    """

    network: str
    method: str
    target: float
    seed: int
    steps: int = 0
    every: str = "post"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    split: str = "test"
    granularity: str = "channel"
    batch: int = 0

    @property
    def entwined(self) -> bool:
        """Whether it is fine-tuned while it is pruned."""
        return self.every != "post" and self.steps > 0

    @property
    def key(self) -> str:
        """Equal for rows that compute the same."""
        return json.dumps(asdict(self), sort_keys=True)


class _Clock(singe_plugin.Callback):
    """Adds up what scoring takes."""

    def __init__(self) -> None:
        self.seconds, self.times = 0.0, 0

    def on_layer_scored(self, event: Any) -> None:
        self.seconds += event.seconds
        self.times += 1


def scoring_of(method: str, options: dict[str, Any], classes: int) -> Scoring:
    """What a method's name means: a criterion of ours, or a peer.

    Torch-pruning takes the mean over the layers of a group and divides the scores by the group's mean; where units of
    different layers are compared, or the widths come from that, this is the sum instead, not divided (it helps all of
    them; LAMP's own normalisation is made for comparing, and stays).
    """
    if method == "fast":
        return replace(Scoring.fast(), **taken(options, OF_DATA))
    if method not in PEERS:
        return Scoring(method, **taken(options, OF_CRITERION, OF_DATA))
    known = inspect.signature(PEERS[method]).parameters
    given: dict[str, Any] = {"num_classes": classes} if "num_classes" in known else {}
    compared = "widths_of" in options or options["ratios"] in BY_SCORE
    if compared and "normalizer" in known and method != "lamp":
        given |= {"normalizer": None, "group_reduction": "sum"}
    return Scoring(PEERS[method](**given), **taken(options, OF_DATA))


def compute(spec: Spec, setting: Setting) -> dict[str, Any]:
    """Run one row: what was removed, the accuracies, the cost of scoring and of pruning."""
    start, clock = time.perf_counter(), _Clock()
    if spec.method == "none":
        return {"pruned": accuracy(spec.split, setting, setting.make())}
    run = _weights if spec.granularity == "weight" else _channels
    result, row = run(spec, setting, clock)
    pruned = time.perf_counter() - start
    row |= {"scoring_seconds": clock.seconds, "scorings": clock.times}
    row["tuned" if spec.entwined else "pruned"] = accuracy(spec.split, setting, result.model)
    if spec.steps and not spec.entwined:
        torch.manual_seed(spec.seed)
        options = finetuning(setting, spec, spec.steps, "end")
        try:
            fine_tune(result.model, options)
            row["tuned"] = accuracy(spec.split, setting, result.model)
        except singe_plugin.SingeError as error:  # what was measured before stays
            row["error"] = _text(error)
    return row | {"pruning_seconds": pruned}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def fine_tune(model: Any, options: singe_plugin.FineTune) -> None:
    """All steps of a fine-tuning, on a network that nothing more is removed from."""
    tuner = Tuner(options)
    tuner.prepare(model)
    tuner.run(model, options.steps, singe_plugin.Callback())


def finetuning(setting: Setting, spec: Spec, steps: int, every: str) -> singe_plugin.FineTune:
    """The recipe: the library's defaults, but for ``lr``; on a GPU with the loss as a graph, in channels-last."""
    loader = DataLoader(setting.train, spec.batch or 1, shuffle=True, drop_last=True)
    graph, rate = graphed_loss(), spec.options.get("lr", RATE)
    return singe_plugin.FineTune(loader, steps, every, lr=rate, step_fn=graph, channels_last=graph is not None)


def _channels(spec: Spec, setting: Setting, clock: _Clock) -> tuple[Any, dict[str, Any]]:
    options = BASE | spec.options
    if "widths_of" in options:
        first, _ = _pruned(replace(spec, method=options["widths_of"], steps=0, batch=0), setting, options, _Clock())
        options["ratios"] = {row.name: 1 - row.units_after / row.units_before for row in first.layers}
    return _pruned(spec, setting, options, clock)


def _pruned(spec: Spec, setting: Setting, options: dict[str, Any], clock: _Clock) -> tuple[Any, dict[str, Any]]:
    if options["order"] == "layers":
        options = {k: v for k, v in options.items() if k != "rounds"}
    scoring = scoring_of(spec.method, options, setting.classes)
    during = (spec.steps, spec.every) if spec.entwined else (0, "end")
    result = singe_plugin.prune(
        setting.make(), setting.train, target=f"params={spec.target}", scoring=scoring, seed=spec.seed,
        pace=pace_of(options), finetune=finetuning(setting, spec, *during), callbacks=[clock],
        fold=options.get("fold", False), repair=None,
    )  # fmt: skip
    passes = scoring.passes if isinstance(scoring.criterion, str) else None
    return result, {
        "removed_params": result.removed_params, "removed_macs": result.removed_macs, "passes_per_scoring": passes,
    }  # fmt: skip


def _weights(spec: Spec, setting: Setting, clock: _Clock) -> tuple[Any, dict[str, Any]]:
    options = dict(spec.options)
    amount = options.pop("pattern", spec.target)
    result = singe_plugin.prune_weights(
        setting.make(), setting.train, scoring=Scoring(spec.method, **taken(options, OF_CRITERION, OF_DATA)),
        pace=Pace(**taken(options, OF_PACE)), seed=spec.seed, finetune=0, callbacks=[clock], sparsity=amount,
        repair=None,
    )  # fmt: skip
    return result, {"masked": result.weight_sparsity, "removed_macs": result.removed_macs}


def accuracy(split: str, setting: Setting, model: Any) -> float:
    """Of a copy with its batch-norms folded: the same function to rounding, in about half the time on a CPU."""
    images = setting.test if split == "test" else setting.held_out
    quick = copy.deepcopy(model)
    fold_batchnorm(quick, images[0][0][None].to(model_device(model)))
    return float(evaluate(quick.to(memory_format=torch.channels_last), DataLoader(images, 125)) or 0.0)


def done(rows: Iterable[dict[str, Any]]) -> set[str]:
    """The keys of what needs no computing: the stored rows, and what those fine-tuned after pruning hold besides."""
    names, keys = {f.name for f in fields(Spec)}, set()
    for row in rows:
        spec = Spec(**{name: row[name] for name in names})
        keys.add(spec.key)
        if not spec.entwined and ("pruned" in row or "error" in row):
            keys.add(replace(spec, steps=0, batch=0).key)
    return keys


def run_rows(specs: Iterable[Spec], setting: Setting, path: Path) -> None:
    """Compute the rows that are not stored yet, one after the other."""
    specs = list(specs)
    # environment: of the code that runs, whatever is committed meanwhile
    about = {"data": setting.data, "weights": setting.weights, **environment()}
    for number, spec in enumerate(specs):
        if spec.key in done(read(path)):
            continue  # read anew each time: other processes write too
        start = time.perf_counter()
        try:
            found = compute(spec, setting)
        except singe_plugin.SingeError as error:
            found = {"error": _text(error)}
        found |= {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
        append(path, {"key": spec.key, **asdict(spec), **found, **about})
        shown = {k: found[k] for k in ("removed_params", "pruned", "tuned", "error") if k in found}
        print(f"[{number + 1}/{len(specs)}] {spec.method} {spec.target:g} seed {spec.seed} {spec.steps} {spec.every} "
              f"{spec.options}: {shown} {found['seconds']:.0f} s", flush=True)  # fmt: skip
