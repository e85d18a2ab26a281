"""Masks are made from scores by the rules of NNI's ``generate_sparsity``, over units instead of metric entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from singe_plugin.errors import ConfigError

from .pieces import Key, MaskedGroup, Spaces, metric_shape

__all__ = ["Masks", "Rule", "kept_units", "masks_from", "rule_of"]

Masks = dict[str, dict[str, Tensor]]
_RULES = ("sparse_ratio", "sparse_threshold", "min_sparse_ratio", "max_sparse_ratio", "global_group_id")


@dataclass(frozen=True)
class Rule:
    """What the config list says of the members of a piece, at the moment (a scheduler changes ratios).

    Attributes:
        ratio, threshold: the fraction of the units that is masked, or the score below which they are; one is None.
        low, high: the limits of the ratio.
        family: the global group that the piece is in, or None.
        blocks: ``[N]``, the internal block of every unit; None if there is only one block.
    """

    ratio: float | None
    threshold: float | None
    low: float
    high: float
    family: Any
    blocks: Tensor | None

    def clamped(self, ratio: float) -> float:
        return min(self.high, max(self.low, ratio))


def rule_of(piece: MaskedGroup, spaces: Spaces) -> Rule:
    """Return the rule that all members of a piece have in common.

    Raises:
        ConfigError: if they differ: what is masked alike needs one ratio.
    """
    found = {(name, attr): [getattr(spaces[name][attr], what) for what in _RULES] for name, attr in piece.members}
    (first, _), rule = next(iter(found.items()))
    for (name, _), other in found.items():
        for what, a, b in zip(_RULES, rule, other, strict=True):
            if a != b:
                raise ConfigError(
                    f"{first!r} ({what}={a}) and {name!r} ({what}={b}) write the same channels, so they are masked "
                    "alike; give them one setting, exclude one of them, or use coupled=False for masks that cannot be "
                    "removed physically"
                )
    ratio, threshold, low, high, family = rule
    return Rule(ratio, threshold, low or 0.0, 1.0 if high is None else high, family, _internal_blocks(piece, spaces))


def _internal_blocks(piece: MaskedGroup, spaces: Spaces) -> Tensor | None:
    """Return the internal block that every unit lies in; None where each unit has a share of every block anyway."""
    count = math.lcm(*(int(spaces[m][t].internal_metric_block or 1) for m, t in piece.members))
    found: Tensor | None = None
    for (module, _), labels in piece.members.items() if count > 1 else ():
        if len(labels) % count:
            raise ConfigError(
                f"{module!r}: internal_metric_block={count} does not divide its {len(labels)} channels; choose one "
                "that does"
            )
        shares = torch.stack([torch.bincount(b[b >= 0], minlength=piece.size) for b in labels.view(count, -1)])
        if bool((shares == shares[0]).all()):
            continue
        if bool(((shares > 0).sum(0) > 1).any()):
            raise ConfigError(
                f"{module!r}: internal_metric_block={count} cuts through channels that can only be masked together; "
                "choose a divisor of it, or leave it out"
            )
        found = shares.argmax(0)
    return found


def kept_units(pieces: Sequence[MaskedGroup], scores: Sequence[Tensor], spaces: Spaces, min_width: int) -> list[Tensor]:
    """Return for every piece which units stay: ``[N]`` bool.

    The rules are those of NNI: a threshold decides (bounded by the ratios' limits), or one ratio of the *elements* of a
    global group, or else a ratio of the units, in equal parts of every ``internal_metric_block``. At least
    ``min_width`` units of each piece stay.
    """
    rules = [rule_of(piece, spaces) for piece in pieces]
    kept: list[Tensor | None] = [None] * len(pieces)
    families: dict[Any, list[int]] = {}
    for number, (rule, score) in enumerate(zip(rules, scores, strict=True)):
        if rule.threshold is not None:
            kept[number] = _above(score, rule)
        elif rule.family is not None:
            families.setdefault(rule.family, []).append(number)
        else:
            kept[number] = _by_ratio(score, rule.clamped(float(rule.ratio or 0.0)), rule.blocks)
    for family, numbers in families.items():
        found = _globally(family, [(pieces[n], scores[n], rules[n]) for n in numbers], spaces)
        for number, mine in zip(numbers, found, strict=True):
            kept[number] = mine
    final = []
    for score, chosen in zip(scores, kept, strict=True):
        assert chosen is not None
        floor = min(min_width, len(score))
        if int(chosen.sum()) < floor:
            chosen = chosen.clone()
            chosen[score.argsort(descending=True, stable=True)[:floor]] = True
        final.append(chosen)
    return final


def _by_ratio(scores: Tensor, ratio: float, blocks: Tensor | None = None) -> Tensor:
    """Keep all units but the lowest ``int(n * ratio)`` of every block of n."""
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    every = torch.arange(len(scores))
    parts = [every] if blocks is None else [every[blocks == number] for number in range(int(blocks.max()) + 1)]
    for units in (part.to(scores.device) for part in parts):
        kept[units[scores[units].argsort(stable=True)[: int(len(units) * ratio)]]] = False
    return kept


def _above(scores: Tensor, rule: Rule) -> Tensor:
    assert rule.threshold is not None
    kept = scores >= rule.threshold
    ratio = 1 - float(kept.double().mean())
    return kept if rule.low <= ratio <= rule.high else _by_ratio(scores, rule.clamped(ratio))


def _globally(family: Any, members: Sequence[tuple[MaskedGroup, Tensor, Rule]], spaces: Spaces) -> list[Tensor]:
    """Mask the lowest units of several pieces, until the ratio of their elements is reached."""
    ratios = {rule.ratio for _, _, rule in members}
    if len(ratios) != 1 or None in ratios:
        raise ConfigError(
            f"global_group_id={family!r}: its layers have the sparse_ratios {sorted(map(str, ratios))}; layers "
            "that are ranked together need one ratio"
        )
    sizes = [_elements(piece, spaces).to(scores.device) for piece, scores, _ in members]
    totals = [int(size.sum()) for size in sizes]
    aim = int(sum(totals) * float(ratios.pop() or 0.0))
    if aim <= sum(int(t * rule.low) for t, (_, _, rule) in zip(totals, members, strict=True)):
        return [_by_ratio(scores, rule.low) for _, scores, rule in members]
    if aim >= sum(int(t * rule.high) for t, (_, _, rule) in zip(totals, members, strict=True)):
        return [_by_ratio(scores, rule.high) for _, scores, rule in members]
    order = torch.cat([s.to(sizes[0].device) for _, s, _ in members]).argsort(stable=True)
    gone = torch.cat([s.to(sizes[0].device) for s in sizes])[order].cumsum(0) <= aim
    kept = torch.ones(len(order), dtype=torch.bool, device=order.device).index_fill(0, order[gone], False)
    return [
        k.to(s.device) for k, (_, s, _) in zip(torch.split(kept, [p.size for p, _, _ in members]), members, strict=True)
    ]


def _elements(piece: MaskedGroup, spaces: Spaces) -> Tensor:
    """Count the elements of its members' parameters that every unit has."""
    total = torch.zeros(piece.size, dtype=torch.int64)
    for (module, target), labels in piece.members.items():
        tensor = spaces[module][target].target
        assert tensor is not None
        mine = labels[labels >= 0]
        total += torch.bincount(mine, minlength=piece.size) * (tensor.numel() // len(labels))
    return total


def masks_from(pieces: Sequence[MaskedGroup], kept: Sequence[Tensor], spaces: Spaces) -> Masks:
    """Return the masks of all targets: members and followers of the pieces, then what is aligned to them.

    A mask has the shape of its target, or of what broadcasts to it (``[C, 1, 1, 1]``), as NNI's own.
    """
    flat: dict[Key, Tensor] = {}
    for piece, keep in zip(pieces, kept, strict=True):
        for key in (*piece.members, *piece.followers):
            mine = piece.spread(key, keep.float(), 1.0)
            flat[key] = flat[key] * mine.to(flat[key].device) if key in flat else mine
    masks: Masks = {}
    for (module, target), values in flat.items():
        space = spaces.get(module, {}).get(target)
        if space is None or space.target is None:
            continue
        values = values.to(space.target.device)
        mask = values.view(metric_shape(space)) if len(values) == math.prod(metric_shape(space)) else values
        if space._scaler is not None and mask.numel() != space.target.numel():
            mask = space._scaler.expand(mask, list(space.target.shape), keepdim=True, full_expand=False)
        masks.setdefault(module, {})[target] = mask
    for module, targets in spaces.items():
        for target, space in targets.items():
            if space.align is not None and target not in masks.get(module, {}):
                along = _aligned(module, target, space, masks)
                if along is not None:
                    masks.setdefault(module, {})[target] = along
    return masks


def _aligned(module: str, target: str, space: Any, masks: Masks) -> Tensor | None:
    """Return a mask that follows another: it is 0 where all that it is aligned to is 0."""
    if space.type.value == "parameter" and space.target is None:
        return None
    source, attr = space.align["module_name"] or module, space.align["target_name"]
    if attr not in masks.get(source, {}):
        if space.align["module_name"] is None:
            return None  # its own layer is not pruned
        raise ConfigError(f"{module}.{target} is aligned to {source}.{attr}, which has no mask; prune that layer too")
    mask = masks[source][attr]
    dims = [d % mask.ndim for d in space.align["dims"]]
    away = [d for d in range(mask.ndim) if d not in dims]
    found = (mask.sum(away) if away else mask).bool().float()
    if space._scaler is None:
        return found
    if space.shape is None:
        raise ConfigError(
            f"the shape of {module}.{target} is not known: nothing has run through the wrapped model yet; give "
            "example_inputs=, or call pruner.track_forward(inputs) first"
        )
    wide = space._scaler.expand(found, space.shape)
    narrow = space._scaler.shrink(wide, keepdim=True).bool().float()
    return space._scaler.expand(narrow, space.shape, keepdim=True, full_expand=False)  # type: ignore[no-any-return]
