"""An NNI pruner that fails to be made leaves the model the same objects with the same content.

(Unwrapping is NNI's: it leaves equal parameters, but other objects.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("nni")

from singe_plugin.errors import SingeError
from singe_plugin.integrations.nni import SInGEPruner

from asked import asked
from fingerprint import assert_untouched, fingerprint
from nasty_nets import NASTY, batches_for
from test_untouched import ERRORS, Fault, failing

CONVS = [{"op_types": ["Conv2d"], "sparse_ratio": 0.4}]


def net_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NASTY[name]()
    net(torch.randn(3, 2, 8, 8))
    return net


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_pruner_that_fails_to_be_made_leaves_no_trace(error: Any, place: str) -> None:
    failed = 0
    for k in (0, 7, 20, 50):
        net = net_of("Nested")
        before = fingerprint(net)
        with failing(place, Fault(k, error)):
            try:
                SInGEPruner(net, CONVS, **asked(batches=batches_for(), example_inputs=torch.zeros(2, 2, 6, 6)))
            except (SingeError, *ERRORS):
                failed += 1
                assert_untouched(before, net, say=f"{place} {k}")
    assert failed or error is RuntimeError
