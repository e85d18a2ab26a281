"""What a user may ask of the pruner: each check says what was given, and what would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from singe_plugin.errors import ConfigError
from singe_plugin.scoring import ScoringOptions

from .allocation import SCOPES, Scope
from .patterns import Pattern

__all__ = ["DEFAULT_ROUNDS", "DEFAULT_SPARSITY", "PAPER_MU", "check_amount", "scoring_options"]

DEFAULT_SPARSITY = 0.9
DEFAULT_ROUNDS = 10
PAPER_MU = 0.8


def scoring_options(scoring: ScoringOptions | None, options: Mapping[str, Any]) -> ScoringOptions:
    """The options that were given, as an object or field by field; mu is the paper's for single weights (§4.1)."""
    known = [field.name for field in fields(ScoringOptions)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; options of the scoring are {', '.join(known)}")
    if scoring is not None and options:
        raise ConfigError(f"scoring and {next(iter(options))!r} were both given; put the option into scoring")
    return scoring if scoring is not None else ScoringOptions(**{"mu": PAPER_MU, **options})


def check_amount(
    sparsity: Any, scope: Any, pattern: Pattern | None, max_sparsity: Any
) -> tuple[float | None, Scope, float]:
    """Check how much is to be masked, and where."""
    if not _is_fraction(max_sparsity) or max_sparsity == 0:
        raise ConfigError(f"max_sparsity={max_sparsity!r} is not a fraction inside ]0, 1]")
    if isinstance(scope, Mapping):
        if sparsity is not None:
            raise ConfigError(
                f"sparsity={sparsity!r} and a scope with a ratio per layer were both given; leave one out"
            )
        ratios = {f"scope[{name!r}]": ratio for name, ratio in scope.items()}
    elif scope not in SCOPES:
        raise ConfigError(f"unknown scope {scope!r}; choose one of {', '.join(SCOPES)} or give {{layer: ratio}}")
    else:
        sparsity = DEFAULT_SPARSITY if sparsity is None and pattern is None else sparsity
        ratios = {} if sparsity is None else {"sparsity": sparsity}
    for name, ratio in ratios.items():
        if not _is_fraction(ratio) or ratio == 1:
            raise ConfigError(f"{name}={ratio!r} is not a fraction of weights inside [0, 1[")
        if pattern is not None and 0 < ratio < pattern.sparsity - 1e-9:
            raise ConfigError(
                f"{name}={ratio:g} is less than the {pattern.sparsity:g} that the pattern {pattern} masks; leave it "
                "out, or give more"
            )
        if scope != "global" and ratio > max_sparsity:
            raise ConfigError(f"{name}={ratio:g} is more than max_sparsity={max_sparsity:g}; raise that")
    return sparsity, dict(scope) if isinstance(scope, Mapping) else scope, float(max_sparsity)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
