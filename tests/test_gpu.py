"""On a CUDA device: what runs there is what runs on the CPU, everything goes along, and everything comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import singe_plugin
from singe_plugin import FineTune, Pace, Repair, Result, prune, prune_weights
from singe_plugin.axes import AxisGraph, verify_groups
from singe_plugin.errors import ConfigError, ScoringError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.loop.costs import count_macs
from singe_plugin.loop.events import Callback
from singe_plugin.loop.tuner import Tuner
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.run.architecture import Builder
from singe_plugin.run.data import evaluate

from asked import asked
from references import CASES, Net, get_case
from small_nets import Chain, Recurrent, StopAt, Trace, assert_same_values, images, sequences, values_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)
FULL: dict[str, Any] = {"finetune_steps": 0, "verify": False}


@pytest.fixture(autouse=True)
def exact() -> Any:
    """Single precision as on the CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def chain(seed: int = 0) -> Chain:
    torch.manual_seed(seed)
    return Chain().eval()


def devices(model: nn.Module) -> set[str]:
    return {t.device.type for t in (*model.parameters(), *model.buffers())}


def moved(batches: list[Any], device: Any = CUDA) -> list[Any]:
    return [(x.to(device), y.to(device)) for x, y in batches]


def kept(result: Result) -> dict[str, int]:
    return {row.name: row.units_after for row in result.layers}


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_scores_are_those_of_the_cpu(name: str, path: str) -> None:
    case = get_case(name)
    options = Scoring("ig", path=path, nodes=3)
    expected = score_units(case.model, case.group, case.batches, options)
    case.model.to(CUDA)  # the group's layers move along: they are the model's
    for batches in (case.batches, [tuple(t.to(CUDA) for t in batch) for batch in case.batches]):
        got = score_units(case.model, case.group, batches, options)
        torch.testing.assert_close(got.cpu(), expected.cpu(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_pruned_as_on_the_cpu(kind: type[nn.RNNBase]) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return Recurrent(kind, 32, 24).eval()

    batches = sequences()
    on_cpu, on_cuda = AxisGraph(made(), batches[0][0]), AxisGraph(made().to(CUDA), batches[0][0].to(CUDA))
    assert list(on_cuda.groups) == list(on_cpu.groups)
    assert verify_groups(on_cuda) == verify_groups(on_cpu)
    results = [prune(made(), batches, **asked(target="params=0.3", device=d, **FULL)) for d in ("cpu", "cuda")]
    assert kept(results[0]) == kept(results[1])
    assert_close_values(results[1].model, results[0].model)


def assert_close_values(got: nn.Module, expected: nn.Module) -> None:
    a, b = values_of(got), values_of(expected)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    for key in a:
        torch.testing.assert_close(a[key].cpu(), b[key].cpu(), rtol=1e-4, atol=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"order": "layers"}, {"fold": True}, {"path": "neuron"}], ids=str)
@pytest.mark.parametrize("example", [False, True])
def test_a_model_goes_there_and_comes_back(options: dict[str, Any], example: bool) -> None:
    batches = images(3)
    given = {"example_inputs": batches[0][0][:2]} if example else {}
    expected = prune(chain(), batches, **asked(target="params=0.5", device="cpu", **FULL, **options))
    model = chain()
    result = prune(model, batches, **asked(target="params=0.5", val_data=batches, **FULL, **given, **options))
    assert devices(model) == {"cpu"}
    assert kept(result) == kept(expected)
    assert (result.after.params, result.after.macs) == (expected.after.params, expected.after.macs)
    assert_close_values(result.model, expected.model)


def test_a_model_that_is_there_stays() -> None:
    model = chain().to(CUDA)
    prune(model, images(2), **asked(target="params=0.4", **FULL))
    assert devices(model) == {"cuda"}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_device_stays_there() -> None:
    model = chain().to("cuda:1")
    prune(model, images(2), **asked(target="params=0.4", finetune_steps=2))
    assert {t.device.index for t in model.parameters()} == {1}


