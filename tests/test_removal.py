"""Removals keep parameter objects, optimizer state and EMA alive, and a failure leaves no trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from singe_plugin.errors import RemovalError
from singe_plugin.integrations.torch_pruning import SInGEPruner, Trackers
from singe_plugin.integrations.torch_pruning.removal import Snapshot, remove_channels


class Residual(nn.Module):
    """A stem, a block with an inner width, a depthwise convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.conv2 = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.depthwise(torch.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))


INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 3])
GONE = [1, 4, 7]
LEFT = [0, 2, 3, 5, 6, 8, 9, 10, 11]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()


def graph_of(model: nn.Module) -> tp.DependencyGraph:
    modes = {m: m.training for m in model.modules()}
    graph = tp.DependencyGraph().build_dependency(model, INPUTS)
    for module, mode in modes.items():
        module.training = mode
    return graph


def cut(model: nn.Module, trackers: Trackers | None = None) -> None:
    """Remove channels 1, 4 and 7 of the inner width, and all that goes with them."""
    remove_channels(graph_of(model), model.conv1, tp.prune_conv_out_channels, GONE, trackers or Trackers())


def by_hand(name: str, tensor: Tensor) -> Tensor:
    """What is left of a tensor of :class:`Residual`, written down layer by layer."""
    if name.startswith(("conv1.", "bn1.", "depthwise.")) and tensor.ndim:
        return tensor[LEFT]
    return tensor[:, LEFT] if name == "conv2.weight" else tensor


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_cut_exactly_and_training_goes_on_as_in_a_small_model(name: str) -> None:
    model = Residual()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    cut(model, Trackers([optimizer]))

    small = Residual()  # the same network, built small by hand
    small.conv1, small.bn1 = nn.Conv2d(8, 9, 3, padding=1), nn.BatchNorm2d(9)
    small.depthwise, small.conv2 = nn.Conv2d(9, 9, 3, padding=1, groups=9), nn.Conv2d(9, 8, 1)
    small.load_state_dict({n: by_hand(n, t) for n, t in weights.items()})
    other = OPTIMIZERS[name](small.parameters())
    for n, p in small.named_parameters():
        other.state[p] = {
            k: by_hand(n, v).clone() if isinstance(v, Tensor) and v.ndim else copy.deepcopy(v)
            for k, v in before[n].items()
        }
    for n, p in model.named_parameters():
        for key, value in other.state[dict(small.named_parameters())[n]].items():
            assert torch.equal(torch.as_tensor(optimizer.state[p][key]), torch.as_tensor(value)), (n, key)
    train(model, optimizer)
    train(small, other)
    for (n, a), b in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=n)


