"""Distillation from features: the term is the formula at the units that are left, whichever these are by now."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_distillation import Heard, take
from torch import Tensor, nn
from torch.nn import functional

from singe_plugin import Distill, FineTune
from singe_plugin.axes import AxisGraph, Trackers, remove_units
from singe_plugin.loop.distillation import distillation
from singe_plugin.loop.features import relative_error
from singe_plugin.loop.tuner import Tuner

from small_nets import CLASSES, Dense, assert_same_values, images, seeded, vectors

DATA, IMAGES = vectors(3), images(3)


class Stream(nn.Module):
    """A residual stream of 8 channels, a block of 6 inside, and what comes behind a layer is written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.down, self.fc = nn.Conv2d(6, 8, 1), nn.Linear(8, CLASSES)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        seen = {"stem": x.clone()}
        x = x.relu_()
        y = self.norm(self.up(x))
        seen["norm"] = y.clone()
        y = self.down(y.relu_())
        seen["down"] = y.clone()
        x = torch.relu(x + y)
        return seen | {"": self.fc(x.mean((2, 3)))}

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[""]


class Tokens(nn.Module):
    """Three tokens of 6 numbers, two attention heads of 4 dimensions; what flows in between can be named."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(4, 6), nn.Linear(6, 24), nn.Linear(8, 6)
        self.heads, self.width = 2, 4
        self.query, self.chances, self.flat = nn.Identity(), nn.Identity(), nn.Identity()
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embed(torch.stack([x, x.roll(1, 1), -x], 1))
        seen = {"embed": x}
        q, k, v = self.qkv(x).reshape(len(x), 3, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        seen["query"] = q = self.query(q)
        seen["chances"] = chances = self.chances((q @ k.transpose(-1, -2)).softmax(-1))
        seen["flat"] = y = self.flat((chances @ v).transpose(1, 2).flatten(2))
        return seen | {"": self.fc(self.norm(x + self.out(y)).mean(1))}

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[""]


Index = dict[int, list[int]]


def literal(student: Tensor, teacher: Tensor, left: Index) -> float:
    """The relative error, number by number; ``left`` has the teacher's positions along some dimensions."""
    error = size = 0.0
    for place in itertools.product(*map(range, student.shape)):
        there = tuple(left[dim][i] if dim in left else i for dim, i in enumerate(place))
        error += (float(student[place]) - float(teacher[there])) ** 2
        size += float(teacher[there]) ** 2
    return error / size


def by_indexing(student: Tensor, teacher: Tensor, left: Index) -> Tensor:
    """The same with its gradient."""
    for dim, positions in left.items():
        teacher = teacher.index_select(dim, torch.tensor(positions))
    return (student - teacher).square().sum() / teacher.square().sum()


# --- the term ---------------------------------------------------------------------------------------------------


def test_the_relative_error() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    assert float(relative_error(a, b)) == pytest.approx(literal(a, b, {}), rel=1e-12)
    assert float(relative_error(1e3 * a, 1e3 * b)) == pytest.approx(literal(a, b, {}), rel=1e-12)
    assert float(relative_error(b, b)) == 0
    large = torch.full((4,), 400.0, dtype=torch.float16)  # its square is no half
    assert float(relative_error(large / 2, large)) == 0.25
    still = relative_error(torch.tensor([1.0, 3.0], requires_grad=True), torch.zeros(2))
    assert still.item() == 5  # of a teacher's zeros, the squared error itself


# what goes from which group (``qkv``: a dimension of all heads; ``qkv#2``: a head), by the numbers at the
# time; then module -> dimension -> what is left in the teacher
CONV = (
    [{"stem": [1, 4], "up": [0]}, {"stem": [0, 3], "up": [2, 4]}],
    [
        {"stem": {1: [0, 2, 3, 5, 6, 7]}, "norm": {1: [1, 2, 3, 4, 5]}, "down": {1: [0, 2, 3, 5, 6, 7]}},
        {"stem": {1: [2, 3, 6, 7]}, "norm": {1: [1, 2, 4]}, "down": {1: [2, 3, 6, 7]}},
    ],
)
TOKENS = (
    [{"embed": [5], "qkv": [1]}, {"embed": [0, 1], "qkv": [0], "qkv#2": [0]}],
    [
        {"embed": {2: [0, 1, 2, 3, 4]}, "query": {3: [0, 2, 3]}, "chances": {}, "flat": {2: [0, 2, 3, 4, 6, 7]}},
        {"embed": {2: [2, 3, 4]}, "query": {1: [1], 3: [2, 3]}, "chances": {1: [1]}, "flat": {2: [6, 7]}},
    ],
)


def cut(graph: AxisGraph, gone: dict[str, list[int]], tuner: Tuner | None = None) -> None:
    for name, units in gone.items():
        remove_units(graph, graph.groups[name], units, Trackers(list(tuner.optimizers) if tuner else []))