def test_masks_of_single_weights_come_back_with_the_weights() -> None:
    batches = images(2)
    result = prune_weights(
        chain(), batches, **asked(sparsity=0.5, rounds=2, finetune_steps=2, example_inputs=batches[0][0][:2])
    )
    expected = prune_weights(chain(), batches, **asked(sparsity=0.5, rounds=1, finetune_steps=0, device="cpu"))
    got = prune_weights(chain(), batches, **asked(sparsity=0.5, rounds=1, finetune_steps=0))
    assert devices(result.model) == {"cpu"}
    assert {mask.device.type for mask in result.weight_masks.values()} == {"cpu"}
    assert all(torch.equal(got.weight_masks[k], expected.weight_masks[k]) for k in expected.weight_masks)


def test_optimizer_and_average_go_along_and_come_back() -> None:
    batches, model = images(3), chain()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model(batches[0][0]).square().sum().backward()
    optimizer.step()  # it has momentum now, on the CPU
    optimizer.zero_grad()
    loop = FineTune(batches, 4, optimizer=optimizer, ema=ema)
    result = prune(model, batches, target="params=0.4", finetune=loop, pace=Pace(verify=False))
    assert devices(result.model) == devices(ema) == {"cpu"}
    assert {v.device.type for state in optimizer.state.values() for v in state.values()} == {"cpu"}
    assert [p.shape for p in ema.parameters()] == [p.shape for p in model.parameters()]
    model(batches[0][0]).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("given", [False, True])
def test_a_teacher_goes_along_and_comes_back(given: bool) -> None:
    teacher, found = chain(1).train(), []
    trace, buffers = Trace(teacher), dict(teacher.named_buffers())
    for device in ("cpu", "cuda"):
        loop = FineTune(images(3), 4, "end", amp=None, distill=teacher if given else "unpruned")
        result = prune(chain(), images(3), target="params=0.4", finetune=loop, pace=Pace(verify=False), device=device)
        found.append([event["loss"] for event in result.history.select("finetune_step")])
        trace.assert_unchanged(ignore=("rng",))  # making networks and images seeds
        assert all(buffers[name] is buffer for name, buffer in teacher.named_buffers())
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_resumed_on_the_device(fused: bool, tmp_path: Path) -> None:
    def run(out: Path | None, **options: Any) -> Result:
        loop = FineTune(images(3), 8, "layer", optimizer=lambda p: torch.optim.AdamW(p, 0.01, fused=fused), amp=None)
        return prune(
            chain(), images(3), **asked(target="params=0.5", finetune=loop, out_dir=out, verify=False, **options)
        )

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[StopAt("finetune_step", 5)])
    assert_close_values(run(tmp_path, resume=True).model, whole.model)


def test_mixed_precision_and_memory_format() -> None:
    for amp in ("bf16", "fp16"):
        result = prune(
            chain(),
            images(3),
            target="params=0.5",
            scoring=Scoring(amp=amp, channels_last=True),
            finetune=FineTune(steps=4, amp=amp, channels_last=True),
            pace=Pace(verify=False),
        )
        assert all(bool(v.isfinite().all()) for v in values_of(result.model).values() if v.is_floating_point())


def test_the_random_states_are_left_alone() -> None:
    model, data = chain(), images(2)  # this seeds, too
    torch.cuda.manual_seed_all(11)
    before, numbers = torch.cuda.get_rng_state(0), torch.rand(3, device=CUDA)
    torch.cuda.set_rng_state(before, 0)
    prune(model, data, **asked(target="params=0.4", finetune_steps=2, verify=False))
    assert torch.equal(torch.cuda.get_rng_state(0), before)
    assert torch.equal(torch.rand(3, device=CUDA), numbers)


def test_the_accuracy_is_that_of_the_cpu() -> None:
    model, batches = chain(), images(3)
    expected = evaluate(model, batches)
    assert evaluate(model.to(CUDA), batches) == expected
    assert evaluate(model.cpu(), moved(batches)) == expected  # copies to the CPU are waited for


