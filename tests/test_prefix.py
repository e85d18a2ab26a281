"""The prefix cache changes how often layers run, never what comes out."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import singe_plugin
from singe_plugin.method.prefix import PrefixCache


class Tally:
    """Stands outside of the model: scoring puts back what a model counts in its attributes."""

    calls = 0

    def tick(self) -> None:
        self.calls += 1


class Counter(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tick = Tally().tick

    @property
    def calls(self) -> int:
        return self.tick.__self__.calls

    def forward(self, x: Tensor) -> Tensor:
        self.tick()
        return x * 2


class InPlaceStem(nn.Module):
    """An in-place activation changes a tensor that the shortcut holds: it must run in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.skip = nn.Identity()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.stem(x)
        alias = self.skip(shortcut)
        self.act(alias)  # the result is not used: only its effect on the shortcut is
        return self.head((self.conv(shortcut) + shortcut).mean((2, 3)))


class Reused(nn.Module):
    """One layer is called before and after the layer that decays."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.between = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(torch.tanh(self.between(self.twice(x)))))


def scores_with_and_without(monkeypatch: pytest.MonkeyPatch, model: nn.Module, layer: nn.Module, x: Tensor) -> None:
    targets = torch.randint(0, 3, (len(x),))
    graph = tp.DependencyGraph().build_dependency(model, x)
    is_conv = isinstance(layer, nn.Conv2d)
    prune = tp.prune_conv_out_channels if is_conv else tp.prune_linear_out_channels
    width = layer.out_channels if is_conv else layer.out_features
    group = graph.get_pruning_group(layer, prune, list(range(width)))
    for criterion in ("ig", "sg", "ig_abs"):
        imp = singe_plugin.integrations.torch_pruning.SInGEImportance(criterion).bind(model, [(x, targets)])
        cached = imp(group)
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "seal", PrefixCache.cancel)
            plain = imp(group)
        assert torch.equal(cached, plain)


def test_in_place_and_aliasing_modules_run_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = InPlaceStem().eval()
    scores_with_and_without(monkeypatch, model, model.conv, torch.randn(4, 3, 6, 6))


def test_a_layer_called_before_and_after_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Reused().eval()
    scores_with_and_without(monkeypatch, model, model.between, torch.randn(5, 6))


def test_real_residual_network(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3).eval()
    scores_with_and_without(monkeypatch, model, model.layer3[0].conv1, torch.randn(2, 3, 32, 32))


class ReadElsewhere(nn.Module):
    """A module uses the weight of a layer before that layer is called, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(6, 6), nn.Linear(6, 6)
        self.early = Early(how, self.fc)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        early = self.early(x)
        return self.head(torch.tanh(self.fc(x)) + early)


class Early(nn.Module):
    def __init__(self, how: str, layer: nn.Linear) -> None:
        super().__init__()
        self.how, self.layer = how, [layer]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        if self.how == "linear":
            return nn.functional.linear(x, layer.weight)
        if self.how == "no_grad":
            with torch.no_grad():
                return nn.functional.linear(x, layer.weight)
        if self.how == "data":
            return x @ layer.weight.data.T
        if self.how == "item":
            return x * layer.bias[0].item()
        if self.how == "list":
            return x + torch.stack([layer.bias, layer.bias]).sum(0)
        return x * layer.weight.shape[0] * len(layer.bias) * layer.weight.dim()


@pytest.mark.parametrize("how", ["linear", "no_grad", "data", "item", "list"])
def test_what_reads_a_weight_before_its_layer_runs_is_not_kept(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ReadElsewhere(how).eval()
    scores_with_and_without(monkeypatch, model, model.fc, torch.randn(5, 6))


def test_what_reads_a_shape_only_is_kept() -> None:
    model = nn.Sequential(Early("shape", (fc := nn.Linear(6, 6).requires_grad_(False))), fc)
    with PrefixCache(model, [fc]) as cache:
        model(torch.randn(2, 6))
        cache.seal()
        assert cache.kept == [model[0]]


def test_what_is_in_front_runs_once() -> None:
    front, layer, behind = Counter(), nn.Linear(4, 4), Counter()
    model = nn.Sequential(front, nn.Tanh(), layer, behind)
    with PrefixCache(model, [layer]) as cache:
        for _ in range(5):
            model(torch.randn(2, 4))
            cache.seal()
    assert (front.calls, behind.calls) == (1, 5)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_outermost_module_is_kept() -> None:
    stem, layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).requires_grad_(False), nn.Linear(3, 3)
    model = nn.Sequential(stem, layer)
    with PrefixCache(model, [layer]) as cache:
        model(torch.randn(1, 3))
        cache.seal()
        assert cache.kept == [stem]


def test_module_with_a_user_hook_is_not_kept() -> None:
    first, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, layer)
    first.register_forward_hook(lambda module, args, output: output * 3)
    x = torch.randn(1, 3)
    expected = model(x)
    with PrefixCache(model, [layer]) as cache:
        model(x)
        cache.seal()
        assert cache.kept == []
        assert torch.equal(model(x), expected)


def test_instance_forward_is_put_back() -> None:
    first, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(first, layer)
    original = first.forward
    first.forward = lambda x: original(x) + 1  # as wrappers such as accelerate do
    mine = first.forward
    with pytest.raises(KeyboardInterrupt), PrefixCache(model, [layer]) as cache:
        model(torch.randn(1, 3))
        cache.seal()
        raise KeyboardInterrupt
    assert first.forward is mine


def test_layer_that_never_runs_keeps_nothing() -> None:
    first, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleDict({"first": first, "unused": unused})
    with PrefixCache(model, [unused]) as cache:
        first(torch.randn(1, 3))
        cache.seal()
        assert cache.kept == []


def test_scoring_uses_the_cache() -> None:
    front, layer = Counter(), nn.Linear(4, 8)
    model = nn.Sequential(front, layer, nn.ReLU(), nn.Linear(8, 2))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 4))
    group = graph.get_pruning_group(layer, tp.prune_linear_out_channels, list(range(8)))
    batch = (torch.randn(6, 4), torch.randint(0, 2, (6,)))
    imp = singe_plugin.integrations.torch_pruning.SInGEImportance(quadrature="geometric", steps=9).bind(model, [batch])
    before = front.calls
    imp(group)
    assert front.calls == before + 1
