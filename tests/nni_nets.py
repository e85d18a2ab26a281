"""Networks, training loops and evaluators that the tests of the NNI pruner share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nni
import timm
import torch
from torch import Tensor, nn

from singe_plugin.integrations.nni import SInGEPruner, TorchEvaluator
from singe_plugin.state import RngState

from asked import asked
from small_nets import Chain, images

__all__ = [
    "BATCHES", "CONVS", "INT8", "NETS", "Loop", "batches_of", "channel_masks", "check_masks", "evaluator_of",
    "example_of", "make_net", "metrics_of", "nni_asked", "pruner_of", "training_step", "wrapped_state",
]  # fmt: skip

BATCHES = images(count=3, size=8, examples=6)
CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.4}]
INT8 = [{"op_names": ["conv1", "conv2", "fc"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}]
RESNET: dict[str, Any] = {"num_classes": 3, "in_chans": 2, "channels": [8, 12, 16, 20], "layers": [2, 1, 1, 1]}
NETS: dict[str, Any] = {
    "chain": lambda: Chain(widths=(8, 10, 6)),
    "resnet18": lambda: timm.create_model("resnet18", **RESNET),
    "mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=3, in_chans=2),
}


def make_net(name: str, seed: int = 0) -> nn.Module:
    """A net by name, with norms that are not the identity; the caller's random numbers stay."""
    state = RngState.capture()
    try:
        torch.manual_seed(seed)
        model: nn.Module = NETS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model
    finally:
        state.restore()


def example_of(name: str = "chain") -> Tensor:
    """An input of the size that a net takes."""
    return torch.zeros(2, 2, 8 if name == "chain" else 32, 8 if name == "chain" else 32)


def batches_of(name: str = "chain") -> list[tuple[Tensor, Tensor]]:
    """Batches for a net."""
    return BATCHES if name == "chain" else images(count=2, size=32, examples=2)


def training_step(batch: Any, model: nn.Module) -> Tensor:
    """The user's loss."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


class Loop:
    """A user's training function. What it saw is kept: the steps, their optimizers and learning rates.

    Args:
        batches: what it trains on, over and over.
        stop: after how many steps it gives up, whatever it is asked for.
    """

    def __init__(self, batches: Iterable[Any] = BATCHES, stop: int | None = None) -> None:
        self.batches, self.stop = list(batches), stop
        self.steps = 0
        self.optimizers: list[Any] = []
        self.rates: list[float] = []
        self.momenta: list[int] = []

    def __call__(
        self,
        model: Any,
        optimizer: Any,
        step: Any,
        scheduler: Any = None,
        max_steps: Any = None,
        max_epochs: Any = None,
    ) -> None:
        model.train()
        total = max_steps if max_steps is not None else (max_epochs or 1) * len(self.batches)
        for number in range(total if self.stop is None else min(total, self.stop)):
            optimizer.zero_grad()
            found = step(self.batches[number % len(self.batches)], model)
            (found if isinstance(found, Tensor) else found["loss"] if isinstance(found, dict) else found[0]).backward()
            self.rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            self.steps += 1
            self.optimizers.append(optimizer)
            self.momenta.append(sum("momentum_buffer" in state for state in optimizer.state.values()))


def evaluator_of(
    model: nn.Module, loop: Loop | None = None, lr: float = 0.05, decay: float | None = None, step: Any = training_step,
    example: Any = None,
) -> TorchEvaluator:  # fmt: skip
    """One of NNI's evaluators around a training function."""
    optimizer = nni.trace(torch.optim.SGD)(model.parameters(), lr=lr, momentum=0.9)
    scheduler = None if decay is None else nni.trace(torch.optim.lr_scheduler.ExponentialLR)(optimizer, decay)
    return TorchEvaluator(loop or Loop(), optimizer, step, scheduler, example_of() if example is None else example)


def channel_masks(masks: Any) -> dict[str, Tensor]:
    """Layer -> one bool per output channel, of masks that are equal within each channel."""
    found = {}
    for name, targets in masks.items():
        rows = targets["weight"].flatten(1) if targets["weight"].ndim > 1 else targets["weight"][:, None]
        assert bool((rows == rows[:, :1]).all()), name
        found[name] = rows[:, 0].bool()
    return found


def wrapped_state(model: nn.Module) -> dict[str, Any]:
    """What a wrapped model is made of: the objects, by where they are."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}.forward"] = module.__dict__.get("forward")
        for table in ("_modules", "_parameters", "_buffers"):
            found[f"{name}.{table}"] = {key: id(value) for key, value in getattr(module, table).items()}
    return found


def nni_asked(**options: Any) -> dict[str, Any]:
    """As :func:`asked`; NNI's pruner has the least width, and when to train on, among its own arguments."""
    own = {name: options.pop(name) for name in ("every", "min_width") if name in options}
    return {**asked(**options), **own}


def pruner_of(model: nn.Module, config: Any = CONVS, loop: Loop | None = None, **options: Any) -> SInGEPruner:
    """Our pruner with an evaluator, on a few passes."""
    options = {"training_steps": 2, "nodes": 2, **options}
    return SInGEPruner(model, config, evaluator_of(model, loop), **nni_asked(**options))


def check_masks(model: nn.Module, pruner: SInGEPruner, masks: Any, ratio: float = 0.4) -> None:
    """Exact sparsity, bias as weight, norms as their layer, one mask per group, nothing but 0 and 1."""
    kept = channel_masks(masks)
    modules = dict(model.named_modules())
    convs = {name for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    norms = {name for name, module in modules.items() if isinstance(module, nn.BatchNorm2d)}
    assert set(masks) == convs | norms
    for name, mask in kept.items():
        assert int((~mask).sum()) == int(len(mask) * ratio), name
        values = masks[name]["weight"]
        assert values.shape == pruner._module_wrappers[name].weight.shape
        assert bool(((values == 0) | (values == 1)).all())
        if masks[name]["bias"] is not None:
            assert torch.equal(masks[name]["bias"].bool(), mask)
    for piece in pruner.pieces:
        assert len({tuple(kept[name].tolist()) for name, _ in [*piece.members, *piece.followers]}) == 1, piece.name


def metrics_of(pruner: SInGEPruner) -> dict[str, dict[str, Tensor]]:
    """One metric per block of every target that is ranked."""
    return pruner._calculate_metrics(pruner._collect_data())
