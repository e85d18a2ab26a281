"""Whether and how fine-tuning learns from a teacher: what can be said about it."""

from __future__ import annotations

import math

from torch import nn

from singe_plugin.checks import check_choice, check_number
from singe_plugin.errors import ConfigError
from singe_plugin.fields import documented, option

__all__ = ["TEACHERS", "Distill", "read_names"]

TEACHERS = ("unpruned", "auto")


def read_names(text: str) -> tuple[str, ...]:
    """Names with commas in between, from a text.

    Example:
        >>> read_names("layer2, layer3")
        ('layer2', 'layer3')
    """
    return tuple(name.strip() for name in text.split(","))


@documented
class Distill:
    r"""How fine-tuning learns from a teacher. A name or a module stands for the distillation from that teacher.

    Its logits add a term to the loss L of fine-tuning (Hinton, Vinyals and Dean 2015; see
    :mod:`singe_plugin.loop.distillation`):

    .. math::
        (1-w)\,L+w\,T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(z^\text{teacher}/T)\,\|\,\mathrm{softmax}(z/T)\bigr)
        +\frac v{|M|}\sum_{m\in M}\frac{\operatorname{mean}\bigl((h_m-h_m^\text{teacher})^2\bigr)}
        {\operatorname{mean}\bigl((h_m^\text{teacher})^2\bigr)}

    The last term is there if modules M are named as ``features``: h are their outputs, the teacher's at the units that
    are left (see :mod:`singe_plugin.loop.features`), and v is the ``feature_weight``. A batch without targets has no L,
    and w is 1 for it.

    Raises:
        ConfigError: for values that cannot mean anything.

    Example:
        >>> Distill("auto", temperature=2.0).temperature
        2.0
        >>> Distill(features=["layer2", "layer3"]).features
        ('layer2', 'layer3')
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
    features: tuple[str, ...] | None = option(
        default=None,
        text="The names of modules whose outputs are learned from, too, at the units that are left, e.g. ``layer2`` "
        "and ``layer3``. A teacher that is a module has modules of the same names and widths.",
        flag="--distill-features",
        read=read_names,
        metavar="NAME,NAME,...",
    )
    feature_weight: float = option(
        default=1.0,
        text="The weight v of the features' relative error, which is added to the loss.",
        flag="--distill-feature-weight",
    )

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            check_choice("teacher", self.teacher, TEACHERS, ", or give a module")
        check_number("temperature", self.temperature, 0, math.inf, "][", "temperature: a number")
        check_number("weight", self.weight, 0, 1, "]]", "share of the loss; distill=None has none: a number")
        check_number("feature_weight", self.feature_weight, 0, math.inf, "][", "weight of the features: a number")
        if self.features is not None:
            object.__setattr__(self, "features", _names(self.features))
        elif self.feature_weight != 1:
            raise ConfigError(
                f"feature_weight={self.feature_weight!r} is the weight of features, and none are named; give features, "
                "too"
            )


def _names(given: object) -> tuple[str, ...]:
    """Names of modules, one or several."""
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, (list, tuple)) else ()
    wrong = [name for name in names if not (isinstance(name, str) and name) or names.count(name) > 1]
    if wrong or not names:
        raise ConfigError(
            f"features={given!r} are no names of modules, each given once; give e.g. features=('layer2', 'layer3'), or "
            "None for none"
        )
    return names
