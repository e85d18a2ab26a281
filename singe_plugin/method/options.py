"""How units are scored: every option of the method, with its check and its documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from singe_plugin.checks import check_choice, check_count, check_flag
from singe_plugin.errors import ConfigError
from singe_plugin.fields import documented, option
from singe_plugin.method.criteria import CRITERIA, Criterion, check_degree, get_criterion
from singe_plugin.method.objective import OBJECTIVES, Objective, ObjectiveLike, get_objective
from singe_plugin.method.path import QUADRATURES, DecayPath, decay_path
from singe_plugin.method.reduction import REDUCTIONS, NormalizerLike, check_normalizer, check_reduction

__all__ = ["AMP_DTYPES", "PATHS", "Scoring"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PATHS = ("layer", "neuron")
AUTO, _PAPER, _REPAIRED = "auto", "ig", "obs"  # the criterion: to be decided, and as what
_FOR_WEIGHTS = {"mu": 0.8, "nodes": 5, "batches": 1}
_IN_ROUNDS = {"mu": 0.9, "nodes": 1, "batches": 4}
_IN_LAYERS = {"mu": 0.9, "nodes": 5, "batches": 1}


class _Criteria:
    """The names of a criterion; more may be registered."""

    def __iter__(self) -> Iterator[str]:
        return iter((AUTO, *CRITERIA))


@documented
class Scoring:
    """How units are scored. A criterion's name stands for the scoring with that criterion.

    Raises:
        ConfigError: for a value that cannot mean anything.

    Example:
        >>> Scoring("ig", mu=0.95).passes
        5
    """

    criterion: str | Callable[..., Any] = option(
        default=AUTO,
        text="The criterion, see :mod:`singe_plugin.method.criteria`; :func:`singe_plugin.prune` also takes any "
        "torch-pruning importance. ``auto`` is ``obs`` where units go in rounds and the survivors are repaired, as "
        "`prune` does if nothing is said (docs/repair.md), and ``ig``, the paper's, everywhere else.",
        choices=_Criteria(),
    )
    p: float = option(
        default=2, text="The degree of the norms, at least 1; ``l1`` and ``l2`` have their own.", flag=("-p", "--norm")
    )
    mu: float | None = option(
        default=None,
        text="The decay rate of the path in Eq. 5, inside ]0, 1[. By default 0.9 (the paper's on ImageNet; 0.95 "
        "on CIFAR-10), and 0.8 for single weights (§4.1).",
    )
    steps: int | None = option(
        default=None,
        text="S of Eq. 5: how often the weights are decayed. By default until 1 % of them is left (quadrature "
        "gauss: to zero).",
    )
    quadrature: str = option(
        default="gauss",
        text="How the path is summed up: ``geometric`` is the paper's sum in S + 1 passes, ``gauss`` integrates "
        "the same function with Gauss-Legendre nodes.",
        choices=QUADRATURES,
    )
    path: str = option(
        default="layer",
        text="What decays together: ``layer`` is all units of a group, ``neuron`` each unit alone (Eq. 4 to the "
        "letter).",
        choices=PATHS,
    )
    objective: ObjectiveLike | None = option(
        default=None,
        text="F, which fine-tuning minimises, too: ``loss`` (cross-entropy, or the loss that the model computes "
        "from labels among its keywords), ``logit``, a function of outputs and targets that returns a scalar, or a "
        ":class:`~singe_plugin.BatchObjective` of the model and a batch. By default loss; NNI's pruner takes the "
        "evaluator's own.",
        choices=OBJECTIVES,
    )
    group_reduction: str = option(
        default="sum", text="How the scores of a unit in the layers of its group become one.", choices=REDUCTIONS
    )
    normalizer: NormalizerLike = option(
        default=None,
        text="What a group's scores are divided by: one of torch-pruning's names, or a function.",
        command=False,
    )
    nodes: int | None = option(
        default=None,
        text="How many nodes the quadrature gauss has, each a pass for every batch and layer. By default 1 in "
        "rounds of units, where images are worth more than nodes (docs/results.md), else 5.",
    )
    unit_batch: int = option(
        default=16,
        text="How many units the path neuron evaluates at once; 1 does without ``torch.func``, which not every "
        "model supports.",
    )
    amp: str | None = option(
        default=None,
        text="Mixed precision. By default none in scoring, unless a surrounding ``torch.autocast`` says so, and "
        "bf16 in fine-tuning on CUDA; ``obs`` has none.",
        choices=AMP_DTYPES,
    )
    channels_last: bool = option(default=False, text="Whether batches of images are converted to that memory format.")
    batches: int | None = option(
        default=None,
        text="How many batches every scoring of prune and prune_weights reads: drawn once from a dataset, the "
        "first ones of a loader or list. By default 4 in rounds of units, else 1 (as the paper). What is "
        "handed batches itself, an importance or a pruner, reads all of them; NNI's pruner the latest of its "
        "training loop.",
        flag="--scoring-batches",
    )
    batch_size: int = option(
        default=64, text="How many examples of a dataset a scoring batch has.", flag="--scoring-batch-size"
    )

    def __post_init__(self) -> None:
        if isinstance(self.criterion, type):
            raise ConfigError(f"criterion={self.criterion.__name__} is a class; call it: {self.criterion.__name__}()")
        if not callable(self.criterion) and self.criterion != AUTO:
            get_criterion(self.criterion)
        check_degree(self.p)
        check_reduction(self.group_reduction)
        check_normalizer(self.normalizer)
        if self.objective is not None:
            get_objective(self.objective)
        check_choice("path", self.path, PATHS)
        check_choice("amp", self.amp, (*AMP_DTYPES, None))
        check_count("unit_batch", self.unit_batch, 1, "number of units")
        check_count("batch_size", self.batch_size, 1)
        check_flag("channels_last", self.channels_last)
        if self.batches is not None:
            check_count("batches", self.batches, 1)
        if not callable(self.criterion):
            _ = self.decay_path

    @classmethod
    def fast(cls) -> Scoring:
        r"""The cheapest scoring by gradients: :math:`|\langle W^n,\nabla_{W^n}F\rangle|`, where the path begins.

        It is ``ig_abs`` with its one node at u = 1, so that one pass of each of 16 batches gives the scores of all
        layers. [performance.md](performance.md) has what it costs.

        Example:
            >>> fast = Scoring.fast()
            >>> fast.criterion, fast.decay_path.scales.tolist(), fast.batches
            ('ig_abs', [1.0], 16)
        """
        return cls("ig_abs", steps=0, quadrature="geometric", batches=16)

    def settle(self, order: str = "layers", weights: bool = False, repaired: bool = False) -> Scoring:
        """These options with everything decided, for a pruning in some order, of units or of single weights.

        Args:
            order: in which units or weights go.
            weights: whether it is of single weights.
            repaired: whether what is left is solved again.

        Example:
            >>> settled = Scoring(mu=0.95).settle("rounds")
            >>> settled.mu, settled.nodes, settled.batches, settled.objective
            (0.95, 1, 4, 'loss')
        """
        usual = _FOR_WEIGHTS if weights else _IN_ROUNDS if order == "rounds" else _IN_LAYERS
        usual_: dict[str, Any] = {**usual, "objective": "loss"}
        found = {name: value for name, value in usual_.items() if getattr(self, name) is None}
        if self.criterion == AUTO:
            found["criterion"] = _REPAIRED if repaired and order == "rounds" and not weights else _PAPER
        return replace(self, **found)

    @property
    def function(self) -> Objective:
        """F as a function of outputs and targets."""
        return get_objective("loss" if self.objective is None else self.objective)

    @property
    def rule(self) -> Criterion:
        """The criterion object.

        Raises:
            ConfigError: for a torch-pruning importance, which is none.
        """
        if not isinstance(self.criterion, str):
            raise ConfigError(
                f"{type(self.criterion).__name__} is no criterion but an importance of its own; give one of "
                f"{', '.join(CRITERIA)}, or give it to singe_plugin.prune or SInGEPruner"
            )
        return get_criterion(_PAPER if self.criterion == AUTO else self.criterion)

    @property
    def degree(self) -> float:
        """The degree of the norms: the criterion's own, or ``p``."""
        own = self.rule.degree
        return float(self.p) if own is None else own

    @property
    def decay_path(self) -> DecayPath:
        """The nodes that are visited; one at u = 1 for criteria without a path."""
        rule, mu = self.rule, _IN_LAYERS["mu"] if self.mu is None else self.mu
        nodes = int(_IN_LAYERS["nodes"]) if self.nodes is None else self.nodes
        found = decay_path(mu, self.steps, self.quadrature, nodes, rule.measure)
        return found if rule.needs_path else decay_path(mu, 0, "geometric")

    @property
    def at_start(self) -> bool:
        """Whether all that is measured is measured where the path begins, so that a pass gives it for many layers."""
        rule = self.rule
        return rule.needs_gradient and not rule.of_readers and self.path == "layer" and self.decay_path.is_start

    @property
    def passes(self) -> int:
        """Forward-and-backward passes per batch and group (per unit, for ``path="neuron"``)."""
        return self.decay_path.nodes if self.rule.needs_gradient else 0
