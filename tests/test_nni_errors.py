"""What the NNI pruner refuses, in one clear error, and that a model is never left half-changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

from nni.compression.pruning import L1NormPruner
from nni.compression.quantization import QATQuantizer

from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.integrations.nni import SInGEPruner

from asked import asked
from nni_nets import (
    BATCHES,
    CONVS,
    INT8,
    Loop,
    channel_masks,
    check_masks,
    evaluator_of,
    make_net,
    nni_asked,
    pruner_of,
    training_step,
    wrapped_state,
)
from small_nets import Residual, Trace, images, mlp, vectors

pytestmark = pytest.mark.filterwarnings(
    "ignore:'saved_variables' is deprecated", "ignore:.*weight_norm.* is deprecated"
)

# --- no trace ----------------------------------------------------------------------------------------------------


def explode(after: int) -> Callable[[Any, Any], Tensor]:
    calls = [0]

    def objective(outputs: Any, targets: Any) -> Tensor:
        calls[0] += 1
        if calls[0] > after:
            raise RuntimeError("no")
        return nn.functional.cross_entropy(outputs, targets)

    return objective


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_the_wrapped_model_as_it_was(fails: bool) -> None:
    model = make_net("chain")
    model.drop.p = 0.5
    model.fc.bias.requires_grad_(False)
    objective = explode(8 if fails else 1 << 30)
    pruner = pruner_of(model, batches=BATCHES, objective=objective, nodes=2)
    QATQuantizer.from_compressor(pruner, INT8)
    training_step(BATCHES[0], model.train()).backward()
    pruner.update_masks({"conv1": {"weight": (torch.arange(8) % 2).view(8, 1, 1, 1)}})
    expected = model.eval()(BATCHES[0][0])
    model.train()
    model.bn2.eval()
    trace, objects = Trace(model), wrapped_state(model)
    if fails:
        with pytest.raises(ScoringError, match="RuntimeError: no"):
            pruner.generate_masks()
    else:
        assert len(pruner.generate_masks()) == 6
    trace.assert_unchanged()
    assert wrapped_state(model) == objects
    assert torch.equal(model.eval()(BATCHES[0][0]), expected)


def test_a_training_that_fails_leaves_the_evaluator_to_be_used_again(caplog: pytest.LogCaptureFixture) -> None:
    model = make_net("chain")
    pruner = pruner_of(model, objective=explode(0))
    with pytest.raises(ScoringError, match="RuntimeError: no"):
        pruner.compress()
    assert pruner.evaluator.model is None
    check_masks_are_ones(pruner)
    pruner.unwrap_model()
    again = SInGEPruner(model, CONVS, pruner.evaluator, 2, **asked(nodes=1))
    caplog.clear()
    check_masks(model, again, again.compress()[1])
    assert "unbind" not in caplog.text


def check_masks_are_ones(pruner: SInGEPruner) -> None:
    masks = [mask for targets in pruner.get_masks().values() for mask in targets.values() if mask is not None]
    assert masks
    assert all(bool((mask == 1).all()) for mask in masks)


def test_an_aligned_input_is_masked_and_finding_its_shape_leaves_no_trace() -> None:
    model = make_net("chain").train()
    model.drop.p = 0.5
    trace = Trace(model)
    align = {"module_name": "conv1", "target_name": "weight", "dims": [0]}
    aligned = {"align": align, "granularity": "per_channel", "apply_method": "mul"}
    config = [
        {"op_names": ["conv1"], "sparse_ratio": 0.5},
        {"op_names": ["conv2"], "target_names": ["_input_"], "target_settings": {"_input_": aligned}},
    ]
    pruner = SInGEPruner(model, config, **asked(criterion="l2", example_inputs=BATCHES[0][0]))
    _, masks = pruner.compress()
    assert masks["conv2"]["_input_0"].shape == (1, 8, 1, 1)
    assert torch.equal(masks["conv2"]["_input_0"].flatten(), masks["conv1"]["weight"][:, 0, 0, 0])
    pruner.unwrap_model()
    trace.assert_unchanged(ignore=("parameters",))  # NNI makes new ones


# --- errors ------------------------------------------------------------------------------------------------------


def entry(**keys: Any) -> list[dict[str, Any]]:
    return [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, **keys}]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no evaluator": ({"evaluator": None}, "criterion 'ig' needs an evaluator.*batches="),
    "no evaluator, entwined": (
        {"evaluator": None, "pace": "layers", "criterion": "l2"}, "'l2' with a pace needs an evaluator",
    ),
    "wrong evaluator": ({"evaluator": print}, "must be one of NNI's .*got builtin_function"),
    "no example": ({"evaluator": None, "criterion": "l2"}, "give example_inputs=.* or coupled=False"),
    "unknown type": ({"config": entry(op_types=["Conv2dd"])}, "'Conv2dd', which is not there .did you mean 'Conv2d'"),
    "unknown name": ({"config": [{"op_names": ["conv2", "con3"], "sparse_ratio": 0.5}]}, "op_names has 'con3'.*conv3"),
    "all excluded": ({"config": entry(exclude_op_names_re=["conv."])}, "selects no layer of Chain.*excluded again"),
    "bad pattern": ({"config": [{"op_names_re": ["*conv"], "sparse_ratio": 0.5}]}, "'.conv' is no regular expression"),
    "container": ({"config": [{"op_types": ["Chain"], "sparse_ratio": 0.5}]}, "Chain has no parameters of its own"),
    "ratio of 1": ({"config": entry(sparse_ratio=1.0)}, "sparse_ratio=1 would leave.*min_width=0"),
    "ratio above": ({"config": entry(sparse_ratio=1.5)}, "sparse_ratio=1.5 is not a fraction inside .0, 1."),
    "ratio below": ({"config": entry(target_settings={"weight": {"sparse_ratio": -0.1}})}, "sparse_ratio=-0.1"),
    "limits": ({"config": entry(min_sparse_ratio=0.5, max_sparse_ratio=0.2)}, "min_sparse_ratio=0.5 is above"),
    "schema": ({"config": entry(sparsity_ratio=0.5)}, r"config_list\[0\] is not what.*Wrong key 'sparsity_ratio'"),
    "ratio as text": ({"config": entry(sparse_ratio="0.5")}, "'0.5' should be instance of 'float'"),
    "no list": ({"config": entry()[0]}, "config_list must be a list of dictionaries"),
    "empty": ({"config": []}, "nothing to prune"),
    "no ratio": ({"config": [{"op_types": ["Conv2d"]}]}, "nothing in config_list has a sparse_ratio"),
    "unknown target": ({"config": entry(target_names=["wight"])}, "Conv2d has no target 'wight', only weight, bias"),
    "per channel": ({"config": entry(granularity="per_channel")}, "weight: granularity 'per_channel' is for inputs"),
    "output": ({"config": entry(target_names=["_output_"])}, "cannot be ranked, only masked along"),
    "ratio of an output": (
        {"config": [{"op_types": ["Conv2d"], "target_names": ["_output_"], "target_settings": {"_output_": {
            "sparse_ratio": 0.5, "granularity": "per_channel"}}}]},
        "_output_0 has a ratio, but only parameters can be ranked",
    ),
    "block": ({"config": entry(granularity=[3, 1, 1, 1])}, r"cannot be divided into blocks of \(3, 1, 1, 1\)"),
    "long block": ({"config": entry(granularity=[1] * 5)}, r"granularity \[1, 1, 1, 1, 1\] does not fit its shape"),
    "criterion": ({"criterion": "igg"}, "unknown criterion 'igg'"),
    "pace": ({"pace": "agp"}, "unknown order 'agp'; choose one of rounds, layers"),
    "coupled": ({"coupled": "unverfied"}, "unknown coupled 'unverfied' .did you mean 'unverified'"),
    "every": ({"every": "epoch"}, "unknown every 'epoch'; choose one of"),
    "units": ({"units_per_step": 1.5}, "units_per_step=1.5 is not a number of units"),
    "steps": ({"training_steps": 0}, "training_steps=0 is not a number of steps"),
    "keep": ({"min_width": -1}, "min_width=-1 is not a number of units"),
    "no batches": ({"batches": []}, "batches is empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_mean_anything_is_one_clear_error_and_the_model_is_untouched(case: str) -> None:
    options, message = WRONG[case]
    model = make_net("chain")
    trace, objects = Trace(model), wrapped_state(model)
    options = {"evaluator": evaluator_of(model), "config": CONVS, **options}
    with pytest.raises(DataError if case == "no batches" else ConfigError, match=message):
        SInGEPruner(model, options.pop("config"), options.pop("evaluator"), **nni_asked(**options))
    trace.assert_unchanged()
    assert wrapped_state(model) == objects


def test_an_error_inside_the_wrapping_gives_the_model_and_the_other_compressor_back() -> None:
    model = Residual()
    config = [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_names": ["blocks.0.3"], "sparse_ratio": 0.25}]
    wrong = "'stem' .sparse_ratio=0.5. and 'blocks.0.3' .sparse_ratio=0.25. write the same channels"
    objects = wrapped_state(model)
    with pytest.raises(ConfigError, match=wrong):
        SInGEPruner(model, config, **asked(batches=images()))
    assert wrapped_state(model) == objects
    quantizer = QATQuantizer(model, [{**INT8[0], "op_names": ["stem", "fc"]}], evaluator_of(model))
    with pytest.raises(ConfigError, match=wrong):
        SInGEPruner.from_compressor(quantizer, config, 2)
    assert quantizer._is_wrapped
    stem = quantizer._module_wrappers["stem"]
    assert model.stem._nni_wrapper is stem
    assert (stem.pruning_target_spaces, list(stem.configs)) == ({}, ["quantization"])
    pruner = SInGEPruner.from_compressor(quantizer, config[:1], 2, **asked(nodes=1))
    assert int((~channel_masks(pruner.compress(2, None)[1])["stem"]).sum()) == 4


def test_a_model_that_is_wrapped_or_pruned_already_is_refused() -> None:
    model = make_net("chain")
    first = L1NormPruner(model, CONVS, evaluator_of(model))
    with pytest.raises(ConfigError, match="wrapped by another compressor; call its unwrap_model"):
        SInGEPruner(model, CONVS, **asked(batches=BATCHES))
    with pytest.raises(ConfigError, match="'conv1' is pruned already"):
        SInGEPruner.from_compressor(first, [{"op_names": ["conv1"], "sparse_ratio": 0.5}])


class Passed(nn.Module):
    """It uses the weights of ``fc`` and passes the layer by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(nn.functional.linear(self.first(x), self.fc.weight, self.fc.bias)))


