"""Weights that a layer computes from other parameters: weight norm, spectral norm, any parametrization.

Both of PyTorch's ways are known: ``torch.nn.utils.parametrize`` and the older hooks in front of a layer's forward pass
(``torch.nn.utils.weight_norm``, ``spectral_norm``, ``prune``). What is pruned and scored is the weight that comes out;
what it is computed from is cut along, and :meth:`Computed.become` sees to it that the rest comes out as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from singe_plugin.errors import RemovalError
from singe_plugin.nested import relative_change

__all__ = ["REMEDY", "Computed", "computed_in", "plain_layer", "plain_layers_of", "weight_of_layer"]

REMEDY = (
    "make it a plain weight first, with torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or "
    "torch.nn.utils.remove_weight_norm and remove_spectral_norm for the older ones"
)
_ENDINGS = ("_g", "_v", "_u", "_orig", "_mask")  # of what hooks compute a weight from
_SAME = 1e-4  # relative, in single precision


@dataclass(frozen=True)
class Computed:
    """A weight that a layer computes.

    Attributes:
        layer: that uses it.
        attr: its name there.
        holder: the module that holds what it is computed from: the list of parametrizations, or the layer itself.
        hook: what computes it in front of the forward pass; None for a parametrization.

    Example:
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> (weight,) = computed_in(layer)
        >>> weight.attr, [attr for _, attr in weight.sources()]
        ('weight', ['original0', 'original1'])
    """

    layer: nn.Module
    attr: str
    holder: nn.Module
    hook: Any = None

    def sources(self) -> Iterator[tuple[nn.Module, str]]:
        """Where the parameters and buffers are that it is computed from: module and name."""
        for module in [self.layer] if self.hook is not None else self.holder.modules():
            for name in (*module._parameters, *module._buffers):
                if self.hook is None or (name.startswith(self.attr) and name[len(self.attr) :] in _ENDINGS):
                    yield module, name

    def is_complex(self) -> bool:
        """Whether it is computed from complex numbers."""
        tensors = (owner._parameters.get(attr) for owner, attr in self.sources())
        return any(tensor is not None and tensor.is_complex() for tensor in tensors)

    def steps(self) -> list[str]:
        """The classes of what computes it, in order."""
        return [type(step).__name__ for step in ([self.hook] if self.hook is not None else self.holder.children())]

    @torch.no_grad()
    def value(self) -> Tensor:
        """The weight as it is in eval mode, computed now."""
        if self.hook is None:
            modes = [(module, module.training) for module in self.holder.modules()]
            try:
                self.holder.eval()
                found = cast(Tensor, self.holder())
            finally:
                for module, training in modes:
                    module.training = training
        elif isinstance(self.hook, WeightNorm):
            found = self.hook.compute_weight(self.layer)
        elif isinstance(self.hook, SpectralNorm):
            found = self.hook.compute_weight(self.layer, do_power_iteration=False)
        else:
            found = self.hook.apply_mask(self.layer)
        return found.detach()

    @contextmanager
    def seen_as(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the layer use what a function makes of the weight in here."""

        def after(holder: nn.Module, args: Any, output: Tensor) -> Tensor:
            return change(output)

        def before(layer: nn.Module, args: Any) -> None:
            setattr(layer, self.attr, change(getattr(layer, self.attr)))

        if self.hook is None:
            handle = self.holder.register_forward_hook(after)
        else:
            handle = self.layer.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()

    def become(self, wanted: Tensor, name: str = "") -> None:
        """Let a weight that was cut be what is left of it.

        The lengths of weight norm follow the norm of the directions that are left. Spectral norm keeps its sigma: its
        left vector is scaled, until training estimates both again.

        Args:
            wanted: what was left of the weight before.
            name: how messages call the layer.

        Raises:
            RemovalError: if the parameters that it is computed from cannot give it.
        """
        now = self.value()
        if now.shape == wanted.shape:
            if not self._is(now, wanted, 0.01):
                self._rescale(now, wanted)
                now = self.value()
            if self._is(now, wanted):
                if self.hook is not None:  # what the last forward pass left there has the old shape
                    setattr(self.layer, self.attr, now)
                return
        raise RemovalError(
            f"the {self.attr} of {name or type(self.layer).__name__!r} is computed by {', '.join(self.steps())}, which "
            f"cannot give what is left of it; {REMEDY}"
        )

    @staticmethod
    def _is(now: Tensor, wanted: Tensor, share: float = 1.0) -> bool:
        exact = 1e-10 if now.dtype == torch.float64 else _SAME if now.dtype == torch.float32 else 0.02
        return relative_change([wanted], [now]) <= share * exact or not bool(wanted.any() or now.any())

    @torch.no_grad()
    def _rescale(self, now: Tensor, wanted: Tensor) -> None:
        steps = [self.hook] if self.hook is not None else list(self.holder.children())
        step, last = steps[0], steps[-1]
        if step is last and isinstance(step, WeightNorm | parametrizations._WeightNorm):
            names = (f"{self.attr}_g", f"{self.attr}_v") if self.hook is not None else ("original0", "original1")
            lengths, directions = (cast(nn.Parameter, self.holder._parameters[name]) for name in names)
            before, after = (torch.norm_except_dim(w, 2, step.dim) for w in (directions.data, wanted))
            lengths.data = after * torch.where(lengths.data < 0, -1.0, 1.0).to(after)
            directions.data = directions.data + (before == 0).to(after)  # of nothing, any direction will do
        elif isinstance(last, SpectralNorm | parametrizations._SpectralNorm) and wanted.ndim > 1:
            vector = self.layer._buffers[f"{self.attr}_u"] if isinstance(last, SpectralNorm) else last._buffers["_u"]
            ratio = (now.double() * wanted.double()).sum() / wanted.double().square().sum()
            if vector is not None and bool(ratio.isfinite()):
                vector.data = vector.data * ratio.to(vector)


