"""Data and models of every form that people have: each works, or is one clear error before anything is touched."""

from __future__ import annotations

import collections
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from singe_plugin import FineTune, UnstructuredPruner, prune, prune_weights, save
from singe_plugin.errors import BudgetError, ConfigError, DataError, GroupError, ScoringError, SingeError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.costs import CostModel
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner
from singe_plugin.method.batches import MOST_BATCHES
from singe_plugin.run.data import as_loader, is_dataset, lone_example, scoring_batches
from singe_plugin.run.result import Metrics, Result

from asked import asked
from small_nets import Chain, Pairs, Trace, images, mlp, vectors

GOOD = images()
X, Y = GOOD[0]
MAGNITUDE = tp.importance.MagnitudeImportance()
Two = collections.namedtuple("Two", ["a", "b"])


class Keywords(nn.Module):
    """Takes its images by the name that transformers has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain()

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.inner(pixel_values)


class Summed(nn.Module):
    """Takes two images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner(a + b)


class Records:
    """As Hugging Face's datasets: a length, examples by number that are dictionaries, no class of torch's."""

    def __init__(self, key: str = "labels") -> None:
        self.key = key

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": X[index % 8], self.key: int(Y[index % 8])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(9))


class RecordSet(Records, Dataset[Any]):
    """The same as a class of torch's."""


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            raise KeyError("no such image")
        return X[index], int(Y[index])


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[0], 0


class Lying(Endless):
    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


class Failing:
    """Batches up to a number, then an error of the user's code."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from (GOOD * 5)[: self.batches]
        raise OSError("the disk is gone")


def endless() -> Iterator[Any]:
    while True:
        yield GOOD[0]


def failing() -> Iterator[Any]:
    yield GOOD[0]
    raise OSError("the disk is gone")


def single(eights: int = 1) -> TensorDataset:
    """Eight times a number and one: with batches of four, or of that many eights, the last has one."""
    return TensorDataset(torch.cat([X] * eights + [X[:1]]), torch.cat([Y] * eights + [Y[:1]]))


def pooled() -> nn.Module:
    """Its batch-norm sees one value per channel and example."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    )


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def scripted() -> nn.Module:
    model = Chain()
    model.bn2 = torch.jit.script(model.bn2)
    return model


def inference_made() -> nn.Module:
    with torch.inference_mode():
        return Chain()


def sparse_weights() -> nn.Module:
    model = mlp()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


def examples() -> list[Any]:
    return [(X[i], int(Y[i])) for i in range(8)]


# --- what works --------------------------------------------------------------------------------------------------

WORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any]]] = {
    "inputs in a named tuple": (Summed, lambda: [(Two(X, X), Y)] * 2, {}),
    "batches that are named tuples": (Chain, lambda: [Two(X, Y)] * 2, {}),
    "batches that are dictionaries": (Keywords, lambda: [{"pixel_values": X, "labels": Y}] * 2, {}),
    "a list of dictionaries": (Keywords, lambda: [Records()[i] for i in range(9)], {"val_data": Records()}),
    "a list of examples": (Chain, examples, {"val_data": Pairs(GOOD)}),
    "a dataset of dictionaries": (Keywords, RecordSet, {"val_data": RecordSet("label")}),
    "Hugging Face's": (Keywords, Records, {"val_data": Records("targets")}),
    "numbers of numpy as classes": (Chain, lambda: [(X[i], np.int64(Y[i])) for i in range(8)], {}),
    "a short generator": (Chain, lambda: iter(GOOD), {}),
    "n mod batch is one": (pooled, lambda: single(8), {"finetune_steps": 7}),
    "more batches than there are": (Chain, lambda: Pairs(GOOD), {"batches": 10**9}),
    "a batch larger than the data": (Chain, lambda: Pairs(GOOD), {"batch_size": 10**12}),
    "one example in a batch, and no batch-norm minds": (Chain, lambda: [(X, Y), (X[:1], Y[:1])], {"finetune_steps": 4}),
    "a layer ignored twice": (Chain, lambda: GOOD, {"ignored_layers": ["conv1", "conv1"]}),
    "bytes as classes": (Chain, lambda: [(X, Y.to(torch.uint8))] * 2, {}),
    "a copy of inference tensors": (lambda: copy.deepcopy(inference_made()), lambda: GOOD, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name: str) -> None:
    make, data, options = WORKS[name]
    torch.manual_seed(0)
    settings = {"target": "params=0.5", "finetune_steps": 2, "verify": False, "min_width": 1, "device": "cpu"}
    result = prune(make(), data(), **asked(**{**settings, **options}))
    assert result.removed_params == pytest.approx(0.5, abs=0.011)
    assert (result.after.accuracy is None) is ("val_data" not in options)


def test_examples_of_every_form_are_the_same_data() -> None:
    """Drawn with one seed, a list, Hugging Face's and torch's dataset give the same scoring batches."""
    tuples = [(r["pixel_values"], r["labels"]) for r in Records()]
    found = [scoring_batches(data, [], 4, 2, seed=3) for data in (tuples, TensorDataset(*single().tensors))]
    for (x, y), (other_x, other_y) in zip(*found, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    records = [scoring_batches(data, [], 4, 2, seed=3) for data in (Records(), RecordSet(), list(Records()))]
    for (x, _), *dicts in zip(found[0], *records, strict=True):
        assert all(torch.equal(x, d["pixel_values"]) for d in dicts)


@pytest.mark.parametrize(("data", "expected"), [
    (GOOD, False), ([{"x": X, "y": Y}], False), ([(X, Y.float())], False), ([], False), (X, False), ("ab", False),
    (DataLoader(single(), 4), False), (single(), True), (Records(), True), (list(Records()), True), (examples(), True),
    ([(X[0], torch.tensor(1))], True), ([(X[0], torch.tensor(0.5))], False), ([(X, None)], False),
])  # fmt: skip
def test_what_is_drawn_from(data: Any, expected: bool) -> None:
    assert is_dataset(data) is expected


@pytest.mark.parametrize("length", range(1, 13))
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_of_shuffled_batches_only_a_single_last_example_is_left_out(length: int, size: int) -> None:
    data = TensorDataset(torch.arange(length))
    whole = [len(batch) for (batch,) in as_loader(data, size, shuffle=False)]
    shuffled = [len(batch) for (batch,) in as_loader(data, size)]
    assert sum(whole) == length
    assert shuffled == (whole[:-1] if len(whole) > 1 and whole[-1] == 1 < size else whole)
    assert lone_example(as_loader(data, size)) is (1 in shuffled)
    assert lone_example(as_loader(data, size, shuffle=False)) is (1 in whole)
    assert lone_example(DataLoader(data, size, drop_last=True)) is False or size == 1


# --- what does not -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    act: Callable[[nn.Module], Any]
    error: type[SingeError]
    says: tuple[str, ...]
    make: Callable[[], nn.Module] = Chain


def pruning(data: Any = GOOD, **options: Any) -> Callable[[nn.Module], Any]:
    """``prune``; data may be a function that makes it."""
    settings = {"finetune_steps": 2, "verify": False, "device": "cpu", **options}
    return lambda model: prune(model, data() if callable(data) else data, **asked(**settings))


def saving(builder: Any) -> Callable[[nn.Module], Any]:
    return lambda model: save(Result(model, Metrics(1, 1), Metrics(1, 1)), "never_made", builder)


def pruner(example: Any = X[:2], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: SInGEPruner(model, example, MAGNITUDE, **asked(**options))


def scoring(batches: Any, importance: Any = None) -> Callable[[nn.Module], Any]:
    """A pruner's run, with batches that are read only when a layer is scored."""

    def act(model: nn.Module) -> Any:
        given = SInGEImportance().bind(model, batches) if importance is None else importance
        return SInGEPruner(model, X[:2], given, **asked(batches=batches, target="params=0.5")).run()

    return act


def under_inference(act: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    def run(model: nn.Module) -> Any:
        with torch.inference_mode():
            return act(model)

    return run


def inference_batches() -> Any:
    with torch.inference_mode():
        return [(X + 0, Y + 0)]


def stepped_under_inference(model: nn.Module) -> Any:
    made = SInGEPruner(model, X[:2], MAGNITUDE)
    with torch.inference_mode():
        return made.step()


COST = CostModel((), 10, 10)
LONE = DataLoader(single(), batch_size=4)
ENDLESS = (f"{MOST_BATCHES + 1} batches", "islice")
CASES = {
    # the data
    "images without classes": Case(pruning([X[0], X[1], X[2]]), DataError, ("pair", "got a Tensor")),
    "a class under another name": Case(
        pruning(Records("klass")), DataError, ("klass", "none of which is a target"), Keywords
    ),
    "an array": Case(pruning(X.numpy()), DataError, ("got ndarray", "DataLoader or a list")),
    "batches of arrays": Case(pruning([(X.numpy(), Y)]), DataError, ("inputs.*ndarray", "from_numpy")),
    "classes in arrays": Case(pruning([(X, Y.numpy())]), DataError, ("targets.*ndarray", "from_numpy")),
    "bytes": Case(pruning(b"abc"), DataError, ("got bytes",)),
    "bytes in a batch": Case(pruning([(b"abc", Y)]), DataError, ("inputs.*bytes",)),
    "nothing": Case(pruning(None), DataError, ("got NoneType",)),
    "a path": Case(pruning(__file__), DataError, ("got str",)),
    "a set": Case(pruning({1, 2}), DataError, ("pair", "got a int")),
    "one batch": Case(pruning({"x": X, "y": Y}), DataError, (r"\[batch\]",)),
    "an empty loader": Case(pruning(DataLoader(TensorDataset(X[:0], Y[:0]), 2)), DataError, ("the data is empty",)),
    "a loader that drops all": Case(pruning(DataLoader(single(), 99, drop_last=True)), DataError, ("is empty",)),
    "a batch of nothing": Case(pruning([(X[:0], Y[:0])]), DataError, (r"\(0, 2, 6, 6\)", "no example")),
    "inputs on meta": Case(pruning([(X.to("meta"), Y)]), DataError, ("inputs.*on meta",)),
    "targets on meta": Case(pruning([(X, Y.to("meta"))]), DataError, ("targets.*on meta",)),
    "sparse inputs": Case(pruning([(X.to_sparse(), Y)]), DataError, ("sparse", "to_dense")),
    "inputs in dictionaries on meta": Case(
        pruning([{"pixel_values": X.to("meta"), "y": Y}]), DataError, ("on meta",), Keywords
    ),
    "inference tensors": Case(pruning(inference_batches), DataError, ("inference_mode", r"clone\(\)")),
    "too few classes": Case(pruning([(X, Y[:5])]), ScoringError, ("'obs'", "batch 0", r"\(8\)", r"\(5\)")),
    "images of whole numbers": Case(pruning([((9 * X).to(torch.uint8), Y)]), GroupError, ("Byte",)),
    "images in double precision": Case(pruning([(X.double(), Y)]), GroupError, ("Double",)),
    "NaN in one image": Case(
        pruning([(X * torch.tensor([1.0] * 7 + [float("nan")])[:, None, None, None], Y)]), ScoringError, ("not finite",)
    ),
    "an example that cannot be read": Case(pruning(Broken()), DataError, ("example 3", "no such image")),
    "a loader that fails at once": Case(pruning(Failing(0)), DataError, ("batch 0", "the disk is gone")),
    "a generator that fails": Case(pruning(failing), DataError, ("batch 1", "OSError: the disk is gone")),
    "a loader that fails in the middle": Case(
        pruning(Failing(5), finetune_steps=20, repair=None), DataError, ("fine-tuning loader.*batch 5", "disk")
    ),
    "a loader that fails after the scoring batches": Case(pruning(Failing(5)), DataError, ("batch 5", "disk")),
    "data without end": Case(pruning(endless), DataError, ENDLESS),
    "data without end to score on": Case(lambda m: SInGEImportance().bind(m, endless()), DataError, ENDLESS),
    "data without end to train on": Case(lambda m: Tuner(FineTune(endless())), DataError, ENDLESS),
    "data without end for weights": Case(
        lambda m: prune_weights(m, endless(), **asked(finetune_steps=0)), DataError, ENDLESS
    ),
    "data without end, no generator": Case(
        lambda m: UnstructuredPruner(m, type("Endless", (), {"__iter__": lambda self: endless()})()), DataError, ENDLESS
    ),
    "one example in a loader's last batch": Case(
        pruning(LONE, finetune_steps=9), DataError, ("single example", "drop_last=True"), pooled
    ),
    "one example in a list": Case(
        pruning([(X, Y), (X[:1], Y[:1])]), DataError, ("single example", "batch-norm"), pooled
    ),
    "one example, weights": Case(
        lambda m: prune_weights(m, LONE, **asked(finetune_steps=9, batches=1)),
        DataError,
        ("single example",),
        pooled,
    ),
    "a dataset without a length": Case(pruning(Endless()), DataError, ("Endless says no length", "__len__")),
    "a dataset that lies": Case(pruning(Lying()), DataError, ("example [0-9]+", "IndexError")),
    "a sampler of what is not there": Case(
        pruning(DataLoader(single(), 2, sampler=[99])), DataError, ("batch 0", "99")
    ),
    "a collate_fn that fails": Case(
        pruning(DataLoader(single(), 2, collate_fn=lambda batch: 1 / 0)), DataError, ("ZeroDivisionError",)
    ),
    "no inputs, weights": Case(lambda m: UnstructuredPruner(m, [(None, Y)]), DataError, ("inputs.*None",)),
    "on meta, weights": Case(lambda m: UnstructuredPruner(m, [(X.to("meta"), Y)]), DataError, ("inputs.*on meta",)),
    "on meta, to score on": Case(scoring([(X.to("meta"), Y)]), DataError, ("inputs.*on meta",)),
    "arrays to score on": Case(scoring([(X.numpy(), Y)]), DataError, ("inputs.*ndarray",)),
    "failing to score on": Case(scoring(Failing(1)), DataError, ("to score on.*batch 1", "disk")),
    "failing, for gradients": Case(
        scoring(Failing(1), tp.importance.TaylorImportance()), DataError, ("to score on.*batch 1", "disk")
    ),
    "nothing, for gradients": Case(
        scoring([(X[:0], Y[:0])], tp.importance.TaylorImportance()), DataError, ("no example",)
    ),
    # val_data
    "val_data with too few classes": Case(pruning(val_data=[(X, Y[:5])]), DataError, ("5 targets", "8 outputs")),
    "val_data with one class": Case(pruning(val_data=[(X, Y[:1])]), DataError, ("1 targets", "8 outputs")),
    "val_data that fails": Case(pruning(val_data=Failing(2)), DataError, ("val_data.*batch 2", "disk")),
    "val_data that is a number": Case(pruning(val_data=3), DataError, ("got int",)),
    "val_data of nothing": Case(pruning(val_data=[]), DataError, ("val_data is empty",)),
    # the model
    "lazy": Case(pruning(), ConfigError, ("layer '0'", "lazy", "run the model on a batch"), lazy),
    "lazy, a pruner": Case(pruner(), ConfigError, ("layer '0'", "lazy"), lazy),
    "lazy, weights": Case(lambda m: UnstructuredPruner(m, GOOD), ConfigError, ("layer '0'", "lazy"), lazy),
    "a scripted part": Case(pruning(), ConfigError, ("'bn2' is scripted", "plain module"), scripted),
    "a traced model": Case(pruning(), ConfigError, ("scripted",), lambda: torch.jit.trace(Chain().eval(), X)),
    "no parameters": Case(pruning(vectors()), ConfigError, ("no parameters",), lambda: nn.Sequential(nn.ReLU())),
    "complex": Case(
        pruning(vectors()),
        ConfigError,
        ("'0.weight'", "complex64"),
        lambda: nn.Sequential(nn.Linear(4, 8, dtype=torch.cfloat)),
    ),
    "sparse weights": Case(pruning(vectors()), ConfigError, ("'0.weight'", "sparse_coo"), sparse_weights),
    "inference parameters": Case(
        pruning(), ConfigError, ("conv1.weight", "inference_mode", "deepcopy"), inference_made
    ),
    # where it is called
    "prune under inference_mode": Case(under_inference(pruning()), ConfigError, ("outside of it",)),
    "a pruner under inference_mode": Case(under_inference(pruner()), ConfigError, ("outside of it",)),
    "step under inference_mode": Case(stepped_under_inference, ConfigError, ("outside of it",)),
    "weights under inference_mode": Case(
        under_inference(lambda m: prune_weights(m, GOOD)), ConfigError, ("outside of it",)
    ),
    # options
    "seed": Case(pruning(seed=2**70), ConfigError, (str(2**70), r"2\*\*64")),
    "nodes": Case(pruning(nodes=10**9), ConfigError, ("nodes=1000000000", "at most 1000")),
    "steps": Case(pruning(steps=10**9, quadrature="geometric"), ConfigError, ("steps=1000000000", "at most")),
    "rounds": Case(pruning(rounds=10**6), ConfigError, ("rounds=1000000", "at most 1000")),
    "rounds of weights": Case(
        lambda m: prune_weights(m, GOOD, **asked(rounds=10**6)), ConfigError, ("rounds=1000000",)
    ),
    "iterative_steps": Case(pruner(iterative_steps=10**9), ConfigError, ("iterative_steps=1000000000", "at most")),
    "builder": Case(saving("resnet18"), ConfigError, ("'resnet18'", "Builder.factory")),
    "out_dir": Case(pruning(out_dir=3), ConfigError, ("3 is not the path of a folder",)),
    "device": Case(pruning(device=3.5), ConfigError, ("3.5", "not a device")),
    "callbacks": Case(pruning(callbacks="abc"), ConfigError, ("'a'", "Callback")),
    "ratios": Case(pruning(ratios={"conv1"}), ConfigError, ("conv1", "give a dict")),
    "no example": Case(pruner(X[:0]), ConfigError, (r"\(0, 2, 6, 6\)", "give two examples")),
    "no example inputs": Case(pruner(None), ConfigError, ("got NoneType",)),
    "min_width": Case(pruning(min_width=0), ConfigError, ("min_width=0", ">= 1")),
    "min_width, half": Case(pruner(min_width=2.5), ConfigError, ("min_width=2.5", ">= 1")),
    "min_width of all": Case(
        pruning(target="params=0.5", min_width=10**9), BudgetError, (r"nearest.*params=0\.0000", "min_width")
    ),
    "course": Case(pruning(course=["cubic"]), ConfigError, (r"\['cubic'\]", "cubic, linear")),
    # targets
    "flops": Case(pruning(target="flops=0.5"), ConfigError, ("'flops'", "params, macs and latency")),
    "energy": Case(pruner(target="energy=0.5"), ConfigError, ("'energy'", "params, macs and latency")),
    "foo": Case(pruner(target="foo=.5"), ConfigError, ("'foo'", "params, macs and latency")),
    "MACS": Case(pruner(target="MACS=.5"), ConfigError, ("'MACS'", "params, macs and latency")),
    "a target object": Case(lambda m: Target("flops", 0.5), ConfigError, ("'flops'", "params, macs and latency")),
    "what a cost is of": Case(lambda m: COST.cost("energy", {}), ConfigError, ("'energy'", "params, macs and latency")),
    "what goes": Case(
        lambda m: COST.removed_fraction("param", {}), ConfigError, ("'param'", "params, macs and latency")
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_and_the_model_is_untouched(name: str) -> None:
    case = CASES[name]
    model = case.make()
    comparable = not any(torch.nn.parameter.is_lazy(p) or p.layout is not torch.strided for p in model.parameters())
    trace = Trace(model) if comparable else None
    with pytest.raises(SingeError) as caught:
        case.act(model)
    assert type(caught.value) is case.error, repr(caught.value)
    message = " ".join(str(caught.value).split())
    for pattern in case.says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    if trace is not None:
        trace.assert_unchanged()


def test_the_cause_of_an_error_in_the_users_code_is_kept() -> None:
    with pytest.raises(DataError) as caught:
        prune(Chain(), Failing(0))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt()])
def test_what_is_no_error_of_the_data_passes(error: BaseException) -> None:
    def batches() -> Iterator[Any]:
        yield GOOD[0]
        raise error

    with pytest.raises(type(error)):
        prune(Chain(), batches())
