"""What every operator does to the axes of its operands: one small function per family of operators."""

from . import elements, norms, places, products, views  # noqa: F401 - registers their rules
from .base import RULES, opaque, rule
from .elements import pointwise
from .norms import LOSSES

__all__ = ["LOSSES", "RULES", "opaque", "pointwise", "rule"]
