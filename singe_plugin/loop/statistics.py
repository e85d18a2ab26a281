r"""Batch-norm is brought along: statistics of the network as it is now, and the same function.

A network whose weights were solved gives its batch-norms other inputs than their running statistics say. New
statistics alone would change what it computes, and the old ones would be lost at the first step of training. So both
change together:

.. math:: \gamma'=\gamma\,\frac{\sigma_\text{new}}{\sigma_\text{old}},\qquad
          \beta'=\beta+\gamma\,\frac{m_\text{new}-m_\text{old}}{\sigma_\text{old}},\qquad
          \sigma=\sqrt{v+\varepsilon}

In eval mode the network is the same to rounding, and train mode starts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from singe_plugin.method.ridge import exact
from singe_plugin.nested import call_model
from singe_plugin.ranks import Division, current
from singe_plugin.state import plain_layers, preserved

__all__ = ["renew_statistics"]


@dataclass
class _Sums:
    """Of what a batch-norm got, per channel."""

    count: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, x: Tensor) -> None:
        x = exact(x.detach())
        dims = [d for d in range(x.ndim) if d != 1]
        self.count += x.numel() // max(x.shape[1], 1)
        self.total = self.total + x.sum(dims)
        self.squares = self.squares + x.square().sum(dims)


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] = call_model,
    but: Collection[str] = (),
) -> list[str]:
    """Give batch-norms the mean and variance of what they get now, without changing what the model computes.

    Those with learned scale and shift and running statistics change; others cannot without changing the function.

    Args:
        model: the model; the modes of its modules stay.
        batches: inputs.
        forward: how the model is called with them.
        but: the names of those that stay as they are.

    Returns:
        the names of those that changed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> x = torch.randn(64, 2)
        >>> before = net(x)
        >>> renew_statistics(net, [x])
        ['1']
        >>> bool(torch.allclose(net(x), before, atol=1e-5)), bool(torch.allclose(net.train()(x), before, atol=0.1))
        (True, True)
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and name not in but
        and all(isinstance(getattr(module, n), Tensor) for n in ("weight", "bias", "running_mean", "running_var"))
    }
    sums: dict[nn.Module, _Sums] = {}

    def see(module: nn.Module, args: Any) -> None:
        sums.setdefault(module, _Sums()).add(args[0])

    with preserved(model), plain_layers(model):
        model.eval()
        for module in norms.values():
            module.register_forward_pre_hook(see)
        division = Division()
        for number, inputs in enumerate(batches):
            if not number:
                division = current().division(inputs)
            if number in division:
                forward(model, inputs)
    if current().world > 1:
        sums = {module: _of_all(module, sums.get(module, _Sums())) for module in norms.values()}
    changed = []
    for name, module in norms.items():
        found = sums.get(module)
        if found is None or found.count < 2:
            continue
        mean = found.total / found.count
        variance = (found.squares / found.count - mean**2).clamp(min=0) * (found.count / (found.count - 1))
        if bool(torch.isfinite(mean).all() & torch.isfinite(variance).all()):
            _renew(module, mean, variance)
            changed.append(name)
    return changed


def _of_all(norm: Any, mine: _Sums) -> _Sums:
    """What a batch-norm got on all ranks."""
    none, count = torch.zeros_like(exact(norm.running_mean)), exact(norm.running_mean).new_tensor(float(mine.count))
    total, squares = mine.total + none, mine.squares + none
    count, total, squares = current().add_up("statistics", [count, total, squares])
    return _Sums(round(float(count)), total, squares)


def _renew(norm: Any, mean: Tensor, variance: Tensor) -> None:
    old = (exact(norm.running_var) + norm.eps).sqrt()
    new = (variance + norm.eps).sqrt()
    norm.bias.data.copy_(exact(norm.bias) + exact(norm.weight) * (mean - exact(norm.running_mean)) / old)
    norm.weight.data.copy_(exact(norm.weight) * new / old)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
