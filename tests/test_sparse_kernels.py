"""2:4 weights become packed ones where PyTorch has kernels for them; elsewhere it is said that nothing gets faster."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singe_plugin import ConfigError, hold_masks
from singe_plugin.integrations.unstructured import prune_weights, semi_structured, use_sparse_kernels
from singe_plugin.integrations.unstructured.semi_structured import multiples, sort_layers

from small_nets import assert_same_values, values_of


def sparse(layer: nn.Linear) -> nn.Linear:
    """The two largest of every four weights stay."""
    with torch.no_grad():
        blocks = layer.weight.view(-1, 4)
        blocks.scatter_(1, blocks.abs().argsort(1)[:, :2], 0.0)
    return layer


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(sparse(nn.Linear(128, 64)), nn.ReLU(), sparse(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 10))


class Many(nn.Module):
    """Every reason to stay dense."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.full = sparse(nn.Linear(128, 64)), nn.Linear(128, 64)
        self.narrow, self.single = sparse(nn.Linear(128, 20)), sparse(nn.Linear(128, 64))
        self.held, self.conv = nn.Linear(128, 64), nn.Conv2d(128, 64, 1)
        self.words, self.head = nn.Embedding(64, 128), sparse(nn.Linear(128, 64))
        self.attention = nn.MultiheadAttention(128, 2)
        self.words.weight = self.head.weight
        self.half()
        self.single.float()
        hold_masks(self, {"held.weight": torch.ones(64, 128, dtype=torch.bool)})


def test_which_layers_fit_and_why_the_others_do_not() -> None:
    fitting, left = sort_layers(Many())
    rows, columns = multiples(torch.float16)
    assert 64 % rows == 128 % columns == 0
    assert 20 % rows
    assert fitting == ["right"]
    assert left == {
        "full": "more than two of some four consecutive weights are not zero: it has no 2:4 pattern",
        "narrow": f"its weight is 20 x 128; the kernels need multiples of {rows} x {columns}",
        "single": "its weights are float32; the kernels take float16 and bfloat16, model.half() converts it",
        "held": "its mask is held; make it permanent first, singe_plugin.masks.fold_masks(model)",
        "conv": "it is a Conv2d, and PyTorch has 2:4 kernels for linear layers only",
        "head": "its weight is 'words.weight', too",
        "attention.out_proj": "it is a NonDynamicallyQuantizableLinear, whose weight may be read by other code",
    }


def test_on_a_cpu_it_is_said_that_nothing_gets_faster() -> None:
    model = mlp().half()
    before = values_of(model)
    with pytest.raises(ConfigError, match=r"on cpu, where zeros make nothing faster.*remove units instead"):
        use_sparse_kernels(model, torch.randn(4, 128).half())
    assert_same_values(model, before)


def test_an_older_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    with pytest.raises(ConfigError, match=r"T4 has compute capability 7\.5, and 2:4 kernels need 8\.0"):
        semi_structured.check_device(torch.device("cuda:0"))


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the kernels: no device is asked for, and packing copies."""
    monkeypatch.setattr(semi_structured, "check_device", lambda device: None)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())


@pytest.mark.usefixtures("anywhere")
def test_weights_are_replaced_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp().to(torch.bfloat16), torch.randn(4, 128).to(torch.bfloat16)
    before, objects = values_of(model), list(model.parameters())
    done = use_sparse_kernels(model, x)
    assert (done.layers, list(done.left), done.difference) == (["0", "2"], ["4"], 0.0)
    assert "dense: 4: " in str(done)
    assert [a is b for a, b in zip(model.parameters(), objects)] == [False, True, False, True, True, True]
    assert_same_values(model, before)

    def wrong(weight: Tensor) -> Tensor:
        return 2 * weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", wrong)
    other = mlp().half()
    objects = list(other.parameters())
    with pytest.raises(ConfigError, match=r"the outputs differ by .* and 0\.01 is allowed; nothing was changed"):
        use_sparse_kernels(other, x.half())
    assert all(a is b for a, b in zip(other.parameters(), objects, strict=True))


@pytest.mark.usefixtures("anywhere")
def test_a_layer_that_pytorch_does_not_pack_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(weight: Tensor) -> Tensor:
        if weight.shape[1] == 128:
            raise RuntimeError("cuSPARSELt not supported on your machine.\nmore")
        return weight.clone()

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", picky)
    done = use_sparse_kernels(mlp().half(), torch.randn(4, 128).half())
    assert done.layers == ["2"]
    assert done.left["0"] == "PyTorch does not pack it (cuSPARSELt not supported on your machine.)"
    with pytest.raises(ConfigError, match=r"no layer fits the 2:4 kernels, 0: its weights are float32"):
        use_sparse_kernels(mlp(), torch.randn(4, 128))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs CUDA, Ampere or newer"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_weights_compute_what_the_masked_ones_do(dtype: torch.dtype) -> None:
    """From the pruning to the kernels; the reference is the dense product in single precision."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    ).cuda()
    data = [(torch.randn(16, 256), torch.arange(16) % 10)]
    result = prune_weights(model, data, sparsity="2:4", scoring="l2", finetune=0, repair=None, ignored_layers=["4"])
    x = torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        expected = result.model.eval()(x)
        done = use_sparse_kernels(result.model.to(dtype), x.to(dtype))
        made = result.model(x.to(dtype)).float()
    assert done.layers == ["0", "2"]
    assert re.search("no 2:4 pattern|multiples of", done.left["4"])
    assert type(result.model[0].weight).__name__.startswith("SparseSemiStructuredTensor")  # type: ignore[index]
    limit = 1e-2 if dtype == torch.float16 else 5e-2
    assert float((made - expected).abs().max()) <= limit * float(expected.abs().max())
