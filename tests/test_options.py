"""Options are defined once: whoever adds a field to a class finds it everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch_pruning as tp
from click.testing import CliRunner
from torch import nn

import singe_plugin
from singe_plugin import Distill, FineTune, Pace, Repair, Scoring, SInGEImportance, SInGEPruner
from singe_plugin.app.options import generated, objects
from singe_plugin.errors import ConfigError
from singe_plugin.fields import as_options, describe, spellings
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner

ROOT = Path(__file__).parent.parent

ADDING = """
import importlib.util, json, sys
spec = importlib.util.find_spec("singe_plugin.method.options")
source = spec.loader.get_source("singe_plugin.method.options")
mark = "    p: float = option("
assert source.count(mark) == 1
edited = source.replace(mark, '    dummy: int = option(default=3, text="A dummy that means nothing.")\\n' + mark)
module = importlib.util.module_from_spec(spec)
sys.modules["singe_plugin.method.options"] = module
exec(compile(edited, spec.origin, "exec"), module.__dict__)  # the one edit

import inspect
import torch
from click.testing import CliRunner
from torch import nn
import singe_plugin
from singe_plugin import FineTune, Pace, SInGEImportance, Scoring
from singe_plugin.app.cli import main
from singe_plugin.loop.target import Target
from singe_plugin.loop.tuner import Tuner
from singe_plugin.fields import table

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
found = {}
found["importance"] = SInGEImportance(dummy=5).scoring.dummy
found["signature"] = "dummy" in inspect.signature(SInGEImportance).parameters
found["by position"] = SInGEImportance("ig", 7).scoring.dummy
result = singe_plugin.prune(net(), batches, target="params=0.5", scoring=Scoring(dummy=5), finetune=0)
found["record"] = result.options["scoring"]["dummy"]
weights = singe_plugin.prune_weights(net(), batches, scoring=Scoring(dummy=6), pace=Pace(rounds=1), finetune=0)
found["record of weights"] = weights.options["scoring"]["dummy"]
found["help"] = "A dummy that means nothing." in " ".join(CliRunner().invoke(main, ["prune", "--help"]).output.split())
found["docs"] = "| `dummy` | `3` | A dummy that means nothing. |" in table(Scoring)
found["docstring"] = "dummy: A dummy that means nothing." in Scoring.__doc__
if importlib.util.find_spec("nni") is not None:
    from singe_plugin.integrations.nni import SInGEPruner
    config = [{"op_types": ["Linear"], "exclude_op_names": ["2"], "sparse_ratio": 0.5}]
    found["nni"] = SInGEPruner(net(), config, batches=batches, scoring=Scoring(dummy=8)).scoring.dummy
