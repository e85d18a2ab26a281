"""What is inspected is what a run does: MACs of one example, and the passes of all batches."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import Tensor, nn

from singe_plugin import prune
from singe_plugin.app.inspection import inspect_model
from singe_plugin.loop.costs import count_macs

from asked import asked
from small_nets import Chain, images

X = images()[0][0]


class Pair(nn.Module):
    """Two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner(a + b)


@pytest.mark.parametrize("examples", [1, 2, 5])
@pytest.mark.parametrize("form", ["tensor", "tuple", "one in a tuple", "list", "dict"])
def test_macs_are_those_of_one_example(form: str, examples: int) -> None:
    x = X[:examples]
    model = Chain() if form in ("tensor", "one in a tuple") else Pair()
    inputs: Any = {"tensor": x, "tuple": (x, x), "one in a tuple": (x,), "list": [x, x], "dict": {"a": x, "b": x}}[form]
    found = inspect_model(model, inputs, **asked(finetune_steps=0, target="params=0.3"))
    assert found.macs == count_macs(Chain(), X[:1])


@pytest.mark.parametrize(
    "options",
    [{}, {"order": "layers"}, {"batches": 2}, {"rounds": 2}, {"criterion": "grad"}, {"criterion": "ig", "rounds": 3}],
)
def test_the_passes_that_are_printed_multiply_to_their_sum(options: dict[str, Any]) -> None:
    """And they are those that a run makes: a hook on the last layer, which every pass goes through, counts them."""
    model, passes = Chain(), []
    model.conv3.register_forward_hook(lambda _, __, output: passes.append(1) if output.requires_grad else None)
    prune(model, images(6), **asked(target="params=0.3", finetune_steps=0, verify=False, min_width=1, **options))
    text = inspect_model(Chain(), X, **asked(target="params=0.3", finetune_steps=7, **options)).text()
    numbers = re.search(r"(\d+) scorings of (\d+) passes on each of (\d+) batches = (\d+) forward", text)
    assert numbers is not None, text
    scorings, each, batches, total = map(int, numbers.groups())
    probing = re.search(r"(\d+) to see that F depends on every layer", text)
    more = 0 if probing is None else int(probing.group(1))
    assert scorings * each * batches == total
    assert f"{total + more + 7} passes in all" in text
    assert total + more == len(passes)
    assert bool(more) == (options.get("order") == "layers")
