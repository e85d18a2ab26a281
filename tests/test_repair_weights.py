"""The repair under masks: each row is the ridge regression on the weights that it keeps, and zeros stay zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import singe_plugin
from singe_plugin import FineTune, Pace, Repair, UnstructuredPruner, hold_masks, prune_weights, repair
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.integrations.unstructured import Pattern
from singe_plugin.loop.events import Callback
from singe_plugin.masks import fold_masks, masks_of, plain_weights
from singe_plugin.method import ridge

from small_nets import fail_to_solve, values_of

BATCHES = [(torch.randn(16, 8, generator=torch.Generator().manual_seed(n)), torch.arange(16) % 3) for n in range(4)]


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def error(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((a(x) - b(x)).norm() / b(x).norm())


# -- each row against numpy -------------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "convolution": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False),
}


def columns_of(layer: Any, x: Tensor) -> np.ndarray:
    """What every output's weights are multiplied with, ``[outputs, rows, F]``."""
    if isinstance(layer, nn.Linear):
        return np.stack([x.numpy()] * layer.out_features)
    patches = functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    rows = patches.transpose(1, 2).flatten(0, 1).view(-1, layer.groups, layer.weight[0].numel())
    per = layer.out_channels // layer.groups
    return np.stack([rows[:, o // per].numpy() for o in range(layer.out_channels)])


@pytest.mark.parametrize("held", [True, False], ids=["held", "folded"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_is_the_ridge_regression_on_what_it_keeps(
    kind: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "_ENOUGH", 1e-14)
    r, net = 1e-2, seeded(lambda: nn.Sequential(LAYERS[kind]())).double()
    x = torch.randn(40, 6, *(() if "linear" in kind else (5, 5))).double() + 0.3
    x[:, 0] += x[:, 1]
    pruned = copy.deepcopy(net)
    mask = torch.rand(net[0].weight.shape) > 0.5
    hold_masks(pruned, {"0.weight": mask})
    if not held:
        fold_masks(pruned)
    elif kind == "linear":  # of what is kept, one weight is zero, and yet no mask
        with torch.no_grad():
            row = int(mask.any(1).nonzero()[0])
            pruned[0].parametrizations.weight.original[row, int(mask[row].nonzero()[0])] = 0.0
    start = pruned[0].weight.detach().clone()
    done = repair(pruned, net, [x], Repair(10_000, ridge=r, positions=10_000))
    assert [layer.ridge for layer in done.layers] == [r]
    columns, targets = columns_of(net[0], x), net(x).detach().movedim(1, -1).flatten(0, -2).numpy()
    for row, (design, target) in enumerate(zip(columns, targets.T, strict=True)):
        mine, w0 = mask[row].flatten().numpy(), start[row].flatten().numpy()
        mx, my = (design.mean(0), target.mean()) if net[0].bias is not None else (0 * design[0], 0.0)
        xc = design - mx
        weight = r * (xc**2).sum(0).mean()
        gram = xc[:, mine].T @ xc[:, mine] + weight * np.eye(mine.sum())
        right = xc[:, mine].T @ (target - my - xc @ w0)
        expected = w0[mine] + np.linalg.solve(gram, right)
        found = pruned[0].weight[row].flatten().detach().numpy()
        np.testing.assert_allclose(found[mine], expected, atol=1e-8)
        assert not found[~mine].any()
        if net[0].bias is not None:
            assert pruned[0].bias[row].item() == pytest.approx(my - mx[mine] @ expected, abs=1e-8)


def test_masks_are_the_same_objects_and_what_lies_behind_them_stays() -> None:
    net, x = seeded(chain), torch.cat([x for x, _ in BATCHES])
    pruned = copy.deepcopy(net)
    hold_masks(pruned, {"2.weight": torch.rand(12, 16) > 0.5})
    layer = pruned[2]
    stored = layer.parametrizations.weight.original
    mask = layer.parametrizations.weight[0].mask
    with torch.no_grad():
        stored[~mask] = 7.0  # an optimizer with momentum leaves something there
    parts, kept = [id(m) for m in pruned.modules()], stored.detach().clone()
    names, classes = list(pruned.state_dict()), [type(m) for m in pruned.modules()]
    before = error(pruned, net, x)
    done = repair(pruned, net, [x])
    assert [layer.name for layer in done.layers] == ["2.weight", "4.weight"]
    assert error(pruned, net, x) < 0.9 * before
    assert [id(m) for m in pruned.modules()] == parts
    assert ([type(m) for m in pruned.modules()], list(pruned.state_dict())) == (classes, names)
    assert layer.parametrizations.weight.original is stored
    assert torch.equal(stored[~mask], kept[~mask])
    assert not torch.equal(stored[mask], kept[mask])
    assert not layer.weight[~mask].any()


def test_a_mask_beside_another_parametrization_comes_off_alone() -> None:
    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    net = seeded(chain)
    hold_masks(net, {"0.weight": torch.rand(16, 8) > 0.5})
    parametrize.register_parametrization(net[0], "bias", Doubled())
    x = BATCHES[0][0]
    with torch.no_grad():
        expected, kind, names = net(x), type(net[0]), list(net.state_dict())
        with plain_weights(net) as masks:
            assert list(masks) == ["0.weight"]
            assert isinstance(net[0].weight, nn.Parameter)
            assert torch.equal(net(x), expected)
        assert torch.equal(net(x), expected)
    assert (type(net[0]), list(net.state_dict())) == (kind, names)


def test_what_was_masked_before_stays_masked_whatever_else_is_removed() -> None:
    """Masks of an earlier pruning are in the original, too: they are no zeros that came since."""
    net, x = seeded(chain), torch.cat([x for x, _ in BATCHES])
    hold_masks(net, {f"{n}.weight": torch.rand_like(net[n].weight) > 0.3 for n in (2, 4)})
    smaller = copy.deepcopy(net)
    pruner = singe_plugin.SInGEPruner(
        smaller, x, lambda group: torch.arange(group.axis_group.size), batches=BATCHES, repair=64,
        target="params=0.33", pace=Pace(ratios="uniform"),
    )  # fmt: skip
    outcome = pruner.run()
    assert {"2.weight", "4.weight"} <= set(outcome.history.select("repaired")[-1]["layers"])
    for name, mask in masks_of(smaller).items():
        assert not smaller.get_submodule(name.rpartition(".")[0]).weight[~mask].any()
        assert 0.1 < float((~mask).float().mean()) < 0.5


# -- in a run ---------------------------------------------------------------------------------------------------------


def pruned(every: str = "end", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "sparsity": 0.6, "scoring": "l1", "pace": Pace(rounds=3), "finetune": 0, "repair": Repair(64, every=every),
    }  # fmt: skip
    return prune_weights(seeded(chain), BATCHES, **{**settings, **options})


def test_a_run_repairs_once_at_the_end_or_after_every_round() -> None:
    plain, x = pruned(repair=None), torch.cat([x for x, _ in BATCHES])
    assert plain.options["repair"] is None
    assert not plain.history.select("repaired")
    for name, mask in plain.weight_masks.items():  # nothing but the masks has changed
        assert torch.equal(plain.model.get_parameter(name), torch.where(mask, seeded(chain).get_parameter(name), 0.0))
    for every, times in (("end", 1), ("round", 3)):
        result = pruned(every)
        rows = [row["event"] for row in result.history.rows]
        assert rows.count("repaired") == times
        assert result.options["repair"]["every"] == every
        events = result.history.select("repaired")[-1]["layers"]
        assert list(events) == ["0.weight", "2.weight", "4.weight"]
        assert all(row["after"] <= row["before"] for row in events.values())
        assert error(result.model, seeded(chain), x) < 0.7 * error(plain.model, seeded(chain), x)
        assert result.weight_sparsity == pytest.approx(0.6, abs=5e-3)
        for name, mask in result.weight_masks.items():
            assert not result.model.get_parameter(name)[~mask].any()


def test_nothing_is_repaired_by_default_where_fine_tuning_is_entwined() -> None:
    for finetune, expected in ((3, None), (0, 512), (FineTune(steps=3, every="end"), 512)):
        result = pruned(finetune=finetune, repair="auto")
        assert (result.options["repair"] or {}).get("images") == expected
        assert len(result.history.select("repaired")) == (expected is not None)


def test_algorithm_1_repairs_after_every_layer() -> None:
    result = pruned("round", pace=Pace("layers", units_per_step=0.5))
    assert len(result.history.select("repaired")) == 3


def test_a_pattern_stays_a_pattern() -> None:
    result = pruned(sparsity="2:4", pace=Pace(rounds=1))
    assert result.history.select("repaired")
    for name in ("0.weight", "2.weight", "4.weight"):
        weight = result.model.get_parameter(name).detach()
        assert bool((weight.view(-1, 4).ne(0).sum(1) <= 2).all())
    assert Pattern.parse(result.options["pattern"]) == Pattern(2, 4)


class Interrupt(Callback):
    def __init__(self, count: int) -> None:
        self.left = count

    def on_repaired(self, event: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("every", ["end", "round"])
def test_an_interrupted_run_resumes_to_the_same_bits(every: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"finetune": FineTune(steps=6, every="layer"), "out_dir": tmp_path}
    whole = pruned(every, **options | {"out_dir": None})
    stop = Interrupt(1 if every == "end" else 2)
    with pytest.raises(KeyboardInterrupt):
        pruned(every, **options, callbacks=[stop])
    again = pruned(every, **options, resume=True)
    assert all(torch.equal(value, values_of(again.model)[n]) for n, value in values_of(whole.model).items())
    assert len(again.history.select("repaired")) == len(whole.history.select("repaired"))
    with pytest.raises(singe_plugin.ArtifactError, match="repair"):
        pruned(every, **options, resume=True, repair=None)


def test_a_repair_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = seeded(chain)
    hold_masks(net, {"2.weight": torch.rand(12, 16) > 0.2})
    before, ids, classes = values_of(net), [id(p) for p in net.parameters()], [type(m) for m in net.modules()]
    fail_to_solve(monkeypatch, "4.weight")
    pruner = UnstructuredPruner(net, BATCHES, sparsity=0.5, scoring="l1", repair=64)
    with pytest.raises(RuntimeError, match="mine"):
        pruner.run()
    assert [id(p) for p in net.parameters()] == ids
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(value, values_of(net)[n]) for n, value in before.items())
    monkeypatch.undo()
    assert pruner.run().sparsity == pytest.approx(0.5, abs=5e-3)


def test_the_pruner_repairs_on_request_and_towards_the_unpruned_network_every_time() -> None:
    net, x = seeded(chain), torch.cat([x for x, _ in BATCHES])
    found = {}
    for chosen in (None, 64):
        model, ema = copy.deepcopy(net), copy.deepcopy(net)
        tuning = FineTune(BATCHES, 1, "end", optimizer=lambda p: torch.optim.SGD(p, 0.0), ema=ema)
        pruner = UnstructuredPruner(model, BATCHES, sparsity=0.4, scoring="l1", repair=chosen, finetune=tuning)
        pruner.run()
        pruner.sparsity = 0.6
        outcome = pruner.run()
        assert outcome.sparsity == pytest.approx(0.6, abs=5e-3)
        found[chosen] = error(model, net, x)
        pruner.fold()
        assert all(torch.allclose(v, values_of(ema)[n], atol=1e-6) for n, v in values_of(model).items())
    assert found[64] < 0.7 * found[None]
    with pytest.raises(DataError, match="repair needs images: give UnstructuredPruner batches"):
        UnstructuredPruner(copy.deepcopy(net), scoring="l1", repair=8)
    with pytest.raises(ConfigError, match="repair must be a Repair, or its images"):
        UnstructuredPruner(copy.deepcopy(net), BATCHES, repair="yes")  # type: ignore[arg-type]
