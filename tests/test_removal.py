"""Removing channels: objects, flags, optimizer state and averages survive, and a failure leaves no trace."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from singe_plugin.axes import AxisGraph, removal, remove_units
from singe_plugin.errors import RemovalError
from singe_plugin.integrations.torch_pruning import SInGEPruner

from asked import asked
from masking import Masked
from references import Net, randomise_norms
from small_nets import Chain, Dense, Grouped, Residual, Trace, assert_same_values, images, values_of

BATCHES = images(4)
X = BATCHES[0][0][:2]
MAGNITUDE = tp.importance.MagnitudeImportance()


class Scaled(nn.Module):
    """A raw parameter, a layer norm and a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(2, 12, 3), nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.act, self.norm, self.fc = nn.PReLU(12), nn.LayerNorm(12), nn.Linear(12, 3)
        with torch.no_grad():
            for parameter in (self.act.weight, self.norm.weight, self.norm.bias):
                parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.act(self.conv(x) * self.gamma).mean((2, 3))))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain, "residual": Residual, "dense": Dense, "grouped": Grouped, "scaled": Scaled,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}
EMAS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "torch without buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "timm": lambda m: ModelEmaV3(m, decay=0.9),
    "a plain copy": lambda m: copy.deepcopy(m),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Any = None, steps: int = 3) -> list[float]:
    model.train()
    losses = []
    for x, y in (BATCHES * 2)[:steps]:
        loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(ema, "update_parameters"):
            ema.update_parameters(model)
        elif isinstance(ema, ModelEmaV3):
            ema.update(model)
        losses.append(loss.item())
    return losses


def widths_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            key: value
            for key, value in module.__dict__.items()
            if key[0] != "_" and key != "training" and isinstance(value, (int, tuple))
        }
        for name, module in model.named_modules()
    }


def in_the_shape_of(pruned: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """A freshly built model with the pruned one's sizes and values, and none of its objects."""
    model = make()
    for name, module in model.named_modules():
        theirs = pruned.get_submodule(name)
        for key, value in widths_of(theirs)[""].items():
            setattr(module, key, value)
        for key, tensor in theirs.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(tensor.detach().clone()))
        for key, tensor in theirs.named_buffers(recurse=False):
            setattr(module, key, tensor.clone())
    return model


# --- identity and values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", NETS)
def test_objects_and_flags_survive_and_values_are_those_of_the_channels_that_are_left(net: str) -> None:
    model = randomise_norms(NETS[net]())
    masked = Masked(model)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 != 0)
    objects = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    model.train()
    host = SInGEPruner(model, X, MAGNITUDE, ema=masked.tags).host()
    for layer in host.layers():
        host.remove(layer.name, list(range(0, layer.units, 2)))
    assert {name: (p, p.requires_grad) for name, p in model.named_parameters()} == objects
    assert all(module.training for module in model.modules())
    assert all(p.is_contiguous() and p.is_leaf for p in model.parameters())
    torch.testing.assert_close(copy.deepcopy(model).eval()(X), masked.model()(X), rtol=1e-4, atol=1e-5)


def test_a_layer_norm_keeps_the_order_of_its_channels() -> None:
    model = Scaled()
    norm = values_of(model.norm)
    SInGEPruner(model, X, MAGNITUDE).host().remove("conv", [0, 1, 3, 4, 5, 6, 7, 11])
    assert_same_values(model.norm, {name: value[[2, 8, 9, 10]] for name, value in norm.items()})


def test_gradients_are_cut_along() -> None:
    model = Scaled()
    functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    SInGEPruner(model, X, MAGNITUDE).host().remove("conv", [0, 1, 3, 4, 5, 6, 7, 11])
    for name, parameter in model.named_parameters():
        dim = 1 if name == "fc.weight" else 0
        expected = grads[name] if name == "fc.bias" else grads[name].index_select(dim, torch.tensor([2, 8, 9, 10]))
        assert torch.equal(parameter.grad, expected), name


def test_channels_last_is_kept() -> None:
    model = Chain().to(memory_format=torch.channels_last)
    pruner = SInGEPruner(model, X.to(memory_format=torch.channels_last), MAGNITUDE)
    pruner.step()
    assert model.conv2.weight.shape[:2] == (6, 4)
    for conv in (model.conv1, model.conv2):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_contiguous()


def test_a_split_is_followed_through_many_removals() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.bn(m.conv(x)).chunk(2, 1)
        return m.fc((a * torch.sigmoid(b)).mean((2, 3)))

    model = randomise_norms(Net(forward, conv=nn.Conv2d(2, 16, 3), bn=nn.BatchNorm2d(16), fc=nn.Linear(8, 3))).eval()
    masked = Masked(model)
    pruner = SInGEPruner(model, X, MAGNITUDE, ema=masked.tags)
    for unit in (2, 0, 5, 4, 1, 1):
        pruner.host().remove("conv", [unit])
        torch.testing.assert_close(model(X), masked.model()(X))
    assert model.conv.out_channels == 4


