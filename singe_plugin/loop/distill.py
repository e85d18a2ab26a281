"""Whether and how fine-tuning learns from a teacher: what can be said about it."""

from __future__ import annotations

import math

from torch import nn

from singe_plugin.checks import check_choice, check_number
from singe_plugin.fields import documented, option

__all__ = ["TEACHERS", "Distill"]

TEACHERS = ("unpruned", "auto")


@documented
class Distill:
    r"""How fine-tuning learns from a teacher. A name or a module stands for the distillation from that teacher.

    Its logits add a term to the loss L of fine-tuning (Hinton, Vinyals and Dean 2015; see
    :mod:`singe_plugin.loop.distillation`):

    .. math::
        (1-w)\,L+w\,T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(z^\text{teacher}/T)\,\|\,\mathrm{softmax}(z/T)\bigr)

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> Distill("auto", temperature=2.0)
        Distill(teacher='auto', temperature=2.0, weight=0.9)
    """

    teacher: nn.Module | str = option(
        is_object=True,
        named=True,
        default="unpruned",
        text="Whose logits are learned from: ``unpruned``, those of the network before pruning (a copy); a module's, "
        "which is in eval mode meanwhile; ``auto``, which is ``unpruned`` if the model classifies (F is a "
        "cross-entropy, and the outputs are a tensor with two classes or more), else nobody's.",
        choices=TEACHERS,
        command=False,
    )
    temperature: float = option(
        default=4.0,
        text="The temperature T that the logits of both are divided by, in what is learned from the teacher.",
        flag="--distill-temperature",
    )
    weight: float = option(
        default=0.9,
        text="The share w of the loss that the teacher has; 1 leaves the targets out.",
        flag="--distill-weight",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            check_choice("teacher", self.teacher, TEACHERS, ", or give a module")
        check_number("temperature", self.temperature, 0, math.inf, "][", "temperature: a number")
        check_number("weight", self.weight, 0, 1, "]]", "share of the loss; distill=None has none: a number")