def test_layers_that_a_wrapper_cannot_mask_are_refused() -> None:
    config = [{"op_names": ["first", "fc"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=r"parameters Passed uses without calling them.*exclude_op_names=\['fc'\]"):
        SInGEPruner(Passed(), config, **asked(batches=vectors()))
    kept = channel_masks(
        SInGEPruner(Passed(), [{**config[0], "op_names": ["first"]}], **asked(batches=vectors())).compress()[1]
    )
    assert int(kept["first"].sum()) == 4
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    by_type = [{"op_types": ["Linear"], "exclude_op_names": ["4"], "sparse_ratio": 0.5}]
    assert set(SInGEPruner(model, by_type, **asked(batches=vectors(), criterion="l2")).compress()[1]) == {"0"}
    old = mlp()
    nn.utils.weight_norm(old[2])
    with pytest.raises(ConfigError, match=r"'weight' of '2' .Linear. is no plain parameter.*weight norm"):
        SInGEPruner(old, by_type, **asked(batches=vectors()))


def test_an_evaluator_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the evaluator's optimizer holds none of the model's parameters"):
        SInGEPruner(make_net("chain"), CONVS, evaluator_of(make_net("chain")), 2)


def test_layers_that_are_one_module_or_one_tensor_are_refused() -> None:
    layer, tied = nn.Linear(4, 4), mlp()
    config = [{"op_types": ["Linear"], "exclude_op_names": ["4"], "sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=r"'0' and '2' are one module.*exclude_op_names=\['2'\]"):
        SInGEPruner(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 3)), config, **asked(batches=vectors()))
    tied[2].weight = nn.Parameter(torch.randn(16, 16))
    tied.append(nn.Linear(3, 16)).append(nn.Linear(16, 16))
    tied[6].weight = tied[2].weight
    with pytest.raises(ConfigError, match=r"2.weight and 6.weight are one tensor"):
        SInGEPruner(tied, config, **asked(batches=vectors()))


def test_a_loop_that_ends_too_early_or_the_wrong_duration_is_refused() -> None:
    model = make_net("chain")
    pruner = pruner_of(model, loop=Loop(stop=1))
    with pytest.raises(ScoringError, match="ended after 1 optimizer steps, but masks are made after 2"):
        pruner.compress()
    check_masks_are_ones(pruner)
    with pytest.raises(ConfigError, match=r"takes training_steps steps; call compress\(\) without max_steps"):
        pruner.compress(5, None)
    with pytest.raises(ConfigError, match=r"give compress\(max_steps, max_epochs\)"):
        SInGEPruner.from_compressor(pruner, [{"op_names": ["fc"], "sparse_ratio": 0.4}], 2).compress()
    with pytest.raises(ConfigError, match="give evaluator="):
        SInGEPruner.from_compressor(L1NormPruner(make_net("chain"), CONVS), CONVS, 2)


@pytest.mark.parametrize("constant", [lambda z, y: z.sum() * 0, lambda z, y: torch.zeros(())])
def test_an_objective_that_cannot_move(constant: Any) -> None:
    model = make_net("chain")
    pruner = pruner_of(model, batches=BATCHES, objective=constant, nodes=2)
    state = wrapped_state(model)
    with pytest.raises(ScoringError, match=r"F does not depend .*objective"):
        pruner.compress()
    assert wrapped_state(model) == state


def test_a_training_step_that_cannot_move() -> None:
    def still(batch: Any, model: Any) -> Tensor:
        return training_step(batch, model) * 0

    model = make_net("chain")
    with pytest.raises(ScoringError, match=r"F does not depend on any parameter.*The objective is constant"):
        SInGEPruner(model, CONVS, evaluator_of(model, step=still), **asked(training_steps=2, nodes=2)).compress()