print(json.dumps(found))
"""


def test_a_new_option_is_one_edit() -> None:
    run = subprocess.run([sys.executable, "-c", ADDING], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = {
        "importance": 5, "signature": True, "by position": 7, "record": 5, "record of weights": 6, "help": True,
        "docs": True, "docstring": True,
    }  # fmt: skip
    if importlib.util.find_spec("nni") is not None:
        expected["nni"] = 8
    assert json.loads(run.stdout.splitlines()[-1]) == expected


def test_the_page_of_options_is_what_the_classes_say() -> None:
    spec = importlib.util.spec_from_file_location("write_options", ROOT / "docs" / "write_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "options.md").read_text() == module.page(), "run python docs/write_options.py"


CLASSES = (Scoring, Pace, Repair, FineTune, Distill)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_documented_in_whole_sentences(cls: type) -> None:
    for field in dataclasses.fields(cls):
        text = field.metadata["text"]
        assert text.lstrip("`")[0].isupper() or text[0] == "`", field.name
        assert text.rstrip().endswith("."), field.name
        assert f"{field.name}: {text}" in (cls.__doc__ or "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), dataclasses.fields(cls)[0].name, None)


def test_the_command_has_every_option_that_it_can_spell() -> None:
    targets = {target for spelling in spellings(*CLASSES) for target in spelling.targets}
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            assert ((cls, field.name) in targets) is field.metadata["command"], field.name
    names = [spelling.name for spelling in spellings(*CLASSES)]
    flags = [flag for spelling in spellings(*CLASSES) for flag in spelling.flags]
    assert len(names) == len(set(names))
    assert len(flags) == len(set(flags))


def test_what_stands_for_an_object() -> None:
    assert as_options(Scoring, "ig_abs", "scoring", "criterion") == Scoring("ig_abs")
    assert as_options(Pace, None, "pace", "order") == Pace()
    assert as_options(FineTune, 7, "finetune", "steps") == FineTune(steps=7)
    assert as_options(Scoring, len, "scoring", "criterion").criterion is len
    for cls, value, name, field in ((Pace, 3.5, "pace", "order"), (FineTune, True, "finetune", "steps")):
        with pytest.raises(
            ConfigError, match=rf"{name} must be a {cls.__name__}, or its {field}, got {type(value).__name__}"
        ):
            as_options(cls, value, name, field)
    with pytest.raises(ConfigError, match=r"unknown order 'round' \(did you mean 'rounds'\?\); choose one of"):
        as_options(Pace, "round", "pace", "order")


def test_a_teacher_stands_for_the_distillation_from_it() -> None:
    module = nn.Linear(2, 2)
    for teacher, named in (("unpruned", "unpruned"), ("auto", "auto"), (module, "Linear")):
        short, long = FineTune(distill=teacher), FineTune(distill=Distill(teacher))
        assert short == long != FineTune()
        assert describe(short) == describe(long)
        how = {"temperature": 4.0, "weight": 0.9, "features": None, "feature_weight": 1.0}
        assert describe(short)["distill"] == {"teacher": named, **how}
    assert FineTune(distill="auto") != FineTune(distill="unpruned")
    assert FineTune(distill=module) != FineTune(distill=nn.Linear(2, 2))
    assert FineTune(optimizer="adamw") != FineTune(optimizer="sgd")
    assert "distill=Distill(teacher='auto', temperature=4.0, weight=0.9, feat" in repr(FineTune(distill="auto"))
    assert describe(FineTune())["distill"] is None


def test_a_record_is_the_same_in_every_process_and_plain() -> None:
    options = FineTune([(1, 2)], loss=lambda a, b: a, optimizer=None, ema=None)
    record = describe(options)
    assert json.loads(json.dumps(record)) == record
    assert record["loader"] == "list"
    assert " at 0x" not in json.dumps(record)


MOST = 16  # parameters of one function or constructor


def public() -> list[tuple[str, Any]]:
    """Every function and class that a module of ours names as public."""
    found = []
    for info in pkgutil.walk_packages(singe_plugin.__path__, "singe_plugin."):
        if "nni" in info.name and importlib.util.find_spec("nni") is None:
            continue
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            maker = value.__init__ if isinstance(value, type) else value
            ours = getattr(maker, "__module__", "singe_plugin").startswith("singe_plugin")  # not a host library's base
            if ours and getattr(value, "__module__", "") == info.name and callable(value):
                found.append((f"{info.name}.{name}", value))
    return found


def test_no_public_function_takes_more_than_sixteen_parameters() -> None:
    many = {}
    for name, value in public():
        try:
            count = len(inspect.signature(value).parameters)
        except (TypeError, ValueError):
            continue
        if count > MOST:
            many[name] = count
    assert many == {}


# --- what a run records, and so what a resumed one notices ----------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))


BATCHES = [(torch.randn(8, 4), torch.arange(8) % 2) for _ in range(2)]
smooth = partial(torch.nn.functional.cross_entropy, label_smoothing=0.3)


@pytest.mark.parametrize(("one", "other"), [
    (FineTune(loss=smooth), FineTune(loss=partial(smooth, label_smoothing=0.0))),
    (FineTune(), FineTune(loss=torch.nn.functional.cross_entropy)),
    (FineTune(optimizer=partial(torch.optim.SGD, lr=0.1)), FineTune(optimizer=partial(torch.optim.SGD, lr=0.2))),
    (FineTune(distill="auto"), FineTune()),
    (FineTune(distill="auto"), FineTune(distill="unpruned")),
    (FineTune(distill=Distill(temperature=2.0)), FineTune(distill=Distill(temperature=3.0))),
    (Scoring(objective=smooth), Scoring(objective=partial(smooth, label_smoothing=0.0))),
    (Pace(ratios={"0": 0.5}), Pace(ratios={"0": 0.25})),
])  # fmt: skip
def test_what_differs_is_recorded_as_different(one: Any, other: Any) -> None:
    assert describe(one) != describe(other)
    assert json.loads(json.dumps(describe(one))) == describe(one)


def test_tuners_record_the_given_loss_beside_the_one_in_force() -> None:
    plain, given = (
        Tuner(FineTune(BATCHES, 4, loss=loss)).describe() for loss in (None, torch.nn.functional.cross_entropy)
    )
    assert plain != given
    assert (plain["minimises"], given["minimises"]) == ("cross_entropy", "cross_entropy")


def test_ratios_by_modules_are_recorded_by_names_and_targets_as_texts() -> None:
    model = net()
    ratios = {model[0]: 0.5, model[2]: 0.25, model[4]: 0.5}
    result = singe_plugin.prune(model, BATCHES, target=None, pace=Pace(ratios=ratios, min_width=1), finetune=0)
    assert result.options["pace"]["ratios"] == {"0": 0.5, "2": 0.25, "4": 0.5}
    result = singe_plugin.prune(net(), BATCHES, target=Target.parse("params=0.4"), finetune=0)
    assert result.options["target"] == "params=0.4"


def test_an_importance_is_recorded_as_it_scores_and_stays_free() -> None:
    importance = SInGEImportance(mu=0.95)
    for model in (net(), net()):  # another model, and other data, with the same object
        result = singe_plugin.prune(model, BATCHES[:1], target="params=0.4", scoring=importance, finetune=0)
        assert importance.model is None
        assert importance.batches is None
    recorded = result.options["scoring"]
    assert (recorded["mu"], recorded["nodes"], importance.scoring.passes) == (0.95, 5, 5)
    with pytest.raises(ConfigError, match="nodes was given beside a SInGEImportance, which would ignore it"):
        singe_plugin.prune(net(), BATCHES, scoring=Scoring(importance, nodes=3))
    with pytest.raises(ConfigError, match=r"criterion=MagnitudeImportance is a class; call it"):
        Scoring(tp.importance.MagnitudeImportance)


def test_what_implies_an_order() -> None:
    assert Pace(rounds=8).settle(order="layers").order == "rounds"
    assert Pace(units_per_step=1).settle().order == "layers"
    with pytest.raises(ConfigError, match="course='linear' is for order='rounds'"):
        Pace("layers", course="linear")
    with pytest.raises(ConfigError, match=r"max_pruning_ratio=1.0 and pace.max_pruning_ratio=0.3 were both given"):
        SInGEPruner(
            net(), torch.zeros(2, 4), tp.importance.MagnitudeImportance(), max_pruning_ratio=1.0,
            pace=Pace(max_pruning_ratio=0.3),
        )  # fmt: skip


def test_options_with_objects_can_be_compared_and_printed() -> None:
    assert FineTune(BATCHES, 4) == FineTune(BATCHES[:1], 4) != FineTune(BATCHES, 5)
    assert len(repr(FineTune(BATCHES))) < 400


def test_what_can_be_none_can_be_switched_off_at_the_command() -> None:
    seen: list[Any] = []
    command = click.Command(
        "try", params=[], callback=lambda **options: seen.append(objects(options, FineTune, Scoring))
    )
    command = generated(FineTune, Scoring)(command)
    for arguments, expected in (
        (["--amp", "none", "--clip-grad", "none"], (None, None)), ([], ("auto", 1.0)),
        (["--amp", "bf16", "--clip-grad", "0.5"], ("bf16", 0.5)),
    ):  # fmt: skip
        assert CliRunner().invoke(command, arguments).exit_code == 0
        assert (seen[-1][0].amp, seen[-1][0].clip_grad) == expected
    assert CliRunner().invoke(command, ["--amp", "int8"]).exit_code == 2
