"""What matters on another device than the CPU and can be seen on one: contexts, copies, states, counts, errors."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

from singe_plugin import FineTune, prune, prune_weights
from singe_plugin.axes import AxisGraph, remove_units, verify_groups
from singe_plugin.errors import ConfigError, DataError, ScoringError
from singe_plugin.integrations.torch_pruning import SInGEImportance, SInGEPruner
from singe_plugin.integrations.unstructured import UnstructuredPruner
from singe_plugin.loop.costs import count_macs
from singe_plugin.loop.events import Callback
from singe_plugin.loop.finetune import place_state
from singe_plugin.loop.tuner import Tuner
from singe_plugin.method.options import Scoring
from singe_plugin.method.scoring import score_units
from singe_plugin.nested import to_device
from singe_plugin.run.staging import resolve_device
from singe_plugin.state import RngState

from references import Net, get_case
from small_nets import Chain, Recurrent, Trace, assert_same_values, images, sequences, vectors

META = torch.device("meta")


# --- autocast keeps casts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["ig", "sg", "ig_abs"])
@pytest.mark.parametrize("path", ["layer", "neuron"])
def test_scores_are_the_same_inside_a_mixed_precision_context(criterion: str, path: str) -> None:
    case = get_case("chain")
    options = Scoring(criterion, path=path, nodes=4)
    alone = score_units(case.model, case.group, case.batches, Scoring(criterion, path=path, nodes=4, amp="bf16"))
    with torch.autocast("cpu", torch.bfloat16):
        case.model.eval()(case.batches[0][0])  # casts are kept from here on
        inside = score_units(case.model, case.group, case.batches, options)
    torch.testing.assert_close(inside, alone, rtol=0, atol=0)
    full = score_units(case.model, case.group, case.batches, options)
    torch.testing.assert_close(inside, full, rtol=0.1, atol=0.1 * float(full.max()))


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_fine_tuning_inside_a_mixed_precision_context_learns(amp: str | None) -> None:
    def tuned(context: bool, amp: str | None) -> nn.Module:
        torch.manual_seed(0)
        model, batches = Chain(), images(2)
        tuner = Tuner(FineTune(batches, 10, lr=0.1, amp=amp))
        with torch.autocast("cpu", torch.bfloat16, enabled=context):
            model.eval()(batches[0][0])  # casts are kept from here on
            tuner.prepare(model)
            tuner.run(model, 10, Callback())
        return model

    assert_same_values(tuned(True, amp), tuned(False, "bf16"))


def test_the_callers_context_sees_the_new_weights() -> None:
    model, batches = Chain(), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        before = model.eval()(batches[0][0])
        tuner = Tuner(FineTune(batches, 3, lr=0.5))
        tuner.prepare(model)
        tuner.run(model, 3, Callback())
        after = model.eval()(batches[0][0])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(batches[0][0])
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


# --- batches ----------------------------------------------------------------------------------------------------


class Noted(Tensor):
    """A tensor that writes down how it is copied."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        Noted.calls.append(kwargs)
        return super().to(*args, **kwargs)


