"""Every error that this package raises on purpose.

One base class, so that ``except SingeError`` catches them all. Each message names the layer, the shape
or value that was met, and what to do about it. The subclasses also derive from the built-in exception that
Python users expect (``ValueError`` for a bad argument, ``RuntimeError`` for work that failed).
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BudgetError",
    "ConfigError",
    "DataError",
    "FoldingError",
    "GroupError",
    "MissingPackageError",
    "RankError",
    "RemovalError",
    "ScoringError",
    "SingeError",
    "TiedParameterError",
    "is_of_the_machine",
]


class SingeError(Exception):
    """Base class of all errors raised by singe_plugin."""


class ConfigError(SingeError, ValueError):
    """An option has a value that cannot mean anything (unknown criterion, p < 1, a ratio of 1, ...)."""


class DataError(SingeError, ValueError):
    """The batches are missing, empty, or do not have the form ``(inputs, targets)``."""


class ScoringError(SingeError, RuntimeError):
    """The path could not be walked: a non-finite objective, a forward that failed, no gradient."""


class TiedParameterError(SingeError, ValueError):
    """A unit's weights are shared with another layer, so they cannot be decayed or removed alone."""


class FoldingError(SingeError, RuntimeError):
    """A batch-norm cannot be folded into the layer in front of it."""


class GroupError(SingeError, RuntimeError):
    """A group of coupled layers is not understood well enough to be scored or pruned."""


class MissingPackageError(SingeError, ImportError):
    """A package that only a part of this one needs is not installed; the message says how to install it."""


class BudgetError(SingeError, ValueError):
    """The target cannot be met; the message says what the nearest reachable one is."""


class RankError(SingeError, RuntimeError):
    """One of several processes that prune together failed, is gone, or computed something else than the others."""


class RemovalError(SingeError, RuntimeError):
    """Removing units failed; the model was rolled back to what it was before."""


class ArtifactError(SingeError, RuntimeError):
    """A saved result or checkpoint is missing, damaged, or belongs to another model."""


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says something about the machine (no memory, a broken disk), and nothing about a model.

    Example:
        >>> is_of_the_machine(MemoryError()), is_of_the_machine(ValueError("shapes"))
        (True, False)
    """
    if isinstance(error, (MemoryError, OSError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # PyTorch has no class for it
