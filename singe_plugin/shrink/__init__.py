"""Masked models made smaller, whoever made the masks: this package, ``torch.nn.utils.prune``, or NNI.

:func:`shrink` removes what is masked, if that leaves the function as it is; :func:`shrink_with_report` also says what
is still masked, and why.
"""

from .report import ShrinkResult
from .shrinker import shrink, shrink_with_report

__all__ = ["ShrinkResult", "shrink", "shrink_with_report"]