# --- optimizers and averages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_is_cut_exactly(optimizer: str) -> None:
    model = Chain()
    opt = OPTIMIZERS[optimizer](model.parameters())
    train(model, opt)
    before = {n: {k: copy.deepcopy(v) for k, v in opt.state[p].items()} for n, p in model.named_parameters()}
    SInGEPruner(model, X, MAGNITUDE, optimizer=opt).host().remove("conv1", [1, 6])
    keep = torch.tensor([0, 2, 3, 4, 5, 7])
    cut = {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1}
    for name, parameter in model.named_parameters():
        for key, value in before[name].items():
            if isinstance(value, Tensor) and value.ndim and name in cut:
                value = value.index_select(cut[name], keep)
                assert value.shape == parameter.shape
            assert torch.equal(torch.as_tensor(opt.state[parameter][key]), torch.as_tensor(value)), (name, key)
    assert len(opt.state) == len(list(model.parameters()))


@pytest.mark.parametrize("ema", EMAS)
def test_an_average_is_cut_exactly(ema: str) -> None:
    model = Chain()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    average = EMAS[ema](model)
    train(model, opt, average)
    inner = getattr(average, "module", average)
    before, objects = values_of(inner), dict(inner.named_parameters())
    SInGEPruner(model, X, MAGNITUDE, ema=average).host().remove("conv1", [1, 6])
    keep = torch.tensor([0, 2, 3, 4, 5, 7])
    expected = {
        name: value.index_select(0, keep) if name.startswith(("conv1", "bn1")) and value.ndim else value
        for name, value in before.items()
    }
    expected["conv2.weight"] = before["conv2.weight"].index_select(1, keep)
    assert_same_values(inner, expected)
    assert dict(inner.named_parameters()) == objects
    assert widths_of(inner) == widths_of(model)
    assert torch.isfinite(average.eval()(X)).all()
    train(model, opt, average)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_continues_as_in_a_model_built_small(net: str, optimizer: str) -> None:
    model = NETS[net]()
    opt = OPTIMIZERS[optimizer](model.parameters())
    train(model, opt)
    pruner = SInGEPruner(model, X, MAGNITUDE, optimizer=opt)
    for layer in pruner.host().layers():
        pruner.host().remove(layer.name, [0, layer.units - 1])
    small = in_the_shape_of(model, NETS[net])
    small_opt = OPTIMIZERS[optimizer](small.parameters())
    small_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert train(model, opt, steps=5) == train(small, small_opt, steps=5)
    assert_same_values(model, small)


# --- failures ---------------------------------------------------------------------------------------------------


def failing_at(count: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[int]:
    """Make the ``count``-th change of a tensor or a width (from 1) raise; the list counts the calls."""
    calls = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                raise error
            return function(*args, **kwargs)

        return counted

    for name in ("swap_data", "refresh_widths"):
        monkeypatch.setattr(removal, name, counting(getattr(removal, name)))
    return calls


def prepared(net: str) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, SInGEPruner]:
    model = NETS[net]()
    opt = OPTIMIZERS["adam"](model.parameters())
    average = AveragedModel(model, use_buffers=True)
    train(model, opt, average)
    return model, opt, average, SInGEPruner(model, X, MAGNITUDE, optimizer=opt, ema=average)


def structure_of(graph: Any) -> Any:
    sizes = {name: group.size for name, group in graph.axis_graph.groups.items()}
    slices = [
        (part.attr, part.dim, part.units.tolist())
        for group in graph.axis_graph.groups.values()
        for part in group.slices()
    ]
    return sizes, slices, list(graph.pruning_history())


