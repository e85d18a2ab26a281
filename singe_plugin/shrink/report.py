"""The result of a shrink, and the reasons why some units of a masked model had to stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from singe_plugin.axes import AxisGraph
from singe_plugin.run.result import Result

from .holes import holes_of, masked_along
from .masks import Masks

__all__ = ["ShrinkResult", "explain_rest", "masks_left"]


@dataclass
class ShrinkResult(Result):
    """A :class:`~singe_plugin.Result` (save it with :func:`singe_plugin.save`), and what is still masked.

    Its ``weight_masks`` are the masks of weights that are left, for :func:`singe_plugin.hold_masks`, if the masks were
    given by parameter name or held by the model.

    Attributes:
        still_masked: by group or layer, how many of its masked units are still there, and why.
        masks: the masks of what is still masked, in the shapes of the smaller model, to train on with.
        difference: the largest change of the outputs against the masked model, relative to their size.
    """

    still_masked: dict[str, str] = field(default_factory=dict)
    masks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    difference: float = 0.0

    def summary(self) -> str:
        """Return the before/after table, and what is still masked, as text."""
        lines = [super().summary(), f"the outputs differ from the masked model's by {self.difference:.1e} (relative)"]
        return "\n".join([*lines, *(f"still masked: {name}: {why}" for name, why in self.still_masked.items())])


def masks_left(twin: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the masks that are still needed, in the shapes of the smaller model: ``twin`` has them for parameters."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in twin.named_modules():
        for attr, mask in module._parameters.items():
            if mask is not None and bool((mask == 0).any()):
                found.setdefault(name, {})[attr] = (mask.detach() != 0).float()
    return found


def explain_rest(
    graph: AxisGraph, twin: nn.Module, left: Masks, told: Mapping[str, str], trouble: str | None
) -> dict[str, str]:
    """Say why layers have masks left, where it was not said of their group.

    Args:
        graph: the graph of the model.
        twin: a copy of the model whose parameters are the masks.
        left: the masks that are left.
        told: what was said of groups, by name.
        trouble: why nothing could be found out about any unit; None if something could.
    """
    said = [group for name, group in graph.groups.items() if name in told]
    written = {part.owner for group in said for part in group.slices() if not part.reads}
    found: dict[str, str] = {}
    for name, targets in left.items():
        module = graph.model.get_submodule(name)
        main = next((attr for attr in targets if "weight" in attr), next(iter(targets)))
        dim = int(bool(getattr(module, "transposed", False)) and main == "weight")
        mask = targets[main]
        rows = mask.movedim(dim, 0).flatten(1) if mask.ndim > 1 else mask[:, None]
        whole = int((rows == 0).all(1).sum())
        single = int((rows == 0).sum()) - whole * rows.shape[1]
        parts = []
        if whole and module not in written:
            reason = graph.left_whole.get(name) or _not_masked(graph, twin, module, trouble)
            parts.append(f"{whole} of {len(rows)} {'units' if main == 'weight' else main} ({reason})")
        if single:
            parts.append(f"{single} single weights")
        if parts and name not in told:
            found[name] = " and ".join(parts)
    return found


def _not_masked(graph: AxisGraph, twin: nn.Module, module: nn.Module, trouble: str | None) -> str:
    """Say what else writes the masked units of a layer."""
    holes, found, known = holes_of(graph.model, twin), dict[str, None](), False
    for group in graph.groups.values():
        parts = [p for p in group.slices() if p.is_parameter and not p.reads]
        mine = torch.zeros(group.size, dtype=torch.bool)
        known = known or any(part.owner is module for part in parts)
        for part in parts:
            if part.owner is module:
                mine |= masked_along(part, holes, group.size)
        for part in parts:
            if bool((mine & ~masked_along(part, holes, group.size)).any()):
                found[f"{graph.names[part.owner]}.{part.attr}".strip(".")] = None
    names = list(found)
    if not known:
        return f"the channels of {type(module).__name__} are not removed"
    if not names:
        return trouble or "each is one with channels of other heads or groups, which are not masked along"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'} not masked along"