def computed_in(layer: nn.Module) -> Iterator[Computed]:
    """Yield the weights that a layer computes."""
    if parametrize.is_parametrized(layer):
        for attr, holder in cast(nn.ModuleDict, layer.parametrizations).items():
            yield Computed(layer, attr, holder)
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            yield Computed(layer, hook.name, layer, hook)
        elif isinstance(hook, prune.BasePruningMethod):
            yield Computed(layer, str(hook._tensor_name), layer, hook)


def weight_of_layer(layer: nn.Module, attr: str) -> Computed | None:
    """Return the computed weight of a name, if the layer has one."""
    return next((weight for weight in computed_in(layer) if weight.attr == attr), None)


@contextmanager
def plain_layer(layer: nn.Module) -> Iterator[None]:
    """Let the weights that a layer computes be plain parameters in here, with the values that they have.

    Example:
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 3))
        >>> with plain_layer(layer):
        ...     print(type(layer).__name__, list(dict(layer.named_parameters())))
        Linear ['bias', 'weight']
        >>> type(layer).__name__
        'ParametrizedLinear'
    """
    found = list(computed_in(layer))
    values = {weight.attr: nn.Parameter(weight.value().clone()) for weight in found}
    hooks = [weight.hook for weight in found if weight.hook is not None]
    cls, tables = type(layer), (layer._parameters, layer._modules, layer._forward_pre_hooks, layer.__dict__)
    before: list[dict[Any, Any]] = [dict(table) for table in tables]
    try:
        if parametrize.is_parametrized(layer):
            layer.__class__ = parametrize.type_before_parametrizations(layer)
            del layer._modules["parametrizations"]
        for key in [key for key, hook in layer._forward_pre_hooks.items() if any(hook is one for one in hooks)]:
            del layer._forward_pre_hooks[key]
        for attr, value in values.items():
            layer.__dict__.pop(attr, None)
            layer._parameters[attr] = value
        yield
    finally:
        layer.__class__ = cls
        for attr in values:
            layer._parameters.pop(attr, None)
        for table, saved in zip(tables[1:3], before[1:3], strict=True):
            table.clear()  # type: ignore[attr-defined]
            table.update(saved)  # type: ignore[attr-defined]
        layer.__dict__.update({attr: before[3][attr] for attr in values if attr in before[3]})


@contextmanager
def plain_layers_of(layers: Iterable[nn.Module]) -> Iterator[None]:
    """As :func:`plain_layer`, for those of some layers that compute weights."""
    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            if next(computed_in(layer), None) is not None:
                stack.enter_context(plain_layer(layer))
        yield
