"""A host for the loop that masks single weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from singe_plugin.errors import ConfigError, RemovalError
from singe_plugin.loop.budget import GroupSpec
from singe_plugin.loop.events import Repaired
from singe_plugin.loop.survivors import Unpruned
from singe_plugin.masks import hold_mask, mask_module
from singe_plugin.method.units import UnitGroup

from ..torch_pruning.host import block_of
from .layers import WeightGroup
from .patterns import Pattern

__all__ = ["WeightHost"]


class WeightHost:
    """Layers, scores and removal, for :mod:`singe_plugin.loop.loop`.

    A unit is a weight that is not masked; the units of a layer are numbered in row-major order, without those that are
    gone. Making the host puts a mask on every layer.

    Args:
        model: the model.
        layers: its prunable layers, in forward order.
        score: one score per weight that is left of a group.
        macs: dense multiply-adds of one example by module name (``""`` is the whole model), if they are known.
        emas: averaged copies, which get the same masks.
        unpruned: the network before pruning, if the weights that are left take over; or None.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[WeightGroup],
        score: Callable[[UnitGroup], Tensor],
        macs: Mapping[str, int] | None = None,
        emas: Sequence[nn.Module] = (),
        unpruned: Unpruned | None = None,
    ) -> None:
        self.model, self.macs, self._score = model, macs, score
        self.emas, self.unpruned = emas, unpruned
        self._counts: dict[str, tuple[int, int]] = {}  # the version of a mask, and how many it keeps
        self.by_name = {layer.name: layer for layer in layers}
        self.masks = {layer.name: hold_mask(layer.module) for layer in layers}
        self.twins = {layer.name: [_twin(ema, layer.name) for ema in emas] for layer in layers}
        for name, twins in self.twins.items():
            for twin in twins:
                hold_mask(twin, self.masks[name].mask)

    def attached(self) -> bool:
        """Whether the masks are still on the model (they may have been folded)."""
        return all(mask_module(layer.module) is self.masks[name] for name, layer in self.by_name.items())

    def rewinder(self) -> Callable[[], None]:
        """Return a function that forgets what was counted of masks that are put back."""
        return self._counts.clear

    def layers(self) -> list[GroupSpec]:
        return [GroupSpec(name, self.left(name), block_of(name)) for name in self.by_name]

    def score(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """One score per weight of some layers that is not masked, in row-major order."""
        return {name: self._score(self.units(name)) for name in layers}

    def units(self, layer: str) -> UnitGroup:
        """The weights of a layer that are not masked, each a unit."""
        whole = self.left(layer) == self.size(layer)
        return self.by_name[layer].group(None if whole else self.places(layer))

    def remove(self, layer: str, units: Sequence[int]) -> None:
        places = self.places(layer)
        chosen = torch.from_numpy(np.array(units, dtype=np.int64)).to(places.device)
        if len(chosen) and (int(chosen.min()) < 0 or int(chosen.max()) >= len(places)):
            wrong = int(chosen.max()) if int(chosen.max()) >= len(places) else int(chosen.min())
            raise RemovalError(f"layer {layer!r} has {len(places)} weights left, but number {wrong} was to be removed")
        mask = self.masks[layer].mask
        flat = mask.flatten().index_fill(0, places[chosen], False)
        for module in (self.by_name[layer].module, *self.twins[layer]):
            hold_mask(module, flat.view(mask.shape))
        if self.unpruned is not None:
            self.unpruned.removed()

    def repair(self, last: bool) -> Repaired | None:
        return None if self.unpruned is None else self.unpruned.repair(last, self.emas)

    def size(self, layer: str) -> int:
        """All weights of a layer, masked or not."""
        return self.masks[layer].mask.numel()

    def left(self, layer: str) -> int:
        """The weights of a layer that are not masked."""
        mask = self.masks[layer].mask
        if layer not in self._counts or self._counts[layer][0] != mask._version:
            self._counts[layer] = (mask._version, int(mask.sum()))
        return self._counts[layer][1]

    def places(self, layer: str) -> Tensor:
        """Where in the flat weight the units are, ``[N]``."""
        return self.masks[layer].mask.flatten().nonzero().flatten()

    def sizes(self, *kinds: str) -> dict[str, int]:
        """The weights of the pruned layers that are not masked; no target counts anything else here."""
        return {"units": sum(self.left(name) for name in self.by_name)}

    def params(self) -> int:
        """All parameters of the model that are not masked."""
        return sum(p.numel() for p in self.model.parameters()) - sum(
            self.size(name) - self.left(name) for name in self.by_name
        )

    def effective_macs(self) -> int | None:
        """Multiply-adds of one example with a weight that is not masked; None if the dense ones are not known.

        Every weight of a layer takes part in as many of them as any other (padding is counted as an input). What is
        not in a pruned layer counts in full, and so does a layer whose weight another module multiplies with (the
        ``out_proj`` of ``nn.MultiheadAttention``).
        """
        if self.macs is None:
            return None
        gone = (self.macs.get(n, 0) * (1 - self.left(n) / self.size(n)) for n in self.by_name)
        return round(self.macs[""] - sum(gone))

    def surplus(self, layer: str, scores: Tensor, pattern: Pattern) -> Tensor:
        """The units that a pattern has no place for: not among the best of their block, ``[N]`` bool."""
        mask, places = self.masks[layer].mask, self.places(layer).cpu()
        wide = torch.full((mask.numel(),), -torch.inf, dtype=scores.dtype).index_copy(0, places, scores.cpu())
        kept = pattern.protected(wide.view(mask.shape), self.by_name[layer])
        return ~kept.flatten()[places]


def _twin(ema: nn.Module, name: str) -> nn.Module:
    """The same layer of an averaged copy."""
    try:
        return ema.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(
            f"finetune.ema ({type(ema).__name__}) has no layer {name!r} to mask along with the model's; give a copy of "
            "the model, or a wrapper with one in .module"
        ) from error