def test_macs_are_those_of_the_cpu() -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    net = Net(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=attention)
    x = torch.randn(2, 10, 16)
    expected = count_macs(net, x)
    assert count_macs(net.to(CUDA), x.to(CUDA)) == expected


def test_labels_out_of_range_leave_the_device_usable() -> None:
    model = chain()
    state = Trace(model)
    wrong = [(x, y + 1) for x, y in images(2)]
    with pytest.raises(ScoringError, match="Target 3 is out of bounds"):
        prune(model, wrong, **asked(target="params=0.5", **FULL))
    state.assert_unchanged()
    assert float(torch.ones(3, device=CUDA).sum()) == 3


def test_the_pruner_on_the_device() -> None:
    batches = images(2)
    pruner = SInGEPruner(
        chain().to(CUDA), batches[0][0].to(CUDA), SInGEImportance(),
        **asked(target="params=0.5", batches=moved(batches), finetune=FineTune(batches, 4), units_per_step=0.25),
    )  # fmt: skip
    pruner.run()
    with torch.no_grad():
        assert pruner.model(batches[0][0].to(CUDA)).shape == (8, 3)


def test_saved_there_and_loaded_here(tmp_path: Path) -> None:
    result = prune(chain().to(CUDA), images(2), **asked(target="params=0.5", **FULL))
    singe_plugin.save(result, tmp_path, Builder.factory("small_nets:Chain"))
    here, x = singe_plugin.load(tmp_path, trust=True).model, images(1)[0][0]
    torch.testing.assert_close(here(x), result.model(x.to(CUDA)).cpu(), rtol=1e-4, atol=1e-5)
    assert_same_values(here, {k: v.cpu() for k, v in values_of(result.model).items()})


def test_nni_takes_batches_on_the_cpu() -> None:
    pytest.importorskip("nni")
    nni = pytest.importorskip("singe_plugin.integrations.nni")
    model, batches = chain().to(CUDA), images(2)
    pruner = nni.SInGEPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], batches=batches)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    expected = nni.SInGEPruner(chain(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], batches=batches)
    _, on_cpu = expected.compress()
    assert {k: v["weight"].sum().item() for k, v in masks.items()} == {
        k: v["weight"].sum().item() for k, v in on_cpu.items()
    }
    nni.shrink(model, masks, batches[0][0])
    assert devices(model) == {"cuda"}


def test_a_phase_of_fine_tuning_on_the_device() -> None:
    model = chain().to(CUDA)
    loop = Tuner(FineTune(images(2), 3, amp="fp16"))
    loop.prepare(model)
    loop.run(model, 3, Callback())
    assert loop.done == 3
    assert devices(model) == {"cuda"}


# --- repair -----------------------------------------------------------------------------------------------------


def test_a_repair_is_that_of_the_cpu() -> None:
    batches = [x for x, _ in images(4)]
    found = []
    for device in ("cpu", "cuda"):
        model, original = chain(), chain().to(device)
        SInGEPruner(model, batches[0], SInGEImportance("l2"), target="params=0.5").run()
        model.to(device)
        done = singe_plugin.repair(model, original, batches, Repair(ridge=1e-2))
        assert devices(model) == devices(original) == {device}
        found.append((model, {layer.name: (layer.before, layer.after) for layer in done.better}))
    assert found[0][1].keys() == found[1][1].keys()
    assert found[0][1]
    for name, errors in found[0][1].items():
        assert found[1][1][name] == pytest.approx(errors, rel=1e-3)
    assert_close_values(found[1][0], found[0][0])


def test_networks_on_two_devices_are_refused() -> None:
    model, original = chain().to(CUDA), chain()
    before = values_of(model)
    with pytest.raises(ConfigError, match="the pruned network is on cuda:0 and the original on cpu"):
        singe_plugin.repair(model, original, [x for x, _ in images(1)])
    assert_same_values(model, before)