@pytest.mark.parametrize(("where", "later"), [("cpu", False), ("meta", True)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_goes_to_the_cpu_is_there_when_the_copy_returns(where: str, later: bool, channels_last: bool) -> None:
    Noted.calls.clear()
    to_device({"x": torch.zeros(1, 2, 3, 3).as_subclass(Noted)}, torch.device(where), channels_last)
    assert [call["non_blocking"] for call in Noted.calls] == [later]


def test_a_batch_that_can_move_itself_is_moved() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    moved, label = to_device((packed, "a"), META)
    assert isinstance(moved, nn.utils.rnn.PackedSequence)
    assert label == "a"
    assert (moved.data.device, moved.batch_sizes.device.type) == (META, "cpu")


# --- where things are -------------------------------------------------------------------------------------------


def test_a_model_stays_on_the_cuda_device_that_it_is_on() -> None:
    assert resolve_device(None, torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert resolve_device(None, torch.device("cpu")) == resolve_device(None)
    assert resolve_device(None, torch.device("mps")) == resolve_device(None)  # it has no double precision
    assert resolve_device("cpu", torch.device("cuda", 1)) == torch.device("cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SInGEPruner(m, images(1)[0][0], SInGEImportance("l2"), pruning_ratio=0.5),
        lambda m: UnstructuredPruner(m, images(1), sparsity=0.5),
    ],
    ids=["channels", "weights"],
)
def test_a_model_on_several_devices_is_refused(make: Any) -> None:
    model = Chain()
    model.bn2.to("meta")
    with pytest.raises(ConfigError, match=r"several devices \('conv1.weight' on cpu, 'bn2.weight' on meta\); move it"):
        make(model)


@pytest.mark.parametrize("run", [lambda m, b: prune(m, b, target="params=0.5"), lambda m, b: prune_weights(m, b)])
def test_new_tensors_elsewhere_are_refused(run: Any) -> None:
    model, batches = Chain(), images(2)
    state = Trace(model)
    with torch.device("meta"), pytest.raises(ConfigError, match=r"set_default_device\('meta'\).*torch.device\('cpu'\)"):
        run(model, batches)
    state.assert_unchanged()


def test_the_optimizers_state_goes_where_the_parameters_go() -> None:
    optimizer = torch.optim.AdamW(Chain().to(META).parameters(), 0.01)
    for parameter in optimizer.param_groups[0]["params"]:
        shape = parameter.shape
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones(shape),
            "exp_avg_sq": torch.ones(shape),
        }
    Tuner(FineTune(images(1), 2, optimizer=optimizer)).follow()
    devices = {key: value.device.type for state in optimizer.state.values() for key, value in state.items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@pytest.mark.parametrize(
    ("key", "group", "expected"),
    [
        ("exp_avg", {}, "meta"), ("row_var", {}, "meta"), ("step", {}, "cpu"), ("step", {"fused": True}, "meta"),
        ("step", {"capturable": True}, "meta"), ("step", {"fused": None, "capturable": False}, "cpu"),
    ],
)  # fmt: skip
def test_state_is_where_pytorch_puts_it(key: str, group: dict[str, Any], expected: str) -> None:
    parameter = torch.zeros(3, 2, device=META)
    assert place_state(parameter, key, torch.zeros(3, 1), group).device.type == expected
    assert place_state(parameter, key, 7, group) == 7


def test_random_states_of_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    state, restored = RngState.capture(), []
    state.torch_cuda = [torch.zeros(4, dtype=torch.uint8) + i for i in range(3)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, number: restored.append((int(s[0]), number)))
    state.restore()
    assert restored == [(0, 0), (1, 1)]


# --- recurrent layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_differentiated_without_cudnn(kind: type[nn.RNNBase]) -> None:
    model, batches, seen = Recurrent(kind, 8, 6), sequences(), []

    original = model.cells.forward

    def forward(*args: Any) -> Any:
        seen.append(torch.backends.cudnn.enabled)
        return original(*args)

    model.cells.forward = forward
    group = AxisGraph(model, batches[0][0]).groups["stem"].unit_group()
    assert set(seen) == {False}
    seen.clear()
    assert score_units(model, group, batches, Scoring(nodes=2)).shape == (8,)
    assert set(seen) == {False}
    assert torch.backends.cudnn.enabled
    assert (len(model.cells._forward_hooks), len(model.cells._forward_pre_hooks)) == (0, 0)


def test_cudnn_is_switched_on_again_after_an_error() -> None:
    model, batches = Recurrent(nn.LSTM, 8, 6), sequences()
    group = AxisGraph(model, batches[0][0]).groups["stem"].unit_group()

    def failing(*_: Any) -> Any:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")

    model.cells.forward = failing
    with pytest.raises(ScoringError, match=r"'stem'.*batch 0.*training mode"):
        score_units(model, group, batches, Scoring(nodes=2))
    assert torch.backends.cudnn.enabled
    assert len(model.cells._forward_hooks) == 0


def test_a_gradient_that_fails_is_an_error_of_ours() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError("only forwards")

    model = Net(lambda m, x: m.head(Backward.apply(m.stem(x))), stem=nn.Linear(4, 8), head=nn.Linear(8, 3))
    state = Trace(model)
    group = AxisGraph(model, vectors(1)[0][0]).groups["stem"].unit_group()
    with pytest.raises(ScoringError, match=r"'stem'.*batch 0.*only forwards"):
        score_units(model, group, vectors(1), Scoring())
    state.assert_unchanged()


# --- memory -----------------------------------------------------------------------------------------------------


def full(*_: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_running_out_of_memory_is_said_and_no_reason_to_leave_a_layer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Chain(), images(1)[0][0]
    graph = AxisGraph(model, x)
    group = graph.groups["conv1"]
    tuner = Tuner(FineTune(images(2), 2))
    tuner.prepare(model)
    state = Trace(model)
    calls = 0
    plain = model.forward

    def later(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(*args) if calls <= 1 else full()

    for forward, action in (
        (full, lambda: AxisGraph(model, x)),
        (full, lambda: verify_groups(graph)),
        (later, lambda: verify_groups(graph)),
        (full, lambda: tuner.run(model, 1, Callback())),
        (full, lambda: score_units(model, group.unit_group(), images(1), Scoring())),
        (full, lambda: prune(model, images(2), target="params=0.5", device="cpu")),
    ):
        calls = 0
        model.forward = forward  # type: ignore[method-assign]
        with pytest.raises(torch.cuda.OutOfMemoryError):
            action()
        del model.forward
    monkeypatch.setattr("singe_plugin.axes.removal._apply", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        remove_units(graph, group, [0])
    state.assert_unchanged()


# --- counts -----------------------------------------------------------------------------------------------------


def test_the_products_of_attention_are_counted_on_the_cpu_too() -> None:
    """Fused attention is one operator; by hand, queries times keys and weights times values."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0).eval()
    x = torch.zeros(1, 3, 32, 32)
    fused = count_macs(model, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert fused == count_macs(model, x)
    tokens, width = 17, 192
    linear = 2 * tokens * (3 * width * width + width * width + 8 * width * width)
    assert fused == 16 * 3 * 64 * width + linear + 2 * 2 * tokens * tokens * width


def test_labels_out_of_range_are_found_before_the_device_sees_them() -> None:
    """CUDA would fail later, and refuse everything from then on."""
    batches = [(images(1)[0][0], torch.tensor([0, 1, 2, 3, 0, 0, 0, 0]))]
    model = Chain()
    group = AxisGraph(model, batches[0][0]).groups["conv1"].unit_group()
    said = "Target 3 is out of bounds: the model has 3 classes, 0 to 2"
    for objective in ("loss", "logit"):
        with pytest.raises(ScoringError, match=said):
            score_units(model, group, batches, Scoring(objective=objective))
    tuner = Tuner(FineTune(batches, 1))
    tuner.prepare(model)
    with pytest.raises(DataError, match=said):
        tuner.run(model, 1, Callback())
    tuner = Tuner(FineTune([(x, y.tolist()) for x, y in batches], 1))
    tuner.prepare(model)
    with pytest.raises(DataError, match="step 1 failed with TypeError"):
        tuner.run(model, 1, Callback())
    ignored = [(batches[0][0], torch.tensor([0, 1, 2, -100, 0, 0, 0, 0]))]
    kept = [(x[y >= 0], y[y >= 0]) for x, y in ignored]
    got, expected = (score_units(model, group, b, Scoring()) for b in (ignored, kept))
    torch.testing.assert_close(got, expected)
