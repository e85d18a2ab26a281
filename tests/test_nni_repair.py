"""NNI's masks with a repair: what is left is the least-squares solution, masks stay, and a failure leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

from nni.compression.distillation import DynamicLayerwiseDistiller
from nni.compression.pruning import AGPPruner, LinearPruner
from nni.compression.quantization import QATQuantizer
from test_repair_weights import LAYERS, columns_of

from singe_plugin import Repair
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.integrations.nni import SInGEPruner, shrink
from singe_plugin.loop.events import Callback
from singe_plugin.method import ridge

from nni_nets import CONVS, INT8, Loop, evaluator_of, make_net, pruner_of, wrapped_state
from small_nets import Chain, Residual, assert_same_values, fail_to_solve, images, mlp, seeded, values_of

DATA = images(count=4, size=8, examples=32)
X = torch.cat([x for x, _ in DATA])
MANY = Repair(10_000, ridge=1e-2, positions=10_000)
HIDDEN = [{"op_types": ["Linear"], "exclude_op_names": ["4"], "sparse_ratio": 0.5}]


def repaired(model: nn.Module, config: Any = CONVS, repair: Any = 128, **options: Any) -> tuple[SInGEPruner, Any]:
    """Masks by norms, on batches, without training."""
    pruner = SInGEPruner(model, config, **{"batches": DATA, "scoring": "l2", "repair": repair, **options})
    return pruner, pruner.compress()[1]


def outputs(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def error(model: nn.Module, original: nn.Module, x: Tensor = X) -> float:
    return float((outputs(model, x) - outputs(original, x)).norm() / outputs(original, x).norm())


def last(pruner: SInGEPruner) -> dict[str, Any]:
    return pruner.history.select("repaired")[-1]


# -- against numpy ----------------------------------------------------------------------------------------------------


def least_squares(design: np.ndarray, target: np.ndarray, w0: np.ndarray, mine: np.ndarray, bias: bool) -> Any:
    """One row: its kept weights towards w0, and its bias."""
    mx, my = (design.mean(0), target.mean()) if bias else (0 * design[0], 0.0)
    xc = design - mx
    gram = xc[:, mine].T @ xc[:, mine] + MANY.ridge * (xc**2).sum(0).mean() * np.eye(mine.sum())
    found = w0[mine] + np.linalg.solve(gram, xc[:, mine].T @ (target - my - xc @ w0))
    return found, my - mx[mine] @ found


@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_is_the_ridge_regression_on_what_its_mask_leaves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "_ENOUGH", 1e-14)
    model = seeded(lambda: nn.Sequential(LAYERS[kind]())).double()
    original, layer = copy.deepcopy(model), model[0]
    x = torch.randn(80, 6, *(() if "linear" in kind else (5, 5))).double()
    x += x.sum(1, keepdim=True) + 0.3  # of what is masked, the others know something
    config = [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}]
    pruner, masks = repaired(
        model, config, MANY, batches=[(x, torch.zeros(80))], default_granularity=None, coupled=False
    )
    wrapper, mask, y = pruner._module_wrappers["0"], masks["0"]["weight"].bool(), outputs(original, x)
    assert [row["ridge"] for row in last(pruner)["layers"].values()] == [MANY.ridge]
    targets = y.movedim(1, -1).flatten(0, -2).numpy().T
    for row, (design, target) in enumerate(zip(columns_of(original[0], x), targets, strict=True)):
        mine = mask[row].flatten().numpy()
        w0 = torch.where(mask[row], original[0].weight[row], 0.0).flatten().detach().numpy()
        expected, bias = least_squares(design, target, w0, mine, layer.bias is not None)
        np.testing.assert_allclose(wrapper.weight[row].detach().flatten().numpy()[mine], expected, atol=1e-8)
        if layer.bias is not None:
            assert layer.bias[row].item() == pytest.approx(bias, abs=1e-8)
    behind = ~mask
    assert 0.4 < float(behind.double().mean()) < 0.6
    assert torch.equal(wrapper.weight[behind], original[0].weight[behind])
    outputs(model, x)
    assert not layer.weight[behind].any()


def test_masked_channels_leave_zeros_and_their_reader_is_solved_on_the_others() -> None:
    model = seeded(mlp).double()
    original, x = copy.deepcopy(model), torch.randn(64, 4).double()
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    pruner, masks = repaired(model, config, MANY, batches=[(x, torch.zeros(64))])
    assert list(last(pruner)["layers"]) == ["2.weight", "4.weight"]  # the first one gets what it got before
    kept = masks["0"]["bias"].bool()
    design, target = outputs(original[:2], x) * kept, outputs(original[:3], x)
    every = np.ones(16, bool)
    for row in range(16):
        w0 = original[2].weight[row].detach().numpy()
        expected, bias = least_squares(design.numpy(), target[:, row].numpy(), w0, every, True)
        np.testing.assert_allclose(model[2].weight[row].detach().numpy(), expected, atol=1e-8)
        assert model[2].bias[row].item() == pytest.approx(bias, abs=1e-8)


# -- what can be restored is ------------------------------------------------------------------------------------------


def doubled() -> nn.Module:
    """Half of the channels of two layers say, behind their norms, half of what the others say."""
    net = Chain().eval()
    with torch.no_grad():
        for conv, norm in ((net.conv1, net.bn1), (net.conv2, net.bn2)):
            half = len(conv.weight) // 2
            nn.init.uniform_(norm.weight, 1.4, 1.6)
            nn.init.normal_(norm.bias, std=0.3)
            for tensor in (conv.weight, conv.bias, norm.weight, norm.bias):
                if tensor is not None:
                    tensor[half:] = tensor[:half]
            for tensor in (norm.weight, norm.bias):
                tensor[half:] *= 0.5
    return net


def test_channels_that_others_say_too_are_not_missed() -> None:
    net, found = seeded(doubled), {}
    for repair in (None, Repair(10_000, ridge=1e-8, positions=64)):
        model = copy.deepcopy(net)
        pruner, masks = repaired(model, [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}], repair)
        found[repair is not None] = error(model, net)
        for name in ("conv1", "conv2"):
            kept = masks[name]["weight"].flatten(1)[:, 0]
            assert bool(kept[: len(kept) // 2].all())
            assert not kept[len(kept) // 2 :].any()
    assert list(last(pruner)["layers"]) == ["conv2.weight", "conv3.weight", "fc.weight"]
    assert found[False] > 0.01
    assert found[True] < 1e-5


def test_single_weights_whose_inputs_others_have_too_are_not_missed() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)))
    x = torch.randn(64, 8)
    x = torch.cat([x, x], 1)
    with torch.no_grad():
        nn.init.uniform_(net[0].weight, 0.5, 1.0)
        net[0].weight[:, 8:] *= 0.5
    found = {}
    for repair in (None, Repair(64, ridge=1e-8)):
        model = copy.deepcopy(net)
        config = [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}]
        repaired(model, config, repair, batches=[(x, torch.zeros(64))], default_granularity=None, coupled=False)
        found[repair is not None] = error(model, net, x)
    assert found[False] > 0.1
    assert found[True] < 1e-5


@pytest.mark.parametrize("make", [lambda: make_net("chain"), lambda: seeded(Residual), lambda: make_net("resnet18")])
def test_the_smaller_network_computes_what_the_repaired_one_does(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    original = copy.deepcopy(model)
    data = DATA if not hasattr(model, "layer1") else images(count=2, size=32, examples=16)
    x, plain = data[0][0], copy.deepcopy(model)
    repaired(plain, repair=None, batches=data)
    pruner, masks = repaired(model, batches=data)
    assert error(model, original, x) < 0.7 * error(plain, original, x)
    expected = outputs(model, x)
    for name, wrapper in pruner._module_wrappers.items():
        layer = model.get_submodule(name)
        for target, mask in masks[name].items():
            if mask is not None:
                gone = mask == 0
                assert not getattr(layer, target)[gone].any()
                assert torch.equal(getattr(wrapper, target)[gone], getattr(original.get_submodule(name), target)[gone])
    pruner.unwrap_model()
    smaller = shrink(model, masks, x[:2])
    assert float((outputs(smaller, x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert sum(p.numel() for p in smaller.parameters()) < 0.6 * sum(p.numel() for p in original.parameters())


def test_batch_norms_are_brought_along() -> None:
    model = make_net("chain").eval()
    config = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.4}]
    _, masks = repaired(model, config)
    seen: dict[str, Tensor] = {}
    model.bn2.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    outputs(model)
    torch.testing.assert_close(model.bn2.running_mean, seen["x"].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.bn2.running_var, seen["x"].var((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not model.bn2(seen["x"])[:, ~masks["bn2"]["weight"].bool()].any()


# -- masks of other things than weights -------------------------------------------------------------------------------


def with_masks(model: nn.Module, config: Any, zeros: dict[str, dict[str, Tensor]], **options: Any) -> SInGEPruner:
    """A pruner whose only masks are these."""
    pruner = SInGEPruner(model, config, **{"batches": DATA, "scoring": "l2", "repair": 128, **options})
    pruner.generate_masks = lambda: zeros
    pruner.compress()
    return pruner


@pytest.mark.parametrize("target", ["_input_", "_output_"])
def test_inputs_and_outputs_that_nni_masks_are_not_read(target: str) -> None:
    model = seeded(mlp).double()
    original, x = copy.deepcopy(model), torch.randn(64, 4).double()
    along = {"align": {"module_name": "0", "target_name": "weight", "dims": [0]}, "apply_method": "mul"}
    masked, key = ("2", "_input_0") if target == "_input_" else ("0", "_output_0")
    config = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["weight"]},
        {
            "op_names": [masked],
            "target_names": [target],
            "target_settings": {target: {**along, "granularity": "per_channel"}},
        },
    ]
    kept = torch.arange(16) % 2 == 0
    data = [(x, torch.zeros(64))]
    pruner = with_masks(
        model, config, {masked: {key: kept[None].double()}}, repair=MANY, batches=data, mask_norms=False
    )
    assert list(last(pruner)["layers"]) == ["2.weight", "4.weight"]
    assert last(pruner)["unsolved"] == {}
    design, goal = (outputs(original[:2], x) * kept).numpy(), outputs(original[:3], x)
    for row in range(16):
        w0 = original[2].weight[row].detach().numpy()
        expected, _ = least_squares(design, goal[:, row].numpy(), w0, np.ones(16, bool), True)
        np.testing.assert_allclose(model[2].weight[row].detach().numpy(), expected, atol=1e-8)
    assert error(model, original, x) < 1
    assert not any(key in module._parameters for module in model.modules())


def test_readers_behind_masked_norms_are_solved() -> None:
    model = make_net("chain").eval()
    plain, original = copy.deepcopy(model), copy.deepcopy(model)
    config = [{"op_names": ["bn2"], "sparse_ratio": 0.4}]
    options = {"coupled": False, "mask_norms": False}
    repaired(plain, config, None, **options)
    pruner, masks = repaired(model, config, **options)
    assert set(last(pruner)["layers"]) == {"conv3.weight", "fc.weight"}
    assert error(model, original) < 0.6 * error(plain, original)
    assert int((masks["bn2"]["weight"] == 0).sum()) == 4


def test_a_bias_that_is_masked_alone_leaves_its_layer_as_it_is_and_the_next_one_makes_up_for_it() -> None:
    model = seeded(mlp)
    original, kept = copy.deepcopy(model), (torch.arange(16) > 5).float()
    data = [(torch.randn(64, 4), torch.zeros(64))]
    pruner = with_masks(model, HIDDEN, {n: {"bias": kept} for n in ("0", "2")}, batches=data)
    assert last(pruner)["unsolved"] == {"2.weight": "its bias is masked at outputs whose weights are not"}
    assert torch.equal(pruner._module_wrappers["2"].weight, original[2].weight)
    assert list(last(pruner)["layers"]) == ["4.weight"]
    plain = copy.deepcopy(original)
    with_masks(plain, HIDDEN, {n: {"bias": kept} for n in ("0", "2")}, batches=data, repair=None)
    assert error(model, original, data[0][0]) < 0.5 * error(plain, original, data[0][0])


def test_a_norm_whose_shift_alone_is_masked_keeps_its_statistics() -> None:
    model = make_net("chain").eval()
    before, shift = values_of(model), (torch.arange(10) > 4).float()
    with_masks(model, [{"op_names": ["bn2"], "sparse_ratio": 0.5}], {"bn2": {"bias": shift}}, coupled=False)
    after = values_of(model)
    assert torch.equal(after["bn2.running_mean"], before["bn2.running_mean"])
    assert torch.equal(after["bn2._nni_wrapper.weight"], before["bn2.weight"])
    assert not torch.equal(after["bn3.running_mean"], before["bn3.running_mean"])


# -- all or nothing ---------------------------------------------------------------------------------------------------


class Fail(Callback):
    def on_repaired(self, event: Any) -> None:
        raise KeyboardInterrupt


def test_a_repair_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = make_net("chain"), make_net("chain")
    pruner = SInGEPruner(model, CONVS, batches=DATA, scoring="l2", repair=64)
    before, parts = values_of(model), wrapped_state(model)
    grads = [(p, p.requires_grad) for p in model.parameters()]
    rng = torch.get_rng_state()
    with monkeypatch.context() as patch:
        fail_to_solve(patch, "fc.weight")
        with pytest.raises(RuntimeError, match="mine"):
            pruner.compress()
    assert_same_values(model, before)
    assert wrapped_state(model) == parts
    assert [(p, p.requires_grad) for p in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(bool((m == 1).all()) for ms in pruner.get_masks().values() for m in ms.values() if m is not None)
    assert model.training
    pruner.compress()
    again, _ = repaired(twin, repair=64)
    assert_same_values(model, twin)
    assert {n: r["after"] for n, r in last(pruner)["layers"].items()} == {
        n: r["after"] for n, r in last(again)["layers"].items()
    }


@pytest.mark.parametrize("pace", [None, "layers"])
def test_a_failure_in_the_training_loop_takes_its_masks_back_and_the_evaluator_is_free(pace: Any) -> None:
    model, fail = make_net("chain"), Fail()
    pruner = pruner_of(model, training_steps=3, repair=12, pace=pace, callbacks=[fail])
    with pytest.raises(KeyboardInterrupt):
        pruner.compress()
    assert pruner.evaluator.model is None
    masks = {name: masks["weight"] for name, masks in pruner.get_masks().items()}
    whole = {name for name, mask in masks.items() if bool((mask == 1).all())}
    assert whole == ({"conv3", "bn3"} if pace else set(masks))  # trained in between, the layers before are done
    fail.on_repaired = lambda _: None
    pruner.compress()
    assert all(bool((masks["weight"] == 0).any()) for masks in pruner.get_masks().values())
    assert last(pruner)["layers"]


# -- NNI's ways of running --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [AGPPruner, LinearPruner])
@pytest.mark.parametrize("every", ["end", "round"])
def test_under_a_schedule_it_happens_once_or_after_every_interval(schedule: Any, every: str) -> None:
    model, loop = make_net("chain"), Loop(DATA)
    pruner = pruner_of(model, loop=loop, repair=Repair(96, every=every))
    wrappers = {name: (w, w.weight) for name, w in pruner._module_wrappers.items()}
    model_was, (_, masks) = pruner.bound_model, schedule(pruner, 2, 3).compress(9, None)
    times = [row["event"] for row in pruner.history.rows].count("repaired")
    assert times == {"end": 1, "round": 3}[every]
    assert loop.steps == 9
    assert pruner.bound_model is model_was is model
    assert all(pruner._module_wrappers[n] is w and w.weight is p for n, (w, p) in wrappers.items())
    kinds = [row["event"] for row in pruner.history.rows]
    assert kinds[-1] == "repaired"  # behind the last masks
    solved = last(pruner)["layers"]
    assert list(solved) == ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
    assert all(row["after"] <= row["before"] for row in solved.values())
    outputs(model)
    for name, targets in masks.items():
        gone = targets["weight"] == 0
        assert float(gone.double().mean()) == pytest.approx(0.4, abs=0.1)
        assert not model.get_submodule(name).weight[gone].any()


def test_a_loop_that_ends_early_is_repaired_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    pruner = pruner_of(make_net("chain"), loop=Loop(DATA, stop=4), repair=500)
    AGPPruner(pruner, 2, 3).compress(6, None)
    assert [row["event"] for row in pruner.history.rows].count("repaired") == 1
    assert "the repair has 128 images and not 500" in caplog.text


def test_algorithm_1_repairs_after_the_last_layer_or_after_each() -> None:
    for every, times in (("end", 1), ("round", 3)):
        pruner = pruner_of(make_net("chain"), training_steps=7, pace="layers", repair=Repair(18, every=every))
        pruner.compress()
        assert len(pruner.history.select("repaired")) == times


def test_a_distiller_runs_along() -> None:
    model, config = make_net("chain"), [{"op_names": ["fc", "conv3"], "lambda": 0.5, "apply_method": "mse"}]
    predict = lambda batch, teacher: teacher(batch[0])  # noqa: E731
    distiller = DynamicLayerwiseDistiller(model, config, evaluator_of(model), make_net("chain", seed=1), predict)
    pruner = SInGEPruner.from_compressor(distiller, CONVS, 2, scoring="l2", repair=12)
    pruner.compress(3, None)
    assert last(pruner)["layers"]


def test_the_images_are_those_of_the_loop_as_its_step_gives_them_to_the_model() -> None:
    """Nothing is learned (rate 0), so that both ways see the same network and the same images."""
    net = seeded(mlp)
    data = [(torch.randn(32, 4), torch.randn(32), torch.randint(0, 3, (32,))) for _ in range(3)]

    def step(batch: Any, model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(input=2 * batch[0]), batch[2])

    models = copy.deepcopy(net), copy.deepcopy(net)
    evaluator = evaluator_of(models[0], Loop(data), lr=0.0, step=step, example=data[0][0])
    pruner = SInGEPruner(models[0], HIDDEN, evaluator, 3, "grad", repair=64)
    pruner.compress()
    masks = pruner.get_masks()
    other = SInGEPruner(models[1], HIDDEN, batches=[(2 * x, y) for x, _, y in data[1:]], scoring="l2", repair=64)
    other.generate_masks = lambda: {n: {t: m for t, m in ts.items() if m is not None} for n, ts in masks.items()}
    other.compress()
    x = data[0][0]
    assert torch.equal(outputs(models[0], x), outputs(models[1], x))
    assert error(models[0], net, x) > 0


def test_the_unpruned_network_is_that_before_the_first_mask() -> None:
    """What was learned before is kept: the reader is solved for what the trained network gave."""
    model, trained = seeded(mlp), seeded(mlp)
    data = [(torch.randn(256, 4, generator=torch.Generator().manual_seed(0)), torch.arange(256) % 3)]

    class Look(Callback):
        def on_layer_scored(self, event: Any) -> None:
            with torch.no_grad():
                for name, wrapper in pruner._module_wrappers.items():
                    trained[int(name)].load_state_dict({"weight": wrapper.weight, "bias": wrapper.bias})
                trained[4].load_state_dict(model[4].state_dict())

    evaluator = evaluator_of(model, Loop(data), lr=0.5, example=data[0][0])
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}, {"op_names": ["2"], "sparse_ratio": 0.01}]
    options = {"scoring": "l2", "repair": Repair(256, ridge=1e-2, positions=256), "callbacks": [Look()]}
    pruner = SInGEPruner(model, config, evaluator, 5, **options)
    with pytest.raises(ConfigError, match="so that no batch of its loop is seen; give batches"):
        pruner.compress()  # by norms alone nothing is trained
    AGPPruner(pruner, 5, 1).compress(5, None)
    assert not torch.equal(trained[0].weight, seeded(mlp)[0].weight)
    x, kept = data[0][0], pruner.get_masks()["0"]["bias"].bool()
    design, target = outputs(trained[:2], x) * kept, outputs(trained[:3], x)
    for row in range(16):
        w0 = trained[2].weight[row].detach().numpy().astype(float)
        expected, _ = least_squares(
            design.double().numpy(), target[:, row].double().numpy(), w0, np.ones(16, bool), True
        )
        found = pruner._module_wrappers["2"].weight[row].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_twice_the_same() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make_net("chain")
        pruner = pruner_of(model, loop=Loop(DATA), repair=64)
        pruner.compress()
        found.append((values_of(model), pruner.history.without_times()))
    assert_same_values(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_masks_that_somebody_sets_first_are_made_up_for_too() -> None:
    net, found, chosen = seeded(mlp), {}, (torch.arange(16) > 7).float()
    data = [(torch.randn(64, 4), torch.zeros(64))]
    for repair in (None, Repair(64, ridge=1e-3)):
        model = copy.deepcopy(net)
        config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
        pruner = SInGEPruner(model, config, batches=data, scoring="l2", repair=repair)
        pruner.update_masks({"0": {"weight": chosen[:, None].expand(16, 4), "bias": chosen}})
        _, masks = pruner.compress()
        assert torch.equal(masks["0"]["bias"], chosen)
        found[repair is not None] = error(model, net, data[0][0])
    assert list(last(pruner)["layers"]) == ["2.weight", "4.weight"]
    assert found[True] < 0.5 * found[False]


# -- what cannot work is refused --------------------------------------------------------------------------------------


def test_quantizers_are_refused_whoever_comes_first() -> None:
    model = make_net("chain")
    quantizer = QATQuantizer(model, INT8, evaluator_of(model))
    with pytest.raises(ConfigError, match=r"repair: 'conv1' is quantised .* make the quantizer; or give repair=None"):
        SInGEPruner.from_compressor(quantizer, CONVS, 2, scoring="l2", repair=8)
    model = make_net("chain")
    outer = QATQuantizer.from_compressor(pruner_of(model, repair=8), INT8)
    with pytest.raises(ConfigError, match="prune and repair first"):
        outer.compress(3, None)


def step_without_call(batch: Any, model: Any) -> Tensor:
    x = torch.relu(model.bn1(model.conv1(batch[0])))
    x = torch.relu(model.bn3(model.conv3(torch.relu(model.bn2(model.conv2(x))))))
    return nn.functional.cross_entropy(model.fc(x.mean((2, 3))), batch[1])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"repair": "yes"}, ConfigError, "repair must be a Repair, or its images"),
        ({"batches": None}, DataError, "repair needs images: give the pruner batches"),
        ({"config": [{**CONVS[0], "apply_method": "bypass"}]}, ConfigError, "apply_method 'bypass'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(options: Any, kind: Any, message: str) -> None:
    model = make_net("chain")
    parts = wrapped_state(model)
    with pytest.raises(kind, match=message):
        repaired(model, **{"config": CONVS, "example_inputs": DATA[0][0][:2], **options})
    assert wrapped_state(model) == parts


def test_a_step_that_does_not_call_the_model_is_refused() -> None:
    model = make_net("chain")
    pruner = SInGEPruner(model, CONVS, evaluator_of(model, step=step_without_call), 2, "grad", repair=8)
    with pytest.raises(DataError, match="without calling Chain itself"):
        pruner.compress()
    assert pruner.evaluator.model is None