@pytest.mark.parametrize(
    "make", [lambda m: torch.optim.swa_utils.AveragedModel(m), lambda m: timm.utils.ModelEmaV3(m, decay=0.5)]
)
def test_ema_is_cut_along_and_can_be_updated(make) -> None:
    model = Residual()
    ema = make(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    (ema.update_parameters if hasattr(ema, "update_parameters") else ema.update)(model)
    expected = {n: by_hand(n, t).clone() for n, t in ema.module.state_dict().items()}
    cut(model, Trackers(emas=[ema]))
    for n, t in ema.module.state_dict().items():
        assert torch.equal(t, expected[n]), n
    assert ema.module.depthwise.groups == ema.module.conv1.out_channels == 9
    assert ema.module.eval()(INPUTS).shape == (4, 5)
    (ema.update_parameters if hasattr(ema, "update_parameters") else ema.update)(model)


def test_parameter_objects_flags_hooks_and_gradients_survive() -> None:
    model = Residual()
    model.conv1.weight.requires_grad_(False)
    seen: list[torch.Size] = []
    model.depthwise.weight.register_hook(lambda g: seen.append(g.shape))
    model(INPUTS).sum().backward()
    seen.clear()
    objects = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    grads = {n: None if p.grad is None else by_hand(n, p.grad).clone() for n, p in model.named_parameters()}
    cut(model)
    for n, p in model.named_parameters():
        assert (id(p), p.requires_grad) == objects[n]
        assert (p.grad is None) == (grads[n] is None)
        if p.grad is not None:
            assert torch.equal(p.grad, grads[n])
    model(INPUTS).sum().backward()
    assert seen == [torch.Size([9, 1, 3, 3])]


def test_channels_last_stays() -> None:
    model = Residual().to(memory_format=torch.channels_last)
    cut(model)
    assert model.conv2.weight.shape == (8, 9, 1, 1)
    weight = model.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


def test_layer_norm_keeps_the_order_of_its_channels() -> None:
    """The set arithmetic of torch-pruning's own layer-norm cut does not sort what it keeps."""
    torch.manual_seed(0)
    width, shuffled = 512, 0
    for seed in range(8):
        norm = nn.LayerNorm(width)
        nn.init.normal_(norm.weight)
        model = nn.Sequential(nn.Linear(4, width), norm, nn.Linear(width, 3))
        gone = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:490].tolist()
        kept = sorted(set(range(width)) - set(gone))
        expected = norm.weight.detach()[kept].clone()
        shuffled += list(set(range(width)) - set(gone)) != kept
        graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 4))
        remove_channels(graph, model[0], tp.prune_linear_out_channels, gone, Trackers())
        assert torch.equal(norm.weight, expected)
    assert shuffled  # otherwise this test would not have met the case


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    tensors = [(n, id(t), t.clone()) for n, t in model.named_parameters()]
    tensors += [(n, id(t), t.clone()) for n, t in model.named_buffers()]
    widths = [(n, m.__dict__.get("out_channels"), m.__dict__.get("groups")) for n, m in model.named_modules()]
    state = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for s in optimizer.state.values()]
    return [tensors, widths, state]


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("failing_call", range(7))
def test_failure_in_the_middle_of_a_removal_rolls_back(
    monkeypatch: pytest.MonkeyPatch, failing_call: int, error: type[BaseException]
) -> None:
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    graph = graph_of(model)
    before = state_of(model, optimizer)
    calls = 0
    original = tp.pruner.function.BasePruningFunc._prune_parameter_and_grad

    def breaks(self, *args):
        nonlocal calls
        calls += 1
        if calls == failing_call + 1:
            raise error("injected")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tp.pruner.function.BasePruningFunc, "_prune_parameter_and_grad", breaks)
        with pytest.raises(RemovalError if error is RuntimeError else KeyboardInterrupt):
            remove_channels(graph, model.conv1, tp.prune_conv_out_channels, GONE, Trackers([optimizer]))
    assert calls == failing_call + 1
    assert same(state_of(model, optimizer), before)
    assert graph.pruning_history() == []
    remove_channels(graph, model.conv1, tp.prune_conv_out_channels, GONE, Trackers([optimizer]))
    assert model.conv1.out_channels == 9
    train(model, optimizer)


def test_snapshot_with_values_undoes_training_too() -> None:
    model = Residual()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    graph = graph_of(model)
    before = state_of(model, optimizer)
    undo = Snapshot(graph, trackers=Trackers([optimizer]), values=True)
    remove_channels(graph, model.conv1, tp.prune_conv_out_channels, GONE, Trackers([optimizer]))
    train(model, optimizer)
    undo.restore()
    assert same(state_of(model, optimizer), before)


def test_removing_everything_is_refused_and_nothing_changes() -> None:
    model = Residual()
    graph = graph_of(model)
    with pytest.raises(RemovalError, match=r"without any; lower the ratio"):
        remove_channels(graph, model.conv1, tp.prune_conv_out_channels, list(range(12)), Trackers())
    assert model.conv1.out_channels == 12


def test_failed_step_rolls_back_the_groups_that_were_already_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual()
    pruner = SInGEPruner(model, INPUTS, tp.importance.MagnitudeImportance(), pruning_ratio=0.5)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def breaks(self, *_):
        raise RuntimeError("injected")

    # the head is cut last: the inner width is gone by then
    box = tp.pruner.function.PrunerBox[tp.ops.OPTYPE.LINEAR]
    monkeypatch.setattr(type(box), "_prune_parameter_and_grad", breaks)
    with pytest.raises(RemovalError, match="injected"):
        pruner.step()
    monkeypatch.undo()
    assert same(before, dict(model.state_dict()))
    assert pruner.current_step == 0
    pruner.step()
    assert (model.conv1.out_channels, model.head.in_features) == (6, 4)


def test_interactive_groups_preserve_parameters_and_the_history_replays() -> None:
    model = Residual()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    objects = [id(p) for p in model.parameters()]
    pruner = SInGEPruner(
        model, INPUTS, tp.importance.MagnitudeImportance(), pruning_ratio=0.25, optimizer=optimizer
    )
    for group in pruner.step(interactive=True):
        group.prune()
    assert [id(p) for p in model.parameters()] == objects
    assert optimizer.state[model.conv2.weight]["momentum_buffer"].shape == model.conv2.weight.shape == (6, 9, 1, 1)
    train(model, optimizer)
    fresh = SInGEPruner(twin, INPUTS, tp.importance.MagnitudeImportance())
    fresh.load_pruning_history(copy.deepcopy(pruner.pruning_history()))
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
