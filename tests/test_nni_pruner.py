"""The NNI pruner in every way that NNI runs one: exact sparsity, equal masks, no trace, clear errors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

import nni
from nni.compression.distillation import Adaptive1dLayerwiseDistiller, DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, LinearPruner, TaylorPruner
from nni.compression.quantization import LsqQuantizer, QATQuantizer
from nni.compression.utils import TorchEvaluator

from singe_plugin.integrations.nni import SInGEPruner

from asked import asked
from nni_nets import (
    BATCHES,
    CONVS,
    INT8,
    Loop,
    batches_of,
    channel_masks,
    check_masks,
    evaluator_of,
    example_of,
    make_net,
    metrics_of,
    nni_asked,
    pruner_of,
    training_step,
)
from small_nets import Grouped, Residual, assert_same_values, images, values_of

pytestmark = pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated")
DISTILLED = [{"op_names": ["fc"], "lambda": 0.5, "apply_method": "kl"}, {"op_names": ["conv3"], "lambda": 0.1}]
Ran = tuple[SInGEPruner, Any, dict[str, dict[str, Tensor]]]  # the pruner, the outermost compressor, the masks


def distiller_of(model: nn.Module, other: SInGEPruner | None = None) -> DynamicLayerwiseDistiller:
    teacher = make_net("chain", seed=1)
    predict = lambda batch, teacher: teacher(batch[0])  # noqa: E731
    if other is None:
        return DynamicLayerwiseDistiller(model, DISTILLED, evaluator_of(model), teacher, predict)
    return DynamicLayerwiseDistiller.from_compressor(other, DISTILLED, teacher, predict)


# --- the ways ----------------------------------------------------------------------------------------------------


def alone(model: nn.Module) -> Ran:
    pruner = pruner_of(model)
    return pruner, pruner, pruner.compress()[1]


def with_nnis_evaluator(model: nn.Module) -> Ran:
    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=0.001)
    evaluator = TorchEvaluator(
        Loop(), optimizer, lambda batch, m: (training_step(batch, m), 0), dummy_input=example_of()
    )
    pruner = SInGEPruner(model, CONVS, evaluator, 2, **asked(nodes=2))
    return pruner, pruner, pruner.compress()[1]


def under_agp(model: nn.Module) -> Ran:
    outer = AGPPruner(pruner := pruner_of(model), 2, 3)
    return pruner, outer, outer.compress(6, None)[1]


def under_linear(model: nn.Module) -> Ran:
    outer = LinearPruner(pruner := pruner_of(model), 2, 3)
    return pruner, outer, outer.compress(None, 3)[1]


def from_distiller(model: nn.Module) -> Ran:
    pruner = SInGEPruner.from_compressor(distiller_of(model), CONVS, 2, **asked(nodes=2))
    return pruner, pruner, pruner.compress(3, None)[1]


def distiller_from_ours(model: nn.Module) -> Ran:
    outer = distiller_of(model, pruner := pruner_of(model))
    outer.compress(3, None)
    return pruner, outer, pruner.get_masks()


def from_quantizer(model: nn.Module) -> Ran:
    pruner = SInGEPruner.from_compressor(QATQuantizer(model, INT8, evaluator_of(model)), CONVS, 2, **asked(nodes=2))
    return pruner, pruner, pruner.compress(3, None)[1]


def quantizer_from_ours(model: nn.Module) -> Ran:
    outer = QATQuantizer.from_compressor(pruner := pruner_of(model), INT8)
    _, calibration = outer.compress(3, None)
    assert all(found["scale"] is not None for targets in calibration.values() for found in targets.values())
    return pruner, outer, pruner.get_masks()


def three_in_one(model: nn.Module) -> Ran:
    pruner = SInGEPruner.from_compressor(distiller_of(model), CONVS, 2, **asked(nodes=2))
    outer = LsqQuantizer.from_compressor(pruner, INT8)
    outer.compress(3, None)
    return pruner, outer, pruner.get_masks()


def fused_under_agp(model: nn.Module) -> Ran:
    outer = AGPPruner(pruner := SInGEPruner.from_compressor(distiller_of(model), CONVS, 2, **asked(nodes=2)), 2, 2)
    return pruner, outer, outer.compress(4, None)[1]


WAYS: list[Callable[[nn.Module], Ran]] = [
    alone, with_nnis_evaluator, under_agp, under_linear, from_distiller, distiller_from_ours, from_quantizer,
    quantizer_from_ours, three_in_one, fused_under_agp,
]  # fmt: skip


@pytest.mark.parametrize("run", WAYS)
def test_sparsity_is_exact_and_the_model_runs_wrapped_and_unwrapped(run: Callable[[nn.Module], Ran]) -> None:
    model = make_net("chain")
    pruner, outer, masks = run(model)
    check_masks(model, pruner, masks)
    seen: dict[str, Tensor] = {}
    for name in ("bn1", "bn2", "bn3"):
        getattr(model, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    for mode in (False, True):
        assert torch.isfinite(model.train(mode)(BATCHES[0][0])).all()
        for name, out in seen.items():  # what is masked is silent, whatever the running statistics are
            silent = out.abs().amax((0, 2, 3)) == 0
            assert torch.equal(~silent, channel_masks(masks)[name]), name
    outer.unwrap_model()
    assert not any("_nni_wrapper" in module._modules for module in model.modules())
    assert set(dict(model.named_parameters())) == set(dict(make_net("chain").named_parameters()))
    assert torch.isfinite(model(BATCHES[0][0])).all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_what_is_added_or_depthwise_has_one_mask_without_a_dependency_group(name: str) -> None:
    model = make_net(name)
    evaluator = evaluator_of(model, Loop(batches_of(name)), example=example_of(name))
    # after one step of an untrained mobilenetv2 all units of its stem are saturated: gradients there are refused
    options: dict[str, Any] = {"training_steps": 1, "nodes": 1, "criterion": "l2" if name != "resnet18" else "ig"}
    pruner = SInGEPruner(model, CONVS, evaluator, **asked(**options))
    masks = pruner.compress()[1] if name != "resnet18" else AGPPruner(pruner, 1, 2).compress(2, None)[1]
    check_masks(model, pruner, masks)
    kept = channel_masks(masks)
    alike = {
        "resnet18": [("layer1.0.conv2", "layer1.0.downsample.0", "layer1.1.conv2"), ("layer2.0.conv2", "layer2.0.bn2")],
        "mobilenetv2": [("blocks.1.0.conv_pw", "blocks.1.0.conv_dw"), ("blocks.1.0.conv_pwl", "blocks.1.1.conv_pwl")],
    }
    for first, *others in alike[name]:
        assert 0 < int(kept[first].sum()) < len(kept[first])
        assert all(torch.equal(kept[first], kept[other]) for other in others)
    assert not pruner.partial
    assert torch.isfinite(model(batches_of(name)[0][0])).all()


def test_a_depthwise_and_a_grouped_convolution_are_masked_by_unit() -> None:
    model = Grouped()
    masks = SInGEPruner(copy.deepcopy(model), CONVS, **asked(batches=images(), nodes=1)).compress()[1]
    kept = channel_masks(masks)
    assert torch.equal(kept["conv2"], kept["dw"])
    assert torch.equal(kept["bn"], kept["dw"])
    assert bool((kept["conv2"].view(4, 8) == kept["conv2"].view(4, 8)[:1]).all())  # one channel of each group
    assert int(kept["conv2"].sum()) == 20


def test_uncoupled_layers_have_masks_of_their_own() -> None:
    model = Residual()
    pruner = SInGEPruner(model, CONVS, **asked(batches=images(), criterion="norm_grad", coupled=False))
    kept = channel_masks(pruner.compress()[1])
    assert len({tuple(kept[name].tolist()) for name in ("stem", "blocks.0.3", "blocks.1.3")}) > 1


def test_groups_that_are_only_partly_in_the_config_list_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Residual()
    config = [{"op_names": ["stem", "blocks.0.3", "blocks.0.0"], "sparse_ratio": 0.5}]
    pruner = SInGEPruner(model, config, **asked(batches=images(), nodes=1))
    assert pruner.partial == {"stem": ["blocks.1.3"]}
    assert "stem" in caplog.text
    assert "blocks.1.3" in caplog.text
    kept = channel_masks(pruner.compress()[1])
    assert torch.equal(kept["stem"], kept["blocks.0.3"])
    assert "blocks.1.3" not in kept


def test_at_least_so_many_channels_stay() -> None:
    model = make_net("chain")
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.9}]
    kept = channel_masks(SInGEPruner(model, config, **nni_asked(batches=BATCHES, nodes=1, min_width=3)).compress()[1])
    assert {name: int(mask.sum()) for name, mask in kept.items() if "conv" in name} == dict.fromkeys(
        ("conv1", "conv2", "conv3"), 3
    )


# --- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AGPPruner, LinearPruner])
def test_what_is_masked_once_stays_masked_and_the_goal_is_reached(kind: Any) -> None:
    model = make_net("resnet18")
    pruner = SInGEPruner(
        model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.7}],
        evaluator_of(model, Loop(batches_of("resnet18")), example=example_of("resnet18")), 2, "norm_grad",
    )  # fmt: skip
    seen: list[dict[str, Tensor]] = []
    update = pruner.update_masks
    pruner.update_masks = lambda masks: (update(masks), seen.append(channel_masks(pruner.get_masks())))  # type: ignore[method-assign]
    kind(pruner, 1, 4).compress(4, None)
    assert len(seen) == 4
    for before, after in itertools.pairwise(seen):
        for name in before:
            assert bool((before[name] | ~after[name]).all()), name
        assert sum(int(m.sum()) for m in after.values()) < sum(int(m.sum()) for m in before.values())
    assert all(int((~mask).sum()) == int(len(mask) * 0.7) for mask in seen[-1].values())


def test_a_schedule_with_fewer_training_steps_than_its_interval_reaches_the_goal_and_taylor_does_not() -> None:
    ratios = {}
    for kind in (SInGEPruner, TaylorPruner):
        model = make_net("chain")
        inner = kind(model, CONVS, evaluator_of(model), training_steps=2)
        _, masks = AGPPruner(inner, interval_steps=3, total_times=2).compress(6, None)
        ratios[kind] = int((~channel_masks(masks)["conv2"]).sum())
    assert ratios == {SInGEPruner: 4, TaylorPruner: 3}


def test_a_loop_that_ends_before_a_schedule_does_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net("chain")
    _, masks = AGPPruner(pruner_of(model, loop=Loop(stop=4)), 2, 3).compress(6, None)
    assert "masks had been made 2 of 3 times" in caplog.text
    assert int((~channel_masks(masks)["conv2"]).sum()) == int(10 * 0.4 * (1 - (1 / 3) ** 3))


# --- the other compressors, and the training itself --------------------------------------------------------------


def test_wrappers_of_other_compressors_are_kept_with_their_state() -> None:
    model = make_net("chain")
    quantizer = QATQuantizer(model, INT8, evaluator_of(model))
    quantizer.compress(2, None)
    scale = quantizer._module_wrappers["conv1"].weight_scale.clone()
    pruner = SInGEPruner.from_compressor(quantizer, CONVS, 2, **asked(nodes=1))
    assert pruner.fused_compressors == [pruner, quantizer]
    for name, wrapper in quantizer._module_wrappers.items():
        assert pruner._module_wrappers[name] is wrapper
        assert model.get_submodule(name)._nni_wrapper is wrapper
    assert torch.equal(pruner._module_wrappers["conv1"].weight_scale, scale)
    distiller = distiller_of(model, pruner)
    assert distiller.fused_compressors == [distiller, pruner, quantizer]
    distiller.compress(3, None)
    check_masks(model, pruner, pruner.get_masks())
    assert quantizer._module_wrappers["conv1"].weight_scale is not None


@pytest.mark.parametrize("criterion", ["ig", "l2"])
def test_scoring_leaves_training_distillation_and_quantization_alone(criterion: str) -> None:
    """A pruner whose ratio masks nothing changes no weight, buffer, scale or hidden state of the run around it."""
    found = []
    for with_pruner in (False, True):
        model = make_net("chain")
        compressor: Any = distiller_of(model)
        if with_pruner:
            config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.01}]
            compressor = SInGEPruner.from_compressor(compressor, config, 2, scoring=criterion, mask_norms=False)
        quantizer = QATQuantizer.from_compressor(compressor, INT8)
        quantizer.compress(5, None)
        spaces = compressor.fused_compressors[-1]._target_spaces
        hidden = [space.hidden_state for targets in spaces.values() for space in targets.values()]
        assert hidden == [None, None]
        quantizer.unwrap_model()
        found.append((values_of(model), quantizer.get_calibration_config()))
    assert_same_values(found[1][0], found[0][0])
    for name, targets in found[0][1].items():
        for target, values in targets.items():
            for key in ("scale", "zero_point", "tracked_max", "tracked_min"):
                assert torch.equal(found[1][1][name][target][key], values[key]), (name, target, key)


FUSED = [{**INT8[0], "op_names": ["conv1", "conv2"], "fuse_names": [("conv1", "bn1"), ("conv2", "bn2")]}]


def test_norms_that_a_quantizer_fuses_are_left_to_it() -> None:
    model = make_net("chain")
    pruner = SInGEPruner.from_compressor(QATQuantizer(model, FUSED, evaluator_of(model)), CONVS, 2, **asked(nodes=1))
    kept = channel_masks(pruner.compress(3, None)[1])
    assert {n: int((~mask).sum()) for n, mask in kept.items()} == {"conv1": 3, "conv2": 4, "conv3": 2, "bn3": 2}


@pytest.mark.parametrize("config", [INT8, [{**FUSED[0], "op_names": ["conv2"], "fuse_names": [("conv2", "bn2")]}]])
def test_f_is_that_of_the_plain_model_whoever_wraps_it_later(config: Any) -> None:
    model = make_net("chain")
    only = [{"op_names": ["conv1"], "sparse_ratio": 0.4}]
    pruner = SInGEPruner(model, only, evaluator_of(model), **asked(batches=BATCHES, nodes=2))
    quantizer = QATQuantizer.from_compressor(pruner, config)
    for x, _ in BATCHES:
        model.train()(x)
    found = metrics_of(pruner)["conv1"]["weight"]
    quantized = model.eval()(BATCHES[0][0])
    quantizer.unwrap_model()
    assert not torch.allclose(model(BATCHES[0][0]), quantized, rtol=1e-3)
    other = SInGEPruner(model, only, **asked(batches=BATCHES, nodes=2))
    torch.testing.assert_close(found, metrics_of(other)["conv1"]["weight"])


def test_an_adaptive_distiller_is_fused_too() -> None:
    model, teacher = make_net("chain"), make_net("chain", seed=1)
    teacher.fc = nn.Linear(6, 5)
    distiller = Adaptive1dLayerwiseDistiller(
        model, [{"op_names": ["fc"], "lambda": 0.1}], evaluator_of(model), teacher, lambda b, m: m(b[0])
    )
    distiller.track_forward(BATCHES[0][0])
    pruner = SInGEPruner.from_compressor(distiller, CONVS, 2, **asked(nodes=1))
    check_masks(model, pruner, pruner.compress(3, None)[1])


class Pair(NamedTuple):
    """A batch of a type of its own."""

    x: Tensor
    y: Tensor


@pytest.mark.parametrize("steps", [1, 3])
def test_f_is_evaluated_on_the_latest_batches_with_the_users_own_step(steps: int) -> None:
    seen: list[Pair] = []

    def step(batch: Pair, model: nn.Module) -> dict[str, Any]:
        if not model.training:
            seen.append(batch)
        return {"loss": model(batch.x).pow(2).mean(), "other": 1}

    model, pairs = make_net("chain"), [Pair(*batch) for batch in BATCHES]
    options: dict[str, Any] = {"training_steps": 3, "batches": steps, "nodes": 2}
    pruner = SInGEPruner(model, CONVS, evaluator_of(model, Loop(pairs), lr=0.0, step=step), **asked(**options))
    metrics: list[Any] = []
    calculate = pruner._calculate_metrics
    pruner._calculate_metrics = lambda data: metrics.append(calculate(data)) or metrics[-1]  # type: ignore[method-assign]
    pruner.compress()
    passes = 1 + 3 * 2  # of every batch: one that looks when what runs, then layers times nodes
    assert len(seen) == passes * steps
    assert all(got is pairs[-steps:][number // passes] for number, got in enumerate(seen))
    pruner.unwrap_model()
    plain = SInGEPruner(
        model, CONVS, **asked(batches=pairs[-steps:], nodes=2, objective=lambda out, _: out.pow(2).mean())
    )
    for name, targets in metrics_of(plain).items():
        torch.testing.assert_close(metrics[0][name]["weight"], targets["weight"], rtol=1e-5, atol=0)