@pytest.mark.parametrize("interrupt", [ValueError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("whole_step", [False, True], ids=["remove", "step"])
@pytest.mark.parametrize("net", NETS)
def test_a_failure_at_any_cut_is_rolled_back(net: str, whole_step: bool, interrupt: BaseException) -> None:
    model, opt, average, pruner = prepared(net)
    name = pruner.layers[0].name
    prune = pruner.step if whole_step else lambda: pruner.host().remove(name, [0])
    trace, ema_trace, graph = Trace(model, opt), Trace(average), structure_of(pruner.DG)
    expected = RemovalError if isinstance(interrupt, Exception) else KeyboardInterrupt
    for count in range(1, 1000):
        with pytest.MonkeyPatch.context() as patch:
            calls = failing_at(count, patch, interrupt)
            with contextlib.suppress(expected):
                prune()
            if calls[0] < count:
                break  # it went through
        trace.assert_unchanged()
        ema_trace.assert_unchanged()
        assert structure_of(pruner.DG) == graph
        assert pruner.current_step == 0
    assert count > 3
    assert sum(p.numel() for p in model.parameters()) < sum(v.numel() for v in trace.values.values())
    train(model, opt, average)
    assert widths_of(average.module) == widths_of(model)


def test_an_average_of_another_shape_is_refused_and_nothing_happens() -> None:
    model, average = Chain(), Chain(widths=(9, 12, 8))
    pruner = SInGEPruner(model, X, MAGNITUDE, ema=average)
    trace = Trace(model)
    with pytest.raises(RemovalError, match="EMA"):
        pruner.host().remove("conv1", [0])
    trace.assert_unchanged()


def test_a_layer_is_never_emptied() -> None:
    model = Chain()
    host = SInGEPruner(model, X, MAGNITUDE).host()
    trace = Trace(model)
    with pytest.raises(RemovalError, match="without any"):
        host.remove("conv1", range(8))
    trace.assert_unchanged()


@pytest.mark.parametrize("ratios", ["uniform", "global"])
def test_a_grouped_convolution_down_to_its_last_unit_does_not_stop_the_others(ratios: str) -> None:
    """It then has as many groups as outputs, as if it were depthwise."""
    model = Grouped()
    pruner = SInGEPruner(model, X, MAGNITUDE, **asked(target="params=0.2", ratios=ratios))
    layer = next(layer for layer in pruner.host().layers() if layer.channels_per_unit == 4 and layer.units == 8)
    pruner.host().remove(layer.name, range(layer.units - 1))
    assert model.conv2.groups == model.conv2.out_channels == 4 < model.conv2.in_channels
    outcome = pruner.run()
    assert outcome.plan[layer.name] == 0
    SInGEPruner(model, X, MAGNITUDE, pruning_ratio=0.5).step()
    assert model.conv2.out_channels == 4
    assert torch.isfinite(model(X)).all()


# --- interactive, history ---------------------------------------------------------------------------------------


def test_interactive_steps_keep_everything_too() -> None:
    model, opt, average, pruner = prepared("residual")
    objects = dict(model.named_parameters())
    groups = 0
    for group in pruner.step(interactive=True):
        idxs = group[0].idxs
        group.prune(idxs[: len(idxs) // 2] if groups == 0 else None)
        groups += 1
    assert groups == 3
    assert dict(model.named_parameters()) == objects
    train(model, opt, average)
    assert widths_of(average.module) == widths_of(model)


@pytest.mark.parametrize("net", NETS)
def test_the_history_repeats_the_removals_on_a_fresh_model(net: str) -> None:
    model = NETS[net]()
    fresh = copy.deepcopy(model)
    pruner = SInGEPruner(model, X, MAGNITUDE, iterative_steps=2)
    for _ in range(2):
        pruner.step()
    pruner.host().remove(pruner.layers[0].name, [0])
    history = pruner.pruning_history()
    opt = OPTIMIZERS["sgd"](fresh.parameters())
    train(copy.deepcopy(fresh), opt)
    other = SInGEPruner(fresh, X, MAGNITUDE, optimizer=opt)
    objects = dict(fresh.named_parameters())
    other.load_pruning_history(history)
    assert dict(fresh.named_parameters()) == objects
    assert widths_of(fresh) == widths_of(model)
    assert_same_values(fresh, model)
    assert [entry[:2] for entry in other.pruning_history()] == [entry[:2] for entry in history]
    train(fresh, opt)


def test_every_layer_says_how_wide_it_is_now() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 12, 1, groups=2),
        nn.GroupNorm(2, 12), nn.ReLU(), nn.ConvTranspose2d(12, 8, 2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    graph = AxisGraph(net, torch.randn(2, 3, 6, 6))
    for group in graph.groups.values():
        remove_units(graph, group, [0])
    said = [(m.in_channels, m.out_channels) for m in net if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    down, up = net[3].weight.shape, net[6].weight.shape
    groups = net[3].groups, net[6].groups  # which are units, too
    assert said == [(3, net[0].weight.shape[0]), (groups[0] * down[1], down[0]), (up[0], groups[1] * up[1])]
    assert [net[1].num_features, net[2].num_parameters] == [net[0].weight.shape[0]] * 2
    assert net[4].num_channels == down[0]
    assert [(m.out_features, m.in_features) for m in (net[10], net[12])] == [m.weight.shape for m in (net[10], net[12])]
    assert len({*said[0], *said[1], *said[2]} & {8, 12}) == 0  # nothing is as it was
    net(torch.randn(2, 3, 6, 6))
