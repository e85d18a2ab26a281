"""Does F depend on it? What is asked where all gradients are zero, before anything is ranked or trained by them.

Zeros can be the truth: nothing gets through a layer whose units are all dead, or behind which a scale is zero, and its
removal costs nothing. They can be wrong: F changes at the removal, and the gradient only does not see it (an operator
without one, a softmax so sure that its gradient underflows). And they can mean that there is no question: an objective
that is constant, or that leaves a part of the output out, gives the same zeros whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.errors import ScoringError
from singe_plugin.masks import masks_of
from singe_plugin.method.batches import inputs_for
from singe_plugin.method.decay import decaying
from singe_plugin.method.options import Scoring
from singe_plugin.method.units import UnitGroup
from singe_plugin.method.walk import Walker
from singe_plugin.nested import call_model, tensors_in, to_device
from singe_plugin.state import forget_caches, model_device, preserved

__all__ = ["check_zeros", "depends_on"]

Call = Callable[..., Any]
_DRAWS = (1.0, 0.1, 0.01)  # of the parameters' own size: small ones saturate nothing


def check_zeros(model: nn.Module, group: UnitGroup, batches: Iterable[Any], options: Scoring) -> None:
    """All scores of a group are zero: raise unless that is the truth.

    It is the truth if F stays what it is when the units go, and would depend on them with other weights. Where random
    weights let nothing through most of the network, or weights are masked, the zeros are taken for true. The caller
    preserves the model, which is in eval mode.

    Raises:
        ScoringError: if F changes at the removal, or is the same whatever the weights of the group are.
    """
    device = model_device(model)
    pairs = [to_device(inputs_for(model, batch), device, options.channels_last) for batch in batches]
    for inputs, _ in pairs[:1]:
        forget_caches(model, partial(call_model, model, inputs))
    with preserved(model), decaying(model, group) as rows:
        for index, (inputs, targets) in enumerate(pairs):
            walker = Walker(model, group, rows, options, options.decay_path, index, inputs, targets)
            if walker.moves():
                return  # there is a gradient: the criterion's zeros are its own (weights that are zero, for one)
            _check_removal(walker)
    if masks_of(model):
        return  # what is masked lets nothing through, whatever the weights are
    objective = options.function
    owned = {id(slot.tensor) for producer in group.producers for slot in producer.slots}
    mine = {name for name, parameter in model.named_parameters() if id(parameter) in owned}
    found: set[str] = set()
    for inputs, targets in pairs:
        with preserved(model):
            several = min((len(t) for t in tensors_in(inputs) if t.ndim), default=0) > 1
            for module in model.modules():  # running statistics belong to other weights: nothing would get through
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = several
            found |= depends_on(model, lambda call: objective(call_model(call, inputs), targets))  # noqa: B023
        if found & mine:
            return
    if not found:
        raise ScoringError(
            f"group {group.name!r}: F does not depend on any parameter of the model: its gradient is zero on every "
            "batch, for these weights and for random ones, so every unit would get the same score. The objective is "
            "constant; give one that the outputs move, as objective=torch.nn.functional.mse_loss"
        )
    if mine and len(found) >= len(list(model.named_parameters())) / 2:  # else the draws show too little of it
        raise ScoringError(
            f"group {group.name!r}: F does not depend on it: its gradient is zero on every batch, for these weights "
            "and for random ones, so all of its units would get the score 0. Give more batches, an "
            "objective that takes in the part of the output that it leads to, or put its layer in ignored_layers"
        )


def _check_removal(walker: Walker) -> None:
    """Raise unless F is the same without the units as with them."""
    size = walker.group.size
    units = [None] if walker.options.path == "layer" else list(torch.arange(size, device=walker.device))
    before = walker.value_at(1.0)
    for unit in units:
        after = walker.value_at(0.0, unit)
        if not torch.allclose(before, after, rtol=1e-5, atol=0.0):
            raise ScoringError(
                f"group {walker.group.name!r}: its scores are all zero, but F goes from {float(before):.6g} to "
                f"{float(after):.6g} on batch {walker.index} when its units are removed: the gradient vanishes on the "
                "way (an operator without one, such as round, sign or argmax, or outputs so sure that it underflows); "
                "use the objective 'logit' or the criterion 'l2', or put its layer in ignored_layers"
            )


def depends_on(model: nn.Module, evaluate: Callable[[Call], Tensor]) -> set[str]:
    """The names of the parameters that F depends on somewhere: where the gradient at random parameters is not zero.

    Args:
        model: not changed: the parameters are substituted for each call.
        evaluate: F, given what is called in the place of the model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> sorted(depends_on(net, lambda call: call(torch.ones(1, 2)).sum()))
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> depends_on(net, lambda call: call(torch.ones(1, 2)).sum() * 0)
        set()
    """
    found: set[str] = set()
    for number, size in enumerate(_DRAWS):
        generator = torch.Generator().manual_seed(number)
        drawn = {name: _drawn(p, size, generator) for name, p in model.named_parameters()}
        leaves = {name: tensor for name, tensor in drawn.items() if tensor.requires_grad}
        value = evaluate(lambda *a, **k: torch.func.functional_call(model, drawn, a, k))  # noqa: B023
        if not leaves or not value.requires_grad:
            continue
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
        found |= {n for n, g in zip(leaves, gradients, strict=True) if g is not None and bool((g != 0).any())}
    return found


def _drawn(parameter: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Random values of the parameter's size; 0.1 where all of it is zero."""
    values = parameter.detach()
    if not values.numel() or not (values.is_floating_point() or values.is_complex()):
        return values
    spread = float(values.abs().double().square().mean().sqrt()) or 0.1
    kind = values.dtype if values.is_complex() else torch.float32
    noise = torch.randn(values.shape, generator=generator, dtype=kind) * (spread * size)
    return noise.to(device=values.device, dtype=values.dtype).requires_grad_()
