"""The layers whose single weights can be pruned: which they are, in which order they run, what is folded into them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from singe_plugin.errors import ConfigError, DataError, TiedParameterError
from singe_plugin.masks import mask_module, weight_of, weight_slot
from singe_plugin.method.decay import decaying
from singe_plugin.method.folding import eval_outputs, foldable_pairs
from singe_plugin.method.units import BlockLayout, Producer, Slot, UnitGroup, tied_parameters
from singe_plugin.nested import call_model, relative_change, tensors_in
from singe_plugin.run.guards import parts_of
from singe_plugin.state import preserved

__all__ = ["WeightGroup", "find_layers"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_NAMED = (*_LAYERS, parametrize.ParametrizationList)  # what is left of these is left under the layer's name
_REMEDY = "or put the layer in ignored_layers"


@dataclass(frozen=True)
class WeightGroup:
    """A convolution or linear layer, each of its weights a unit.

    Attributes:
        name: its qualified name.
        module: the layer.
        norm: a batch-norm that reads this layer alone; it is folded into the weights while they are scored.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, whether there is a mask before it or not."""
        weight = weight_of(self.module)
        assert weight is not None
        return weight

    @property
    def transposed(self) -> bool:
        """Whether the weight is ``[in, out / groups, ...]``."""
        return bool(getattr(self.module, "transposed", False))

    @property
    def inputs(self) -> tuple[int, int]:
        """The dimension of the weight that runs over the inputs, and how many of them belong together."""
        dim = 0 if self.transposed else 1
        groups = int(getattr(self.module, "groups", 1)) if self.transposed else 1
        return dim, self.weight.shape[dim] // groups

    def group(self, alive: Tensor | None = None) -> UnitGroup:
        """The units: all weights in row-major order, or those at some places ``[N]``.

        The bias belongs to none of them: a weight that is gone leaves it where it is.
        """
        groups = int(getattr(self.module, "groups", 1)) if self.transposed else 1
        layout = BlockLayout(int(self.transposed), groups, kernel=(1,) * self.weight.ndim)
        slot = weight_slot(self.module)
        assert slot is not None
        units = torch.arange(self.weight.numel() if alive is None else len(alive))
        rows = units if alive is None else alive.cpu()
        bias = None if self.norm is None else Slot(self.module, "bias")
        producer = Producer(self.name, (Slot(*slot, layout),), rows, units, self.norm, bias=bias)
        return UnitGroup(self.name, len(units), (producer,))


def find_layers(
    model: nn.Module,
    layers: Iterable[nn.Module | str] | None = None,
    ignored_layers: Iterable[nn.Module | str] = (),
    example_inputs: Any = None,
) -> tuple[list[WeightGroup], dict[str, str]]:
    """The layers that are pruned, and every other weight matrix with the reason why it is not.

    Args:
        model: left as it was.
        layers: modules or names, what is inside of them included; None is every ``nn.Conv*`` and ``nn.Linear``.
        ignored_layers: modules or names to leave out.
        example_inputs: to see in which order layers run, which of them the output depends on, and which batch-norm
            can be folded; None goes without (registration order, no folding).

    Raises:
        ConfigError: for names that are not there, for weights that are computed from something else than a mask, and if
            there is nothing to prune.
        TiedParameterError: if a weight is shared with another layer.
        DataError: if the model does not run on the inputs.
    """
    names = {module: name for name, module in model.named_modules()}
    wanted = None if layers is None else _inside(model, layers, "layers")
    ignored = _inside(model, ignored_layers, "ignored_layers")
    left_whole: dict[str, str] = {}
    chosen: list[nn.Module] = []
    for module, name in names.items():
        if not isinstance(module, _LAYERS):
            continue
        if module in ignored:
            left_whole[name] = "it is in ignored_layers"
        elif wanted is not None and module not in wanted:
            left_whole[name] = "it is not in layers"
        else:
            chosen.append(module)
    for module in chosen:
        _refuse(module, names[module] or "the model itself")
    _refuse_ties(model, {names[m]: m for m in chosen})
    norms: dict[nn.Module, nn.Module] = {}
    if example_inputs is not None and chosen:
        order, reached = _run(model, example_inputs, chosen)
        for module in [m for m in chosen if reached and id(weight_of(m)) not in reached]:
            left_whole[names[module]] = "the model's output in eval mode does not depend on it"
            chosen.remove(module)
        chosen.sort(key=lambda m: order.get(m, len(order)))
        pairs, _ = foldable_pairs(model, example_inputs, virtual=True)
        by_name = dict(model.named_modules())
        norms = {by_name[layer]: by_name[norm] for layer, norm in pairs if by_name[layer] in chosen}
    found = [WeightGroup(names[m], m, norms.get(m)) for m in chosen]
    if not found:
        reasons = "; ".join(f"{k or 'the model'}: {v}" for k, v in list(left_whole.items())[:3])
        raise ConfigError(
            f"{type(model).__name__} has no convolution or linear layer whose weights can be pruned"
            f"{f' ({reasons})' if reasons else ''}; give other layers or fewer ignored_layers"
        )
    return _verified(model, found, example_inputs), left_whole | _others(model, {id(layer.weight) for layer in found})


def _inside(model: nn.Module, given: Iterable[nn.Module | str], what: str) -> set[nn.Module]:
    """The modules that are meant, with everything inside of them."""
    own = set(model.modules())
    found: set[nn.Module] = set()
    for module in parts_of(model, given, what):
        if not isinstance(module, nn.Module) or module not in own:
            raise ConfigError(
                f"{what}: {module!r} is no module of the model; give modules, or names as in model.named_modules()"
            )
        found.update(module.modules())
    if what == "layers" and not any(isinstance(m, _LAYERS) for m in found):
        raise ConfigError("layers names no convolution or linear layer; single weights are pruned in those alone")
    return found


def _refuse(module: nn.Module, name: str) -> None:
    """Raise :class:`ConfigError` if a layer's weight is no parameter that could be masked."""
    if parametrize.is_parametrized(module, "weight") and mask_module(module) is None:
        steps = module.get_submodule("parametrizations.weight").children()
        kinds = ", ".join(type(step).__name__ for step in steps)
        raise ConfigError(
            f"layer {name!r}: its weight is already computed by a parametrization ({kinds}); make that permanent first "
            f"(torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')) {_REMEDY}"
        )
    weight = weight_of(module)
    if weight is None:
        how = (
            "torch.nn.utils.prune.remove(layer, 'weight')"
            if "weight_orig" in module._parameters
            else "torch.nn.utils.remove_weight_norm(layer)"
        )
        raise ConfigError(f"layer {name!r}: its weight is computed, no parameter; call {how} first {_REMEDY}")
    if is_lazy(weight):
        raise ConfigError(f"layer {name!r} has no weights yet (it is lazy); run the model on a batch first {_REMEDY}")
    if weight.is_meta:
        raise ConfigError(f"layer {name!r} is on the meta device and has no values; load its weights first")
    if not weight.is_floating_point():
        raise ConfigError(f"layer {name!r} has weights of {weight.dtype}; prune before quantising {_REMEDY}")


