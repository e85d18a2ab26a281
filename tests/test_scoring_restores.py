"""Scoring leaves no trace: the model is bit for bit what it was, after success and after a failure at any point."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin.errors import DataError, ScoringError
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import path_gradient_norms, score_error, score_units
from singe_plugin.method.units import Producer, Slot, UnitGroup
from singe_plugin.state import RngState

from references import Net

WAYS: dict[str, dict[str, Any]] = {
    "layer": {"path": "layer", "nodes": 2},
    "units at once": {"path": "neuron", "nodes": 2, "unit_batch": 2},
    "unit by unit": {"path": "neuron", "nodes": 1, "unit_batch": 1},
}
CRITERIA = ("l1", "l2", "lp", "grad", "norm_grad", "sg", "ig", "ig_abs")


class Boom(Exception):
    """An error that no library raises."""


class Fuse:
    """Counts calls and raises at one of them."""

    def __init__(self) -> None:
        self.calls, self.at, self.error = 0, -1, Boom

    def set(self, at: int, error: Any) -> None:
        self.calls, self.at, self.error = 0, at, error

    def tick(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error


class Tally:
    """Counts the calls of a hook."""

    calls = 0

    def hear(self, *_: Any) -> None:
        self.calls += 1


class Tripwire(torch.autograd.Function):
    """The identity, with a fuse in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, fuse: Fuse) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.fuse = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.fuse.tick()
        return grad.clone(), None


