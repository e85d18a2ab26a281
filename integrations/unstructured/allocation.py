"""How many weights go from each layer, and which: over all layers, per layer, within a pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from singe_plugin.errors import BudgetError, ConfigError
from singe_plugin.loop.loop import lowest

from .host import WeightHost
from .patterns import Pattern

__all__ = ["RATIOS", "Allocation", "layer_ratios", "lowest_counts"]

RATIOS = ("global", "uniform")


def layer_ratios(names: Sequence[str], ratios: Mapping[str, float]) -> dict[str, float]:
    """One ratio per layer: its own, or that of the innermost module it is in; 0 for all others.

    Raises:
        ConfigError: for names that are no layer and hold none.

    Example:
        >>> layer_ratios(["a.0", "a.1", "b"], {"a": 0.5, "a.1": 0.9})
        {'a.0': 0.5, 'a.1': 0.9, 'b': 0.0}
    """
    known = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    unknown = [name for name in ratios if name not in known]
    if unknown:
        raise ConfigError(
            f"ratios names {unknown}, which are no pruned layers and hold none; the layers are {', '.join(names)}"
        )
    found = {}
    for name in names:
        parts = name.split(".")
        mine = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        found[name] = next((float(ratios[key]) for key in mine if key in ratios), 0.0)
    return found


def lowest_counts(pools: Sequence[Tensor], count: int, caps: Sequence[int] | None = None) -> list[int]:
    """How many of each pool are among the ``count`` lowest of all; equal scores are taken from all in proportion.

    Args:
        pools: scores, ``[n]`` each.
        count: at most as many as there are.
        caps: the most that each pool gives; its highest scores are not counted then.

    Example:
        >>> pools = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, 5.0, 3.0])]
        >>> lowest_counts(pools, 3), lowest_counts(pools, 3, caps=[2, 1])
        ([1, 2], [2, 1])
    """
    most = [len(pool) for pool in pools] if caps is None else list(caps)
    counts = [0] * len(pools)
    free = list(range(len(pools)))
    while free:
        found = _lowest([pools[i] for i in free], min(count - sum(counts), sum(len(pools[i]) for i in free)))
        full = [i for i, n in zip(free, found, strict=True) if n > most[i]]
        if not full:
            for i, n in zip(free, found, strict=True):
                counts[i] = n
            break
        for i in full:  # it is full in the end, too: what it does not give raises the cut for the others
            counts[i] = most[i]
            free.remove(i)
    return counts


def _lowest(pools: Sequence[Tensor], count: int) -> list[int]:
    if count <= 0:
        return [0] * len(pools)
    cut = torch.cat(list(pools)).kthvalue(count).values
    below = [int((pool < cut).sum()) for pool in pools]
    ties = [int((pool == cut).sum()) for pool in pools]
    rest, total = count - sum(below), sum(ties)
    shares = [rest * tie // total for tie in ties]
    by_remainder = sorted(range(len(pools)), key=lambda i: (-(rest * ties[i] % total), i))
    for i in by_remainder[: rest - sum(shares)]:
        shares[i] += 1
    return [b + s for b, s in zip(below, shares, strict=True)]


class Allocation:
    """Turns scores into numbers of weights to remove, and those into weights.

    Args:
        host: the layers, and what is masked already.
        sparsity: the fraction to mask in the end, of the weights of all its layers; None is what the pattern needs.
        ratios: ``"global"`` ranks the weights of all layers together, ``"uniform"`` masks the same fraction of each, a
            dict has one fraction per layer.
        pattern: a hard constraint; what it has no place for goes first.
        max_pruning_ratio: the largest fraction of one layer; at least one weight stays.
        removed: what an unfinished run has removed so far.

    Raises:
        ConfigError: if the pattern needs more than ``sparsity`` or ``max_pruning_ratio`` allow.
        BudgetError: if ``max_pruning_ratio`` leaves too little to mask.
    """

    def __init__(
        self,
        host: WeightHost,
        sparsity: float | None,
        ratios: str | Mapping[str, float] = "global",
        pattern: Pattern | None = None,
        max_pruning_ratio: float = 1.0,
        removed: Mapping[str, int] | None = None,
    ) -> None:
        self.host, self.pattern = host, pattern
        self.sizes = {name: host.size(name) for name in host.by_name}
        self.floors = {n: max(1, math.ceil(size * (1 - max_pruning_ratio) - 1e-9)) for n, size in self.sizes.items()}
        masked = self._masked()
        self.start = {name: masked[name] - (removed or {}).get(name, 0) for name in self.sizes}
        needed = {name: masked[name] + self._surplus(name) for name in self.sizes}
        tight = [n for n in needed if needed[n] > max(self.sizes[n] - self.floors[n], masked[n])]
        if pattern is not None and tight:
            raise ConfigError(
                f"max_pruning_ratio={max_pruning_ratio:g} keeps {self.floors[tight[0]]} of the "
                f"{self.sizes[tight[0]]} weights of layer {tight[0]!r}, but the pattern {pattern} masks "
                f"{needed[tight[0]]} of them; raise it to at least {pattern.sparsity:g}"
            )
        self.targets = self._targets(sparsity, ratios, needed, masked)

    def _targets(
        self, sparsity: float | None, ratios: str | Mapping[str, float], needed: dict[str, int], masked: dict[str, int]
    ) -> dict[str, int] | int:
        """How many weights are masked in the end, per layer or in all."""
        if ratios == "global":
            weights = sum(self.sizes.values())
            total = sum(needed.values()) if sparsity is None else round(sparsity * weights)
            most = sum(max(self.sizes[n] - self.floors[n], masked[n]) for n in self.sizes)
            if total - most > len(self.sizes):  # less is the last weight of each layer
                raise BudgetError(
                    f"sparsity={sparsity:g} cannot be reached: max_pruning_ratio leaves {most} of {weights} weights to "
                    f"mask; choose at most {math.floor(1e4 * most / weights) / 1e4:g}, or raise max_pruning_ratio"
                )
            return max(min(total, most), sum(needed.values()))
        if isinstance(ratios, str):
            each = dict.fromkeys(self.sizes, sparsity)
        else:
            each = {name: ratio or None for name, ratio in layer_ratios(list(self.sizes), ratios).items()}
        wanted = {n: 0 if r is None else round(r * self.sizes[n]) for n, r in each.items()}
        return {n: max(min(wanted[n], self.sizes[n] - self.floors[n]), needed[n]) for n in self.sizes}

    def __call__(self, scores: Mapping[str, Tensor], share: float) -> dict[str, int]:
        """See :data:`singe_plugin.loop.loop.Allocation`."""
        masked = self._masked()
        if isinstance(self.targets, int):
            start = sum(self.start.values())
            return self._over_all(scores, round(start + share * (self.targets - start)) - sum(masked.values()))
        return {
            name: max(0, round(self.start[name] + share * (target - self.start[name])) - masked[name])
            for name, target in self.targets.items()
        }

    def plan(self, scores: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """What is removed from each layer in the end; over all layers, this needs their scores."""
        return self(scores or {}, 1.0)

    @property
    def needs_scores(self) -> bool:
        """Whether :meth:`plan` does."""
        return isinstance(self.targets, int)

    def choose(self, layer: str, scores: Tensor, count: int) -> Tensor:
        """The lowest scores, those first that the pattern has no place for."""
        if self.pattern is None:
            return lowest(layer, scores, count)
        surplus = self.host.surplus(layer, scores, self.pattern)
        first, rest = surplus.nonzero().flatten(), (~surplus).nonzero().flatten()
        if count <= len(first):
            return first[lowest(layer, scores[first], count)]
        return torch.cat([first, rest[lowest(layer, scores[rest], count - len(first))]]).sort().values

    def _over_all(self, scores: Mapping[str, Tensor], count: int) -> dict[str, int]:
        """The lowest of all layers: first of what the pattern has no place for, then of the rest."""
        pools = list(scores.values())
        caps = [max(len(values) - self.floors[name], 0) for name, values in scores.items()]
        if self.pattern is None:
            return dict(zip(scores, lowest_counts(pools, count, caps), strict=True))
        surplus = [self.host.surplus(name, values, self.pattern) for name, values in scores.items()]
        first = [values[extra] for values, extra in zip(pools, surplus, strict=True)]
        forced = [len(values) for values in first]
        if count <= sum(forced):
            return dict(zip(scores, lowest_counts(first, count), strict=True))
        rest = [values[~extra] for values, extra in zip(pools, surplus, strict=True)]
        caps = [max(cap - n, 0) for cap, n in zip(caps, forced, strict=True)]
        more = lowest_counts(rest, count - sum(forced), caps)
        return {name: f + m for name, f, m in zip(scores, forced, more, strict=True)}

    def _masked(self) -> dict[str, int]:
        return {name: size - self.host.left(name) for name, size in self.sizes.items()}

    def _surplus(self, layer: str) -> int:
        """How many weights of a layer the pattern has no place for."""
        if self.pattern is None:
            return 0
        counts = self.pattern.counts(self.host.masks[layer].mask, self.host.by_name[layer])
        return int((counts - self.pattern.keep).clamp(min=0).sum())