def _refuse_ties(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    ties = tied_parameters(model)
    for name, module in chosen.items():
        if id(weight_of(module)) in ties:
            places = " and ".join(map(repr, ties[id(weight_of(module))]))
            raise TiedParameterError(
                f"layer {name!r}: the parameters {places} are one tensor, so its weights cannot be masked in one place "
                f"alone; untie them (clone one) {_REMEDY}"
            )


def _run(model: nn.Module, example_inputs: Any, layers: Sequence[nn.Module]) -> tuple[dict[nn.Module, int], set[int]]:
    """In which order the layers are called, and the ids of the parameters that the outputs depend on."""
    order: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        order.setdefault(module, len(order))

    with preserved(model), torch.enable_grad():
        model.eval().requires_grad_(True)
        for layer in layers:
            layer.register_forward_pre_hook(note)
        try:
            outputs = list(tensors_in(call_model(model, example_inputs)))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise DataError(
                f"{type(model).__name__} fails on the first batch with {type(error).__name__}: {error}; give batches "
                "of the form it was made for, or example_inputs"
            ) from error
    reached: set[int] = set()
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return order, reached


def _verified(model: nn.Module, layers: list[WeightGroup], example_inputs: Any) -> list[WeightGroup]:
    """The layers with those of their batch-norms that can really be folded (a layer may standardise its weights)."""
    folded = [layer for layer in layers if layer.norm is not None]
    if not folded:
        return layers
    before = eval_outputs(model, example_inputs)

    def unchanged(some: Sequence[WeightGroup]) -> bool:
        with preserved(model), ExitStack() as stack:
            model.eval()
            for layer in some:
                stack.enter_context(decaying(model, layer.group()))
            return relative_change(before, eval_outputs(model, example_inputs)) < 1e-2

    if unchanged(folded):
        return layers
    wrong = {layer.name for layer in folded if not unchanged([layer])}
    return [WeightGroup(x.name, x.module) if x.name in wrong else x for x in layers]


def _others(model: nn.Module, pruned: set[int]) -> dict[str, str]:
    """Every other parameter with two or more dimensions, outside of layers that are named already."""
    found = {}
    for name, module in model.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is None or parameter.ndim < 2 or id(parameter) in pruned or isinstance(module, _NAMED):
                continue
            found[f"{name}.{attr}".lstrip(".")] = (
                f"a parameter of {type(module).__name__}, no convolution or linear layer"
            )
    return found