class Lived(nn.Module):
    """A model in the middle of its life: frozen parts, hooks, gradients, counters, modes that differ.

    torch.func, which evaluates units at once, knows neither full backward hooks nor buffers that change in place.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.plain = way != "units at once"
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.mid = nn.Conv2d(4, 4, 1, bias=False)
        self.bn_frozen = nn.BatchNorm2d(4)
        self.pre = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(16, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.heard = Tally().hear
        self.forward_tick, self.backward_tick = Fuse().tick, Fuse().tick  # methods: what counts is not put back
        for norm in (self.bn, self.bn_frozen, self.pre):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        self.bn_frozen.eval().requires_grad_(False)
        self.head.bias.requires_grad_(False)
        self.conv.weight.grad = torch.randn_like(self.conv.weight)
        self.head.weight.grad = torch.zeros_like(self.head.weight)
        self.mid.register_forward_hook(self.heard)
        self.head.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
        if self.plain:
            self.head.register_full_backward_hook(lambda *_: None)

    @property
    def forward_fuse(self) -> Fuse:
        return self.forward_tick.__self__

    @property
    def backward_fuse(self) -> Fuse:
        return self.backward_tick.__self__

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            self.count += 1
        else:
            self.count = self.count + 1
        x = self.drop(torch.relu(self.bn(self.conv(x))))
        self.forward_tick()
        x = x + self.bn_frozen(self.mid(x))
        x = Tripwire.apply(x, self.backward_fuse)
        return self.head(self.pre(x).relu().flatten(1))

    def group(self) -> UnitGroup:
        rows = torch.arange(4)

        def producer(name: str, **norm: Any) -> Producer:
            layer = getattr(self, name)
            return Producer(name, (Slot(layer, "weight"), Slot(layer, "bias")), rows, rows, **norm)

        members = producer("conv", norm=self.bn), producer("mid", norm=self.bn_frozen), producer("pre", is_norm=True)
        return UnitGroup("conv", 4, members)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that can be seen, by identity and by value."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name} mode"] = module.training
        for table in (key for key in vars(module) if key.endswith("_hooks") or "_hooks_" in key):
            seen[f"{name} {table}"] = [(key, id(hook)) for key, hook in getattr(module, table).items()]
        for kind in ("_parameters", "_buffers"):
            seen[f"{name} {kind}"] = list(getattr(module, kind))
            for key, tensor in getattr(module, kind).items():
                if tensor is not None:
                    grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.numpy().tobytes())
                    value = tensor.detach().numpy().tobytes()
                    seen[f"{name} {key}"] = (id(tensor), value, tensor.stride(), tensor.requires_grad, grad)
                else:
                    seen[f"{name} {key}"] = None
    return seen


def draws() -> list[float]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]


class Loader:
    """Batches that draw from every generator, as an augmenting data loader does, and may fail."""

    def __init__(self, fuse: Fuse | None = None) -> None:
        self.fuse = fuse

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            if self.fuse is not None:
                self.fuse.tick()
            draws()
            yield torch.randn(2, 2, 4, 4), torch.randint(0, 3, (2,))


def options(way: str, criterion: str = "ig", **more: Any) -> Scoring:
    return Scoring(criterion=criterion, **WAYS[way], **more)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_success_leaves_no_trace(outer: Any, way: str, criterion: str) -> None:
    model = Lived(way)
    before, rng = photograph(model), RngState.capture()
    with outer():
        scores = score_units(model, model.group(), Loader(), options(way, criterion))
    assert photograph(model) == before
    assert model.conv.bias is None
    assert model.mid.bias is None
    assert model.pre.weight is None
    assert scores.min() > 0
    after = draws()
    rng.restore()
    assert draws() == after


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", [{"amp": "bf16"}, {"channels_last": True}])
def test_other_ways_to_score_leave_no_trace(way: str, more: dict[str, Any]) -> None:
    if way == "units at once" and "amp" in more:
        pytest.skip("batch-norm in mixed precision has no rule for vmap on a CPU")
    model = Lived(way)
    before = photograph(model)
    chosen = options(way, **more)
    score_units(model, model.group(), Loader(), chosen)
    score_error(model, model.group(), Loader(), chosen)
    path_gradient_norms(model, model.group(), Loader(), chosen)
    assert photograph(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_the_hooks_of_the_user_run_and_the_model_is_in_eval_mode(way: str) -> None:
    model = Lived(way)
    modes: list[bool] = []
    model.drop.register_forward_hook(lambda module, *_: modes.append(module.training))
    score_units(model, model.group(), Loader(), options(way))
    assert model.heard.__self__.calls == len(modes) > 0
    assert not any(modes)
    repeated = [score_units(model, model.group(), [fixed], options(way)) for fixed in list(Loader())[:1] * 2]
    assert torch.equal(*repeated)  # no dropout, no statistics that move


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "objective", "loader"])
@pytest.mark.parametrize("way", WAYS)
def test_a_failure_at_any_point_leaves_no_trace(way: str, place: str, error: type[BaseException]) -> None:
    model = Lived(way)
    objective_fuse, loader_fuse = Fuse(), Fuse()

    def objective(outputs: Tensor, targets: Tensor) -> Tensor:
        objective_fuse.tick()
        return functional.cross_entropy(outputs, targets)

    fuse = {
        "forward": model.forward_fuse,
        "backward": model.backward_fuse,
        "objective": objective_fuse,
        "loader": loader_fuse,
    }[place]
    before, group, loader = photograph(model), model.group(), Loader(loader_fuse)
    chosen = options(way, objective=objective)
    fuse.set(-1, error)
    expected = score_units(model, group, loader, chosen)
    calls = fuse.calls
    assert calls >= 2

    for k in range(calls):
        fuse.set(k, error)
        rng = RngState.capture()
        # an error in F is explained by ours, except for what is nobody's error
        with pytest.raises((error, ScoringError, DataError)) as caught:
            score_units(model, group, loader, chosen)
        if error is KeyboardInterrupt:
            assert caught.type is KeyboardInterrupt
        elif place in ("forward", "objective", "loader"):
            assert isinstance(caught.value.__cause__, Boom)
        assert fuse.calls == k + 1
        assert photograph(model) == before, f"call {k} of {calls}"
        after = draws()
        rng.restore()
        assert draws() == after
        assert torch.is_grad_enabled()

    fuse.set(-1, error)
    torch.manual_seed(0)
    first = score_units(model, group, loader, chosen)
    torch.manual_seed(0)
    assert torch.equal(score_units(model, group, loader, chosen), first)
    assert expected.shape == first.shape


@pytest.mark.parametrize("way", WAYS)
def test_errors_of_the_package_leave_no_trace(way: str) -> None:
    model = Lived(way)
    before = photograph(model)
    for objective in (lambda z, y: z.sum() * torch.nan, lambda z, y: z, lambda z, y: z.sum().detach()):
        with pytest.raises(ScoringError):
            score_units(model, model.group(), Loader(), options(way, objective=objective))
        assert photograph(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_as_if_nothing_had_happened(way: str) -> None:
    torch.manual_seed(3)
    undisturbed = Lived(way)
    torch.manual_seed(3)
    scored = Lived(way)
    results = []
    for model in (undisturbed, scored):
        torch.manual_seed(4)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        for batch in list(Loader()):
            if model is scored:
                score_units(model, model.group(), Loader(), options(way))
            optimizer.zero_grad()
            functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_root_without_modules() -> None:
    model = Net(lambda m, x: x * m.gain, gain=nn.Parameter(torch.ones(3)))
    rows = torch.arange(3)
    group = UnitGroup("gain", 3, (Producer("gain", (Slot(model, "gain"),), rows, rows),))
    before = photograph(model)
    for way in WAYS:
        score_units(model, group, [(torch.randn(2, 3), torch.tensor([0, 1]))], options(way))
    assert photograph(model) == before


class Keeps(nn.Module):
    """Keeps in eval mode what it computed from a parameter, as LeViT does with its attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bias, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "cpu" not in self.kept:
            self.kept["cpu"] = self.bias * 2
        return self.head(torch.relu(self.fc(x) + self.kept["cpu"]))


def test_what_a_layer_keeps_is_made_anew_for_every_pass_and_then_put_back() -> None:
    net, batch = Keeps().eval(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    rows = torch.arange(6)
    producers = (
        Producer("fc", (Slot(net.fc, "weight"), Slot(net.fc, "bias")), rows, rows),
        Producer("bias", (Slot(net, "bias"),), rows, rows),
    )
    group = UnitGroup("fc", 6, producers)
    fresh = score_units(net, group, [batch, batch], Scoring(nodes=3))
    assert net.kept == {}
    with torch.no_grad():
        net(batch[0])
    stale = net.kept["cpu"]
    torch.testing.assert_close(score_units(net, group, [batch, batch], Scoring(nodes=3)), fresh)
    assert net.kept["cpu"] is stale
