"""Layers whose weight is no parameter: computed from some, or contracted by an operator that is not solved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from singe_plugin.nested import tensors_in

from .contractions import CONTRACTING, Contraction

__all__ = ["Computed", "Sources"]

_OTHERS = {"bmm": 0, "baddbmm": 1, "mv": 0, "addmv": 1}
"""Operators that contract two factors, but are no :data:`~.contractions.CONTRACTING`; the position of the first."""
_FUSED = frozenset(
    {"mkldnn_rnn_layer", "_cudnn_rnn", "_trilinear", "_grouped_mm", "deform_conv2d", "_transformer_encoder_layer_fwd"}
)
"""Operators that contract an activation with parameters somewhere inside."""


@dataclass(frozen=True)
class Computed:
    """A contraction with what comes from parameters, but is none.

    Attributes:
        names: of the parameters, the largest first.
        why: it is no contraction with a parameter of its own.
        features: how many channels, or numbers, every result is a sum over.
        depends: the contractions that what it reads depends on.
    """

    names: tuple[str, ...]
    why: str
    features: int
    depends: frozenset[int]


class Sources:
    """Which parameters tensors are computed from, and from nothing that was put into the model.

    Args:
        model: the model.
        inputs: what is put into it.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.known: Any = WeakIdKeyDictionary()  # tensor -> names
        self.varying: Any = WeakIdKeyDictionary()
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            self.known[parameter] = (name,)
        for tensor in tensors_in(inputs):
            self.varying[tensor] = True

    @property
    def tables(self) -> tuple[Any, Any]:
        """What is known of tensors."""
        return self.known, self.varying

    def follow(self, operands: list[Tensor], out: Any, layer: bool = False) -> None:
        """Note what an operator makes.

        Args:
            operands: what it takes.
            out: its results.
            layer: whether it applies weights to something, so that the results are no weights.
        """
        names = tuple(dict.fromkeys(name for t in operands for name in self.known.get(t, ())))
        varies = layer or any(t in self.varying for t in operands)
        for result in tree_flatten(out)[0]:
            if not isinstance(result, Tensor):
                continue
            if varies:
                self.varying[result] = True
                self.known.pop(result, None)
            elif names:
                self.known[result] = names

    def layer(
        self, name: str, args: Any, seen: Contraction | None, plain: bool, depends: frozenset[int]
    ) -> Computed | None:
        """Say of a contraction that it is of a weight, but of no parameter; None if it is of a parameter, or of none.

        Args:
            name: of the operator.
            args: its arguments.
            seen: what it is as one of :data:`~.contractions.CONTRACTING`, or None.
            plain: whether its second factor is a parameter, or a turned one.
            depends: what its arguments depend on.
        """
        if name in _FUSED:
            return self._fused(name, args, depends)
        first = CONTRACTING.get(name, _OTHERS.get(name))
        if first is None or (seen is not None and seen.weight is not None):
            return None
        x, weight = args[first], args[first + 1]
        sources = [self.known.get(t, ()) for t in (x, weight)]
        if bool(sources[0]) == bool(sources[1]) or (weight if sources[0] else x) not in self.varying:
            return None  # two activations, or the computing of a weight
        names = self._largest_first(sources[0] or sources[1])
        if sources[0] or seen is None:
            why = _inside(name)
        elif plain:
            why = "what it adds is computed"
        else:
            why = f"its weight is computed from {', '.join(names)}"
        features = x.shape[1] // args[8] if name == "convolution" else x.shape[-1]
        return Computed(names, f"{why}; it keeps its weights", features, depends)

    def _fused(self, name: str, args: Any, depends: frozenset[int]) -> Computed | None:
        """What an operator contracts somewhere inside."""
        operands = list(tensors_in(args))
        first = next((t for t in operands if t in self.varying), None)
        found = dict.fromkeys(n for t in operands if t.ndim > 1 for n in self.known.get(t, ()))
        if first is None or not found:
            return None
        names = self._largest_first(found)
        return Computed(names, f"{_inside(name)}; it keeps its weights", first.shape[-1], depends)

    def _largest_first(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: -self.sizes[name]))


def _inside(name: str) -> str:
    return f"{name} contracts it, which is not solved"
