"""What is to go: a fraction of the parameters, MACs or latency, or of several of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from singe_plugin.errors import ConfigError
from singe_plugin.loop.costs import ALL, KINDS, LATENCY, check_kind
from singe_plugin.loop.times import Timing

__all__ = ["Target", "points"]


@dataclass(frozen=True)
class Target:
    """A fraction of the parameters, MACs or latency to remove, or several of these, which are met together.

    Attributes:
        kind: what is counted; ``"all"`` for several.
        fraction: what is to go of it; the largest of several.
        parts: the targets that are met together: at least, and one of them exactly.
        timing: with what the latency is measured, a target or not.

    Example:
        >>> Target.parse("params=0.5").fraction, str(Target.parse("macs=0.3, latency=0.5"))
        (0.5, 'macs=0.3,latency=0.5')
    """

    kind: str
    fraction: float
    parts: tuple[Target, ...] = ()
    timing: Timing | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            check_kind(self.kind)

    def __str__(self) -> str:
        return ",".join(map(str, self.parts)) or f"{self.kind}={self.fraction:g}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is counted."""
        return tuple(part.kind for part in self.parts) or (self.kind,)

    @property
    def is_of_speed(self) -> bool:
        """Whether it counts what makes networks slow, and not only what makes them large.

        Example:
            >>> Target("macs", 0.5).is_of_speed, Target("params", 0.5).is_of_speed
            (True, False)
        """
        return any(kind in ("macs", LATENCY) for kind in self.kinds)

    @property
    def point(self) -> float:
        """How far off it is still met, in what is removed of the whole."""
        if not self.parts:
            return KINDS[self.kind].point
        return max(part.point * self.fraction / part.fraction for part in self.parts)

    def said(self, reached: float) -> str:
        """What a removed fraction is in the words of the target.

        Example:
            >>> Target("macs", 0.5).said(0.25), Target.parse("macs=0.5,params=0.3").said(0.25)
            ('macs=0.2500', 'macs=0.2500,params=0.1500')
        """
        parts = self.parts or (self,)
        return ",".join(f"{part.kind}={part.fraction * reached / self.fraction:.4f}" for part in parts)

    @classmethod
    def parse(cls, text: str | Target, timing: Timing | None = None) -> Target:
        """Read ``"params=0.5"``, ``"macs=0.3"``, ``"latency=0.3"``, or several with commas between them.

        Args:
            text: the target; one that is read already stays what it is.
            timing: with what the latency is measured.

        Raises:
            ConfigError: for another form, a fraction outside ]0, 1[, or a kind that comes twice.
        """
        if isinstance(text, Target):
            parts = [cls._read(text, str(part)) for part in text.parts or (text,)]
            timing = timing or text.timing
        else:
            parts = [cls._read(text, part) for part in (text.split(",") if isinstance(text, str) else [text])]
        if len({part.kind for part in parts}) < len(parts):
            raise ConfigError(f"target={str(text)!r} says one kind twice; give each once")
        if len(parts) == 1:
            return replace(parts[0], timing=timing)
        return cls(ALL, max(part.fraction for part in parts), tuple(parts), timing)

    @classmethod
    def _read(cls, whole: object, text: object) -> Target:
        kind, _, number = text.partition("=") if isinstance(text, str) else ("", "", "")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        if (kind := kind.strip()) and not math.isnan(fraction):
            check_kind(kind)
        if kind not in KINDS or not 0 < fraction < 1:
            shown = str(whole) if isinstance(whole, Target) else whole
            raise ConfigError(
                f"target={shown!r} is not a target; give the fraction to remove, inside ]0, 1[, as 'params=0.5', "
                "'macs=0.5' or 'latency=0.3', or several with commas"
            )
        return cls(kind, fraction)


def points(target: Target) -> str:
    """How far off a target is still met, as messages say it.

    Example:
        >>> points(Target("macs", 0.5)), points(Target("latency", 0.5))
        ('one point', '3 points')
    """
    number = round(100 * target.point)
    return "one point" if number == 1 else f"{number} points"