@pytest.mark.parametrize(("make", "data", "case"), [(Stream, IMAGES, CONV), (Tokens, DATA, TOKENS)])
@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.9), (0.3, 0.5), (2.0, 1.0)])
def test_the_loss_is_the_formula_at_what_is_left_and_only_the_student_learns(
    make: Any, data: Any, case: Any, weight: float, share: float
) -> None:
    removals, lefts = case
    model = seeded(make).double()
    x, y = data[0][0].double(), data[0][1]
    graph, teacher = AxisGraph(model, x[:2]), copy.deepcopy(model).eval()
    theirs = {name: tensor.detach() for name, tensor in teacher.stages(x).items()}
    names = tuple(lefts[0])
    how = Distill("unpruned", 2.0, share, features=names, feature_weight=weight)
    tuner = Tuner(FineTune(
        [(x, y)], 2, lr=0.1, momentum=0, weight_decay=0, clip_grad=None, label_smoothing=0, distill=how
    ))  # fmt: skip
    heard = Heard()
    with tuner.taught(model, graph=graph):
        tuner.prepare(model)
        held = tuner.teacher
        for number, (gone, left) in enumerate(zip(removals, lefts, strict=True)):
            cut(graph, gone, tuner)
            twin = copy.deepcopy(model).train()
            seen = twin.stages(x)
            assert list(seen[names[0]].shape) != list(theirs[names[0]].shape)
            slow = sum(literal(seen[n].detach(), theirs[n], left[n]) for n in names) / len(names)
            plain = (1 - share) * functional.cross_entropy(seen[""], y) + share * distillation(seen[""], theirs[""], 2)
            loss = plain + weight * sum(by_indexing(seen[n], theirs[n], left[n]) for n in names) / len(names)
            tuner.run(model, 1, heard)
            assert heard.losses[number] == pytest.approx(plain.item() + weight * slow, rel=1e-9)
            twin.zero_grad()
            loss.backward()
            for mine, hand in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(mine, hand - 0.1 * hand.grad)
        assert held is not None
        assert_same_values(held.network, teacher)
        assert all(p.grad is None for p in held.network.parameters())


@pytest.mark.parametrize(("given", "left"), [(False, [1, 2, 3, 5, 6]), (True, [2, 3, 4, 6, 7])])
def test_what_was_removed_before_is_in_no_copy_and_in_a_given_teacher(given: bool, left: list[int]) -> None:
    x, y = IMAGES[0]
    model = seeded(Stream)
    graph, whole = AxisGraph(model, x[:2]), seeded(Stream, 1).eval()
    cut(graph, {"stem": [1]})
    teacher = whole if given else copy.deepcopy(model).eval()
    how = Distill(whole if given else "unpruned", weight=1.0, features="stem")
    tuner, heard = Tuner(FineTune([(x, y)], 1, distill=how)), Heard()
    with tuner.taught(model, graph=graph):
        tuner.prepare(model)
        cut(graph, {"stem": [0]}, tuner)
        cut(graph, {"stem": [3]}, tuner)
        seen, theirs = (net.stages(x) for net in (copy.deepcopy(model).train(), teacher))  # type: ignore[operator]
        tuner.run(model, 1, heard)
    term = literal(seen["stem"].detach(), theirs["stem"].detach(), {1: left})
    assert heard.losses[0] == pytest.approx(distillation(seen[""], theirs[""], 4).item() + term, rel=1e-5)
    assert {name: group.size for name, group in graph.groups.items()} == {"stem": 5, "up": 6}


def test_what_several_layers_write_side_by_side() -> None:
    x, y = IMAGES[0]
    model = seeded(lambda: Dense(4))
    graph, teacher = AxisGraph(model, x[:2]), copy.deepcopy(model).eval()
    tuner, heard = Tuner(FineTune([(x, y)], 1, distill=Distill(weight=1.0, features="layers.2.0"))), Heard()
    with tuner.taught(model, graph=graph):
        tuner.prepare(model)
        cut(graph, {"stem": [2], "layers.1.2": [0, 3]}, tuner)
        twin, made = copy.deepcopy(model).train(), []
        for net in (twin, teacher):
            net.layers[2][0].register_forward_hook(lambda m, a, output: made.append(output.detach()))  # type: ignore[index, union-attr]
        soft = distillation(twin(x), teacher(x), 4.0).item()
        tuner.run(model, 1, heard)
    # of the stem, layers.0.2 and layers.1.2, four channels each
    left = [0, 1, 3, 4, 5, 6, 7, 9, 10]
    assert heard.losses[0] == pytest.approx(soft + literal(*made, {1: left}), rel=1e-5)


def test_without_features_everything_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = seeded(), seeded(seed=1)
    twin = copy.deepcopy(model)
    losses = take(
        model, FineTune(DATA, 3, lr=0.1, momentum=0, clip_grad=None, weight_decay=0, distill=Distill(teacher))
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for (x, y), loss in zip(DATA, losses, strict=True):
        optimizer.zero_grad()
        logits = twin(x)
        soft = distillation(logits, teacher(x).detach(), 4.0)
        total = 0.1 * functional.cross_entropy(logits, y, label_smoothing=0.1) + 0.9 * soft
        assert loss == pytest.approx(total.item(), rel=1e-6)
        total.backward()
        optimizer.step()
        scheduler.step()

    def hooked(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is nothing to watch")

    monkeypatch.setattr(nn.Module, "register_forward_hook", hooked)
    (loss,) = take(seeded(), FineTune(DATA, 1, distill=Distill(teacher)))
    logits, theirs = seeded()(DATA[0][0]), teacher(DATA[0][0]).detach()
    hard = functional.cross_entropy(logits, DATA[0][1], label_smoothing=0.1)
    assert loss == ((1 - 0.9) * hard + 0.9 * distillation(logits, theirs, 4.0)).item()  # to the last digit


def test_without_labels_w_is_one() -> None:
    model, teacher = seeded(), seeded(seed=1)
    x = DATA[0][0]
    soft = distillation(model(x), teacher(x), 4.0).item()
    term = literal(model[:3](x).detach(), teacher[:3](x).detach(), {})  # type: ignore[index]
    (loss,) = take(model, FineTune([x], 1, distill=Distill(teacher, weight=0.2, features="2", feature_weight=0.5)))
    assert loss == pytest.approx(soft + 0.5 * term, rel=1e-5)
