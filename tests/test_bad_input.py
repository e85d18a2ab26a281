"""Everything a user can get wrong: one clear error each, and a model that is bit for bit what it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch_pruning as tp
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import singe_plugin
from singe_plugin import Builder, FineTune, Recipe, Scoring, load, prune, save
from singe_plugin.errors import (
    ArtifactError,
    BudgetError,
    ConfigError,
    DataError,
    FoldingError,
    GroupError,
    ScoringError,
    SingeError,
)
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.events import History
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner
from singe_plugin.run.architecture import Structure, describe_structure
from singe_plugin.run.result import Metrics, Result

from asked import asked
from small_nets import Chain, Pairs, Trace, images, mlp, vectors

GOOD = images()
X = GOOD[0][0][:2]
Y = GOOD[0][1]
MAGNITUDE = tp.importance.MagnitudeImportance()
PLATEAU, TIMMS = ReduceLROnPlateau(SGD(mlp().parameters(), 0.1)), CosineLRScheduler(SGD(mlp().parameters(), 0.1), 9)


class Case(NamedTuple):
    name: str
    act: Callable[[nn.Module], Any]
    error: type[SingeError]
    says: tuple[str, ...]  # regular expressions: the value or layer that was met, and what to do about it


def importance(**options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: SInGEImportance(**options)


def bound(*arguments: Any) -> Callable[[nn.Module], Any]:
    return lambda model: SInGEImportance().bind(*(model if a is MODEL else a for a in arguments))


MODEL = object()


def pruner(example: Any = X, imp: Any = MAGNITUDE, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: SInGEPruner(model, example, imp, **asked(**options))


def run(imp: Any = MAGNITUDE, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: SInGEPruner(model, X, imp, **asked(**{"target": "params=0.5", **options})).run()


def pruning(data: Any = GOOD, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: prune(model, data, **asked(**{"finetune_steps": 2, "verify": False, **options}))


def tuning(loader: Any = GOOD, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: Tuner(FineTune(loader, **options))


def scored(batches: Any, imp: Callable[[], Any] = SInGEImportance) -> Callable[[nn.Module], Any]:
    """Run with batches that turn out bad only when they are read."""

    def act(model: nn.Module) -> Any:
        made = imp()
        if isinstance(made, SInGEImportance):
            made.bind(model, batches)
        return SInGEPruner(model, X, made, **asked(target="params=0.5", batches=batches)).run()

    return act


def score_group(imp: Any) -> Callable[[nn.Module], Any]:
    def act(model: nn.Module) -> Any:
        frozen = [p for p in model.parameters() if not p.requires_grad]
        modes = {module: module.training for module in model.modules()}
        graph = tp.DependencyGraph().build_dependency(model.requires_grad_(), X)
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode
        return imp(graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, list(range(8))))

    return act


def compiled(model: nn.Module) -> Any:
    return SInGEPruner(torch.compile(model), X, MAGNITUDE)


class Ragged(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2, 6, 6 + index), 0


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(GOOD)


class Weird(tp.importance.Importance):  # type: ignore[misc]
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, group: Any, **_: Any) -> Any:
        return self.answer


def plain_result(model: nn.Module) -> Result:
    structure = describe_structure(model, Structure.of(model), [])
    return Result(model, Metrics(1, 1), Metrics(1, 1), history=History(), structure=structure)


def save_plain(builder: Any = None) -> Callable[[nn.Module], Any]:
    return lambda model: save(plain_result(model), "never_made", builder)


NAN = [(torch.full_like(X, float("nan")), Y[:2])]
WRONG_LABELS = [(X, torch.tensor([0, 7]))]
WRONG_SHAPE = [(torch.zeros(2, 5, 6, 6), Y[:2])]

CASES = [
    # the importance
    Case("criterion", importance(criterion="integrated"), ConfigError, ("integrated", "choose one of .*ig")),
    Case("criterion type", importance(criterion=["ig"]), ConfigError, (r"\['ig'\]", "choose one of")),
    Case("p", importance(p=0.5), ConfigError, ("p=0.5", "at least 1")),
    Case("p type", importance(p="2"), ConfigError, ("p='2'", "at least 1")),
    Case("mu one", importance(mu=1.0), ConfigError, ("mu=1.0", r"\]0, 1\[")),
    Case("mu type", importance(mu="0.9"), ConfigError, ("mu='0.9'", "0.95")),
    Case("steps", importance(steps=-1), ConfigError, ("steps=-1", "whole number >= 0")),
    Case("steps fraction", importance(steps=2.5), ConfigError, ("steps=2.5", "whole number")),
    Case("quadrature", importance(quadrature="simpson"), ConfigError, ("simpson", "geometric, gauss")),
    Case("nodes", importance(nodes=0), ConfigError, ("nodes=0", ">= 1")),
    Case("path", importance(path="channel"), ConfigError, ("channel", "layer, neuron")),
    Case("objective", importance(objective="accuracy"), ConfigError, ("accuracy", "pass a callable")),
    Case("reduction", importance(group_reduction="median"), ConfigError, ("median", "sum, mean, max")),
    Case("normalizer", importance(normalizer="l7"), ConfigError, ("l7", "choose one of")),
    Case("unit_batch", importance(unit_batch=0), ConfigError, ("unit_batch=0", ">= 1")),
    Case("scoring amp", importance(amp="int8"), ConfigError, ("int8", "bf16, fp16")),
    Case("options object", lambda m: Scoring(mu=0), ConfigError, ("mu=0", r"\]0, 1\[")),
    Case("bind no model", bound("resnet18", GOOD), ConfigError, ("got str", "torch.nn.Module")),
    Case("bind tensor", bound(MODEL, X), DataError, ("got Tensor", r"DataLoader or a list")),
    Case("bind mapping", bound(MODEL, {"x": X, "y": Y}), DataError, ("one mapping", r"\[batch\]")),
    Case("bind nothing", bound(MODEL, None), DataError, ("got NoneType", "iterable of")),
    Case("bind empty", bound(MODEL, []), DataError, ("empty", "at least one batch")),
    Case("unbound", score_group(SInGEImportance()), DataError, ("'ig'", r"importance.bind\(model, batches\)")),
    Case(
        "bound to another", score_group(SInGEImportance().bind(mlp(), GOOD)),
        ConfigError, ("another model", r"bind\("),
    ),
    # the pruner
    Case("model type", lambda m: SInGEPruner("resnet18", X, MAGNITUDE), ConfigError, ("torch.nn.Module", "str")),
    Case("compiled", compiled, ConfigError, ("compiled", "prune the plain model")),
    Case(
        "data parallel", lambda m: SInGEPruner(nn.DataParallel(m), X, MAGNITUDE),
        ConfigError, ("DataParallel", "model.module"),
    ),
    Case("importance type", pruner(imp="l2"), ConfigError, ("got str", "callable")),
    Case("example type", pruner(example="cat.png"), ConfigError, ("got str", "a tensor, a tuple")),
    Case("example device", pruner(example=X.to("meta")), ConfigError, ("on meta", "move one")),
    Case(
        "example shape", pruner(example=torch.zeros(2, 5, 6, 6)),
        GroupError, ("Chain", r"check that\s+model\(example_inputs\) runs"),
    ),
    Case("example keywords", pruner(example={"pixels": X}), GroupError, ("pixels", "check that")),
    Case("target form", pruner(target="0.5"), ConfigError, ("'0.5'", "'params=0.5'")),
    Case("target number", pruner(target=0.5), ConfigError, ("0.5", "'macs=0.5'")),
    Case("target kind", pruner(target="flops=0.5"), ConfigError, ("'flops'", "params, macs and latency", "'macs=0.5'")),
    Case("target percent", pruner(target="params=50%"), ConfigError, ("50%", r"\]0, 1\[")),
    Case("target one", pruner(target="params=1"), ConfigError, ("params=1", r"\]0, 1\[")),
    Case("target object", lambda m: Target.parse(Target("macs", 1.5)), ConfigError, ("1.5", r"\]0, 1\[")),
    Case(
        "target out of reach", run(target="params=0.999"),
        BudgetError, ("params=0.999", r"nearest.*params=0\.\d+", "choose that"),
    ),
    Case("ratios name", pruner(ratios="even"), ConfigError, ("even", "uniform, block, global")),
    Case("ratios layer", run(ratios={"conv9": 0.5}), ConfigError, ("conv9", "there are .*conv1")),
    Case("ratios module", run(ratios={nn.Identity(): 0.5}), ConfigError, ("Identity", "pruner.layers")),
    Case("ratios value", pruner(ratios={"conv1": 1.0}), ConfigError, ("1.0", "conv1", r"inside \[0, 1\[")),
    Case("ratios value type", pruner(ratios={"conv1": "half"}), ConfigError, ("'half'", r"inside \[0, 1\[")),
    Case(
        "ratios against target", run(ratios={"conv1": 0.1}),
        BudgetError, ("params=0.5", "given ratios .*target=None.* remove", "choose that"),
    ),
    Case("units zero", pruner(units_per_step=0), ConfigError, ("units_per_step=0", "whole number >= 1")),
    Case("units one point zero", pruner(units_per_step=1.0), ConfigError, ("1.0", "'layer'")),
    Case("units name", pruner(units_per_step="all"), ConfigError, ("'all'", "'layer'")),
    Case("round_to", pruner(round_to=0), ConfigError, ("round_to=0", ">= 1, or None")),
    Case("pruning_ratio", pruner(pruning_ratio=1.0), ConfigError, ("pruning_ratio=1.0", r"inside \[0, 1\[")),
    Case("max_pruning_ratio", pruner(max_pruning_ratio=0), ConfigError, ("max_pruning_ratio=0", r"\]0, 1\]")),
    Case("iterative_steps", pruner(iterative_steps=0), ConfigError, ("iterative_steps=0", ">= 1")),
    Case("ignored names", pruner(ignored_layers=["conv9"]), ConfigError, ("'conv9'", "names of modules")),
    Case("one ignored", pruner(ignored_layers="conv1"), ConfigError, ("'conv1'", "put it in a list")),
    Case("rounds with units", pruner(order="rounds", units_per_step=2), ConfigError, ("units_per_step=2", "leave")),
    Case("finetune type", pruner(finetune=GOOD), ConfigError, ("got list", r"FineTune\(loader")),
    Case("callback type", pruner(callbacks=[print]), ConfigError, ("print", "Callback")),
    Case(
        "nothing to prune", lambda m: SInGEPruner(m[0], torch.zeros(2, 4), MAGNITUDE).run(),
        BudgetError, ("Linear", "model's output"),
    ),
    Case("no data at run", run(imp=SInGEImportance()), DataError, ("'ig'", r"batches=")),
    Case(
        "taylor without data", run(imp=tp.importance.GroupTaylorImportance()),
        DataError, ("GroupTaylor", r"batches="),
    ),
    Case("no scores", run(imp=Weird(None)), GroupError, ("conv1", "another importance")),
    Case(
        "scores of a wrong length", run(imp=Weird(torch.rand(16))),
        ScoringError, ("conv1.* 8 channels", r"\(16,\)", "one score per"),
    ),
    Case("scores as a list", run(imp=Weird([1.0] * 8)), ScoringError, ("conv1", "list", "one score per")),
    Case("scores NaN", run(imp=Weird(torch.full((8,), torch.nan))), ScoringError, ("conv1", "NaN")),
    # the batches
    Case("batch of three", scored([(X, Y, Y)]), DataError, ("tuple of 3", r"pair \(inputs, targets\)")),
    Case("batch tensor", scored([X]), DataError, ("Tensor", r"pair \(inputs, targets\)")),
    Case("batch keys", scored([{"x": X, "z": Y}]), DataError, (r"\['x', 'z'\]", "rename one")),
    Case("batch shape", scored(WRONG_SHAPE), ScoringError, ("conv1", r"\(2, 5, 6, 6\)", "expected input")),
    Case("label range", scored(WRONG_LABELS), ScoringError, ("conv1", "batch 0", "7 is out of bounds")),
    Case(
        "taylor label range", scored(WRONG_LABELS, tp.importance.GroupTaylorImportance),
        ScoringError, ("7 is out of", "check the batch"),
    ),
    Case("nan inputs", scored(NAN), ScoringError, ("conv1", "not finite on batch 0", "check the batch")),
    Case("taylor empty", scored([], tp.importance.GroupTaylorImportance), DataError, ("empty", "at least one batch")),
    # fine-tuning
    Case("tuning loader", tuning(loader=X), DataError, ("got Tensor", "DataLoader or a list")),
    Case("tuning steps", tuning(steps=-5), ConfigError, ("steps=-5", ">= 0")),
    Case("tuning every", tuning(every="epoch"), ConfigError, ("epoch", "removal, layer, end")),
    Case("tuning lr", tuning(lr=0), ConfigError, ("lr=0", "positive")),
    Case("tuning lr type", tuning(lr="fast"), ConfigError, ("'fast'", "positive")),
    Case("tuning momentum", tuning(momentum=-1), ConfigError, ("momentum=-1", ">= 0")),
    Case("tuning decay", tuning(weight_decay=float("nan")), ConfigError, ("weight_decay=nan", ">= 0")),
    Case("tuning warmup", lambda m: Recipe(warmup=-1), ConfigError, ("warmup=-1", ">= 0")),
    Case("tuning smoothing", tuning(label_smoothing=1.0), ConfigError, ("label_smoothing=1.0", r"\[0, 1\[")),
    Case("tuning clip", tuning(clip_grad=0), ConfigError, ("clip_grad=0", "or None")),
    Case("tuning amp", tuning(amp="fp8"), ConfigError, ("fp8", "bf16, fp16")),
    Case("tuning optimizer", tuning(optimizer=1.5), ConfigError, ("1.5", "makes one from parameters")),
    Case("tuning optimizer name", tuning(optimizer="adm"), ConfigError, ("'adm'", "did you mean", "a function")),
    Case("tuning plateau", tuning(optimizer=PLATEAU), ConfigError, ("OnPlateau", "'metrics'", "optimizer alone")),
    Case("tuning timm's", tuning(optimizer=TIMMS), ConfigError, ("CosineLRSch", "no scheduler of torch", "alone")),
    Case(
        "tuning made scheduler", run(finetune=FineTune(GOOD, 2, optimizer=lambda p: StepLR(SGD(p, 0.1), 2))),
        ConfigError, ("made a StepLR", r"FineTune\(optimizer=scheduler\)"),
    ),
    Case("tuning empty", run(finetune=FineTune([], 2)), DataError, ("loader is empty", "at least one batch")),
    Case("tuning labels", run(finetune=FineTune(WRONG_LABELS, 2)), DataError, ("step 1", "7 is out of bounds")),
    Case("tuning nan", run(finetune=FineTune(NAN, 2)), DataError, ("nan at step 1 of 2", "lower lr")),
    Case("tuning shape", run(finetune=FineTune(WRONG_SHAPE, 2)), DataError, ("step 1", "expected input")),
    Case("tuning batch", run(finetune=FineTune([X], 2)), DataError, ("Tensor", r"pair \(inputs, targets\)")),
    Case(
        "tuning step_fn", run(finetune=FineTune(GOOD, 2, step_fn=lambda m, b: 1.0)),
        ConfigError, ("step_fn", "scalar tensor"),
    ),
    Case(
        "tuning other optimizer", run(finetune=FineTune(GOOD, 2, optimizer=torch.optim.SGD(mlp().parameters(), lr=1))),
        ConfigError, ("optimizer holds none", r"model.parameters\(\)"),
    ),
    # prune()
    Case("prune model", lambda m: prune("resnet18", GOOD), ConfigError, ("torch.nn.Module", "str")),
    Case("prune data number", pruning(42), DataError, ("got int", "DataLoader or a list")),
    Case("prune data tensor", pruning(X), DataError, ("got Tensor", "DataLoader or a list")),
    Case("prune data empty", pruning([]), DataError, ("empty", "inputs, targets")),
    Case("prune dataset empty", pruning(Pairs([(X[:0], Y[:0])])), DataError, ("dataset is empty", "at least one")),
    Case("prune dataset stream", pruning(Stream()), DataError, ("IterableDataset", "give a DataLoader")),
    Case("prune dataset ragged", pruning(Ragged()), DataError, ("4 examples", "one shape")),
    Case("prune batch form", pruning([(X, Y, Y)]), DataError, ("tuple of 3", "pair")),
    Case("prune batch shape", pruning(WRONG_SHAPE), GroupError, ("Chain", "check that")),
    Case("prune fold shape", pruning(WRONG_SHAPE, fold=True), FoldingError, ("Chain", "inputs that it runs on")),
    Case("prune labels", pruning(WRONG_LABELS), ScoringError, ("'obs'", r"0 .*\(2, 2, 6, 6\)", "7 is out of bounds")),
    Case("prune labels by Eq. 5", pruning(WRONG_LABELS, scoring="ig"), ScoringError, ("conv1", "7 is out of bounds")),
    Case("prune folded labels", pruning(WRONG_LABELS, fold=True), ScoringError, ("'obs'", "7 is out of bounds")),
    Case("prune nan", pruning(NAN), ScoringError, ("'obs'", "batch 0", "check the batch")),
    Case("prune nan by Eq. 5", pruning(NAN, scoring="ig"), ScoringError, ("conv1", "check the batch")),
    Case(
        "prune by no number", pruning(finetune_steps=0, objective=lambda y, t: y),
        ScoringError, ("one number", "mean"),
    ),
    Case(
        "prune by what is detached", pruning(finetune_steps=0, objective=lambda y, t: y.detach().sum()),
        ScoringError, ("'obs'", "through autograd", "'l2'"),
    ),
    Case("prune val", pruning(val_data=WRONG_SHAPE), DataError, ("val_data", "expected input", "form it was made for")),
    Case("prune target", pruning(target="half"), ConfigError, ("half", "'params=0.5'")),
    Case(
        "prune out of reach", pruning(target="macs=0.999"),
        BudgetError, ("macs=0.999", r"macs=0\.\d+", "choose that"),
    ),
    Case("prune criterion", pruning(criterion="taylor"), ConfigError, ("taylor", "choose one of")),
    Case("prune steps", pruning(finetune_steps=-1), ConfigError, ("steps=-1", ">= 0")),
    Case("prune every", pruning(every="step"), ConfigError, ("step", "removal, layer, end")),
    Case("prune batch size", pruning(batch_size=0), ConfigError, ("batch_size=0", ">= 1")),
    Case("prune scoring size", pruning(batch_size=1.5), ConfigError, ("batch_size=1.5", ">= 1")),
    Case("prune scoring count", pruning(batches=True), ConfigError, ("batches=True", ">= 1")),
    Case("prune seed", pruning(seed="lucky"), ConfigError, ("'lucky'", ">= 0")),
    Case("prune amp", pruning(amp="fp8"), ConfigError, ("fp8", "bf16")),
    Case("prune device name", pruning(device="gpu"), ConfigError, ("'gpu'", "not a device")),
    Case("prune device meta", pruning(device="meta"), ConfigError, ("meta", "device='cpu'")),
    Case("prune ignored", pruning(ignored_layers=["fc9"]), ConfigError, ("'fc9'", "names of modules")),
    Case("prune one ignored", pruning(ignored_layers=nn.ReLU()), ConfigError, ("ReLU()", "put it in a list")),
    Case("prune callbacks", pruning(callbacks=3), ConfigError, ("callbacks must be a list", "got 3")),
    Case("prune max ratio", pruning(max_pruning_ratio=2), ConfigError, ("max_pruning_ratio=2", r"\]0, 1\]")),
    Case("prune examples", pruning(example_inputs=X.to("meta")), ConfigError, ("on meta", "leave them out")),
    Case("prune resume", pruning(resume=True), ConfigError, ("resume=True", "out_dir")),
    Case("prune out_dir", pruning(out_dir=__file__), ArtifactError, ("test_bad_input.py", "output folder")),
    Case(
        "save with another builder", save_plain(Builder.factory("small_nets:Residual")),
        ArtifactError, ("Residual", "options that it was made with"),
    ),
    Case(
        "save with an unknown builder", save_plain(Builder.timm("resnet_of_tomorrow")),
        ArtifactError, ("resnet_of_tomorrow", "cannot be built"),
    ),
    # artifacts
    Case("builder name", lambda m: Builder.factory("Chain"), ConfigError, ("'Chain'", "package.module:function")),
    Case("builder kind", lambda m: Builder("hub", "x").build(), ArtifactError, ("hub", "'transformers' or 'factory'")),
    Case(
        "builder module", lambda m: Builder.factory("no_such_module:f").build(),
        ArtifactError, ("no_such_module", "cannot be built"),
    ),
    Case(
        "builder no model", lambda m: Builder.factory("builtins:dict").build(),
        ArtifactError, ("dict", "torch.nn.Module"),
    ),
    Case("save without builder", save_plain(), ArtifactError, ("Chain", r"Builder.factory\(")),
    Case(
        "load nothing", lambda m: load("no/such/folder"),
        ArtifactError, ("no/such/folder", r"folder that save\(\) wrote"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[c.name.replace(" ", "_") for c in CASES])
def test_one_clear_error_and_the_model_is_untouched(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp() if case.name == "nothing to prune" else Chain()
    model.train()
    if isinstance(model, Chain):
        model.bn2.eval()  # a frozen batch-norm is common, and must stay frozen
        model.conv1.weight.requires_grad_(False)
    trace = Trace(model)
    with pytest.raises(SingeError) as caught:
        case.act(model)
    assert type(caught.value) is case.error, repr(caught.value)
    message = " ".join(str(caught.value).split())
    for pattern in case.says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    trace.assert_unchanged()
    assert list(tmp_path.iterdir()) == []


def test_model_without_values() -> None:
    with torch.device("meta"):
        model = Chain()
    with pytest.raises(ConfigError, match=r"meta device.*load its weights"):
        prune(model, GOOD)
    assert all(p.is_meta for p in model.parameters())


def test_a_frozen_model_cannot_be_fine_tuned() -> None:
    model = mlp().requires_grad_(False)
    trace = Trace(model)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        prune(model, vectors(), **asked(finetune_steps=2))
    trace.assert_unchanged()


def test_a_good_call_is_not_refused() -> None:
    """The settings of the table are bad one by one: without them the same calls work."""
    torch.manual_seed(0)
    model = Chain()
    result = prune(model, GOOD, **asked(target="params=0.5", finetune_steps=2, verify=False))
    assert result.removed_params == pytest.approx(0.5, abs=0.01)
    assert issubclass(singe_plugin.SingeError, Exception)
