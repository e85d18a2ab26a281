"""One stranger put through everything: what is removed is what the masked original computes, and it still lives.

``python tests/stranger_trial.py 0 1000`` prints the counts for a range of seeds, and what was wrong.
"""

from __future__ import annotations

import copy
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.errors import BudgetError, SingeError
from singe_plugin.integrations.torch_pruning import SInGEPruner
from singe_plugin.nested import call_model, tensors_in

from stranger_truth import Truth
from strangers import Stranger, stranger

TOLERANCE = 1e-4
MAGNITUDE = tp.importance.MagnitudeImportance


@dataclass
class Outcome:
    """What became of one network.

    Attributes:
        verdict: ``fine``, ``refused``, ``wrong`` or ``crash``.
        detail: of what is not fine.
        groups, removals: how many.
        left_whole: why layers were left whole, one reason each.
    """

    seed: int
    description: str
    verdict: str = "fine"
    detail: str = ""
    groups: int = 0
    removals: int = 0
    left_whole: list[str] = field(default_factory=list)


class Wrong(AssertionError):
    """The pruned network computes something else."""


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    return list(tensors_in(call_model(model, inputs)))


def _double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {k: _double(v) for k, v in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_double(v) for v in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def _change(expected: list[Tensor], found: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(b).all()) or not bool(torch.isfinite(a).all()):
            return float("inf")
        worst = max(worst, float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-12)))
    return worst


def compare(truth: Truth, pruned: nn.Module, inputs: Any) -> None:
    """In double precision: with and without gradients, which take different paths in some layers."""
    masked = truth.model().double()
    expected = _outputs(masked, _double(inputs))  # with gradients: no fused path leaves out the hooks
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            change = _change(expected, [t.double() for t in _outputs(pruned, inputs)])
            if change > 1e-6:
                change = _change(expected, _outputs(copied(pruned).double(), _double(inputs)))
        if change > TOLERANCE:
            raise Wrong(f"pruned and masked differ by {change:.2g}")


def copied(model: nn.Module) -> nn.Module:
    for module in model.modules():  # the old weight norm keeps a tensor that was computed, which cannot be copied
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                module.__dict__[name] = value.detach()
    return copy.deepcopy(model)


def trains(network: Stranger, model: nn.Module) -> None:
    model = copied(model).train()
    loss = sum((t.float() ** 2).mean() for t in _outputs(model, network.inputs))
    assert isinstance(loss, Tensor)
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    model.eval()
    with torch.no_grad():
        _outputs(model, network.inputs)


def remove_unevenly(network: Stranger, pruner: Any, truth: Truth, r: random.Random, outcome: Outcome) -> None:
    """From some layers one unit, from others all but one, from others a number that does not divide."""
    host = pruner.host()
    for number in range(2):
        layers = {layer.name: layer for layer in host.layers()}
        units = {name: layer.units - layer.min_units + 1 for name, layer in layers.items()}
        units = {name: count for name, count in units.items() if count > 1}
        for name in r.sample(sorted(units), r.randint(min(1, len(units)), len(units))):
            most = units[name] - 1
            count = r.choice([1, r.randint(1, most), r.randint(1, max(most // 2, 1)), most if number else 1])
            count = host.allowed({name: count})[name]
            if count:
                host.remove(name, r.sample(range(layers[name].units), count))
                outcome.removals += 1
        compare(truth, network.model, network.fresh_inputs(number, 2 + 2 * number))


def run_by_default(network: Stranger, pruner: Any, truth: Truth, outcome: Outcome) -> None:
    """As a user would: a target, and the shares that the pruner chooses."""
    try:
        plan = pruner.run().plan
    except BudgetError:  # one unit may be more than the target allows
        return
    outcome.removals += sum(count > 0 for count in plan.values())
    compare(truth, network.model, network.fresh_inputs(0, 4))


def attempt(seed: int) -> Outcome:
    """Put one network through everything."""
    network, r = stranger(seed), random.Random(seed)
    outcome = Outcome(seed, network.description)
    trains(network, network.model)  # else the generator is to blame
    truth = Truth(network.model)
    values = {name: p.clone() for name, p in network.model.state_dict().items()}
    try:
        default = r.random() < 0.25
        try:
            pruner = SInGEPruner(
                network.model, network.inputs, MAGNITUDE(), ema=truth.tags,
                target=f"params={r.choice([0.15, 0.3, 0.5])}" if default else None,
            )  # fmt: skip
        except SingeError as error:
            outcome.verdict, outcome.detail = "refused", reason_of(str(error))
            return outcome
        now = network.model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in values.items()), "the model was changed"
        outcome.left_whole = [reason_of(reason) for reason in pruner.left_whole.values()]
        outcome.groups = len(pruner.layers)
        if not pruner.layers:
            outcome.verdict = "refused"
            whole = [x for x in outcome.left_whole if "output" not in x] or outcome.left_whole
            outcome.detail = whole[0] if whole else "no layer is listed"
            return outcome
        if default:
            run_by_default(network, pruner, truth, outcome)
        else:
            remove_unevenly(network, pruner, truth, r, outcome)
        trains(network, network.model)
    except Wrong as error:
        outcome.verdict, outcome.detail = "wrong", str(error)
    except Exception as error:
        outcome.verdict = "crash"
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome.detail = f"{type(error).__name__}: {str(error)[:200]} ({last.filename.split('/')[-1]}:{last.lineno})"
    return outcome


def reason_of(text: str) -> str:
    """A reason without what differs from network to network."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", text)[:110]


def summary(outcomes: Iterable[Outcome]) -> str:
    """The counts, the refusals by reason, and what was wrong."""
    outcomes = list(outcomes)
    verdicts = Counter(o.verdict for o in outcomes)
    lines = [
        f"{len(outcomes)} networks, {sum(o.groups for o in outcomes)} groups, {sum(o.removals for o in outcomes)} "
        f"removals: {verdicts['wrong']} wrong, {verdicts['crash']} crashes, {verdicts['refused']} refused"
    ]
    for verdict in ("wrong", "crash"):
        lines += [f"  {verdict} {o.seed} {o.description}: {o.detail}" for o in outcomes if o.verdict == verdict]
    refused = Counter(o.detail for o in outcomes if o.verdict == "refused")
    lines += [f"  refused x {count}: {reason}" for reason, count in refused.most_common()]
    whole = Counter(reason for o in outcomes for reason in o.left_whole)
    lines += [f"  left whole x {count}: {reason}" for reason, count in whole.most_common()]
    return "\n".join(lines)


def fuzz(seeds: Iterable[int]) -> list[Outcome]:
    return [attempt(seed) for seed in seeds]


if __name__ == "__main__":
    print(summary(fuzz(range(*map(int, sys.argv[1:3])))))
