"""Scores in NNI's shape, against torch-pruning's importance, Eq. 5 to the letter, and a direct loop over blocks."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

pytest.importorskip("nni", reason="NNI is an extra: pip install nni==3.0")

from singe_plugin.errors import ConfigError
from singe_plugin.integrations.nni import SInGEPruner
from singe_plugin.method.path import decay_path

from asked import asked
from nni_nets import CONVS, batches_of, channel_masks, make_net, metrics_of
from references import get_case, literal_reduction, literal_scores, literal_walk
from small_nets import Dense, Grouped, images


@pytest.mark.parametrize("criterion", ["ig", "sg", "l2", "norm_grad"])
@pytest.mark.parametrize("name", ["chain", "resnet18", "grouped"])
def test_metrics_are_torch_prunings_importance_in_the_shape_of_a_scaler(name: str, criterion: str) -> None:
    model = Grouped() if name == "grouped" else make_net(name)
    batches = images() if name == "grouped" else batches_of(name)[:1]
    pruner = SInGEPruner(
        copy.deepcopy(model), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
        **asked(batches=batches, criterion=criterion, nodes=3),
    )  # fmt: skip
    importance = tp.importance.SInGEImportance(criterion=criterion, nodes=3).bind(model, batches)
    host = tp.pruner.SInGEPruner(model, batches[0][0], importance).host()
    metrics = metrics_of(pruner)
    assert [piece.name for piece in pruner.pieces] == [layer.name for layer in host.layers() if layer.name != "fc"]
    for piece in pruner.pieces:
        expected = host.score([piece.name])[piece.name]
        for layer, _ in piece.members:
            metric = metrics[layer]["weight"]
            assert metric.shape == (model.get_submodule(layer).out_channels, 1, 1, 1)
            by_channel = expected[piece.members[layer, "weight"]]
            torch.testing.assert_close(metric.flatten(), by_channel, rtol=1e-5, atol=0)


LETTERS = (
    "chain", "residual", "depthwise", "grouped", "transposed", "layernorm", "preactivation", "concat", "subset",
    "packed",
)  # fmt: skip
# the parts of a concatenation are groups of their own here: they decay one after the other on the layer path
PATHS = [(name, path) for path in ("layer", "neuron") for name in LETTERS if (name, path) != ("concat", "layer")]


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_metrics_are_eq_5_to_the_letter(name: str, path: str) -> None:
    case = get_case(name)
    model = copy.deepcopy(case.model)
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    writers = [p for p in case.group.producers if isinstance(p.slots[0].owner, kinds)]
    config = [{"op_names": [p.name for p in writers], "sparse_ratio": 0.25}]
    pruner = SInGEPruner(
        model, config, **asked(batches=case.batches, quadrature="geometric", mu=0.6, steps=3, path=path, unit_batch=1),
        coupled="unverified" if name == "subset" else True,  # it splits at a fixed position: nothing could be removed
    )  # fmt: skip
    literal = literal_reduction(case, literal_scores(literal_walk(case, 0.6, 3, path), "ig", 2), "sum")
    metrics = metrics_of(pruner)
    for producer in writers:
        found = metrics[producer.name]["weight"].flatten().double()
        if name == "packed":  # three rows of one unit, which lie apart
            found = found.view(3, -1)[0]
            assert torch.equal(metrics[producer.name]["weight"].flatten().view(3, -1)[1].double(), found)
        wanted = torch.tensor([literal[unit] for unit in producer.units], dtype=torch.float64)
        torch.testing.assert_close(found[producer.rows], wanted, rtol=1e-5, atol=0)
        assert torch.equal(found[producer.rows].argsort(), wanted.argsort())


class Blocks(nn.Module):
    """Two layers without norms, one of them linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 6, 3), nn.Linear(6 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def literal_blocks(model: nn.Module, key: str, kernel: tuple[int, ...], batch: Any, criterion: str) -> Tensor:
    """Norm of block of W times norm of block of gradient at the scaled weights, summed by the quadrature."""
    weight = dict(model.named_parameters())[key].detach()
    extents = [size if k == -1 else k for k, size in zip(kernel, weight.shape, strict=True)]
    counts = [size // k for k, size in zip(extents, weight.shape, strict=True)]
    path = decay_path(0.9, None, "gauss", 3, "gradient" if criterion == "sg" else "product")
    total = torch.zeros(counts, dtype=torch.float64)
    for scale, share in zip(path.scales.tolist(), path.weights.tolist(), strict=True):
        scaled = (weight * scale).requires_grad_()
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, {key: scaled}, (batch[0],)), batch[1])
        (grad,) = torch.autograd.grad(loss, scaled)
        for index in itertools.product(*map(range, counts)):
            block = tuple(slice(i * k, (i + 1) * k) for i, k in zip(index, extents, strict=True))
            size = 1.0 if criterion == "sg" else float(scaled.detach()[block].double().norm())
            total[index] += share * size * float(grad[block].double().norm())
    return total


@pytest.mark.parametrize("criterion", ["ig", "sg"])
@pytest.mark.parametrize(("layer", "granularity", "kernel"), [
    ("conv", "in_channel", (-1, 1, -1, -1)), ("conv", [2, -1, -1, -1], (2, -1, -1, -1)),
    ("conv", [3, 2, 1, 3], (3, 2, 1, 3)), ("conv", [[2], "back", -1], (2, -1, -1, -1)), ("fc", [2, 36], (2, 36)),
    ("conv", "default", (1, 1, 1, 1)), ("fc", "in_channel", (-1, 1)), ("fc", [4], (1, 4)),
])  # fmt: skip
def test_metrics_of_columns_blocks_and_single_weights(
    layer: str, granularity: Any, kernel: tuple[int, ...], criterion: str
) -> None:
    model, batch = Blocks(), images(size=8)[0]
    config = [{"op_names": [layer], "sparse_ratio": 0.5, "granularity": granularity}]
    pruner = SInGEPruner(
        copy.deepcopy(model), config, **asked(batches=[batch], criterion=criterion, nodes=3, default_granularity=None)
    )  # fmt: skip
    found = metrics_of(pruner)[layer]["weight"]
    wanted = literal_blocks(model, f"{layer}.weight", kernel, batch, criterion)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-9)
    mask = pruner.compress()[1][layer]["weight"]
    extents = [size if k == -1 else k for k, size in zip(kernel, mask.shape, strict=True)]
    lowest = wanted.flatten().argsort()[: wanted.numel() // 2]
    expected = torch.ones(wanted.numel()).scatter(0, lowest, 0.0).view(wanted.shape)
    for dim, extent in enumerate(extents):
        expected = expected.repeat_interleave(extent, dim)
    assert torch.equal(mask, expected)


def test_what_is_masked_counts_least_and_the_rest_is_scored_on_the_masked_model() -> None:
    model, batches = make_net("resnet18"), batches_of("resnet18")[:1]
    pruner = SInGEPruner(copy.deepcopy(model), CONVS, **asked(batches=batches, nodes=2))
    names = ["layer1.0.conv2", "layer1.0.downsample.0", "layer1.1.conv2", "layer2.0.conv1"]
    gone = torch.tensor([1, 4, 6])
    for name in names:  # three channels of the stream, and of an inner layer; norms and biases along
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        for layer in (name, norm):
            masks = {
                k: torch.ones(len(p)).index_fill(0, gone, 0) for k, p in model.get_submodule(layer).named_parameters()
            }
            wide = {k: m.view(-1, 1, 1, 1) if layer == name else m for k, m in masks.items()}
            pruner.update_masks({layer: wide})
            with torch.no_grad():
                for key, mask in wide.items():
                    model.get_submodule(layer).get_parameter(key).mul_(mask)
    importance = tp.importance.SInGEImportance(nodes=2).bind(model, batches)
    host = tp.pruner.SInGEPruner(model, batches[0][0], importance).host()
    metrics = metrics_of(pruner)
    for piece in pruner.pieces:
        metric = metrics[next(iter(piece.members))[0]]["weight"].flatten()
        masked = torch.zeros(len(metric), dtype=torch.bool)
        if next(iter(piece.members))[0] in names:
            masked[gone] = True
        assert bool((metric[masked] == -1).all())
        assert int((metric == -1).sum()) == int(masked.sum())
        expected = host.score([piece.name])[piece.name][next(iter(piece.members.values()))]
        torch.testing.assert_close(metric[~masked], expected[~masked], rtol=1e-5, atol=0)


def test_a_transposed_convolution_is_masked_by_its_output_channels() -> None:
    model = copy.deepcopy(get_case("transposed").model)
    batches = get_case("transposed").batches
    for granularity, away in (("out_channel", (0, 2, 3)), ("in_channel", (1, 2, 3))):
        config = [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.5, "granularity": granularity}]
        pruner = SInGEPruner(model, config, **asked(batches=batches))
        masks = pruner.compress()[1]
        kept = masks["conv"]["weight"].amax(away).bool()
        assert int(kept.sum()) == len(kept) // 2
        assert torch.equal(masks["conv"]["weight"].amin(away).bool(), kept)
        loud = model.bn.eval()(model.conv(torch.randn(2, 2, 3, 3).double())).abs().amax((0, 2, 3)) > 0
        channels = kept if granularity == "out_channel" else torch.ones(4, dtype=torch.bool)
        assert torch.equal(loud, channels)
        assert torch.equal(masks["conv"]["bias"].bool(), channels)
        pruner.unwrap_model()
    with pytest.raises(ConfigError, match=r"'conv': the output channels of a transposed convolution with groups=2"):
        SInGEPruner(get_case("grouped_transposed").model, [{"op_names": ["conv"], "sparse_ratio": 0.5}],
                    **asked(batches=get_case("grouped_transposed").batches))  # fmt: skip


# --- what is ranked together -------------------------------------------------------------------------------------


def test_a_norm_that_reads_a_concatenation_is_masked_in_parts() -> None:
    pruner = SInGEPruner(Dense(), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], **asked(batches=images(), nodes=1))
    kept = channel_masks(pruner.compress()[1])
    writers = [kept[name] for name in ("stem", "layers.0.2", "layers.1.2", "layers.2.2")]
    assert torch.equal(kept["norm"], torch.cat(writers))
    assert torch.equal(kept["layers.1.0"], torch.cat(writers[:2]))
    assert [int(mask.sum()) for mask in writers] == [4, 4, 4, 4]


def test_a_norm_with_a_ratio_of_its_own_follows_nobody_when_nothing_is_coupled() -> None:
    config = [{"op_names": ["conv2"], "sparse_ratio": 0.5}, {"op_names": ["bn2", "bn1"], "sparse_ratio": 0.2}]
    pruner = SInGEPruner(
        make_net("chain"), config, **asked(batches=batches_of("chain"), coupled=False, criterion="norm_grad")
    )
    masks = pruner.compress()[1]
    assert {name: int((~mask).sum()) for name, mask in channel_masks(masks).items()} == {"conv2": 5, "bn2": 2, "bn1": 1}
    assert torch.equal(masks["bn2"]["bias"], masks["bn2"]["weight"])


class Words(nn.Module):
    """An embedding that a linear layer is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.fc, self.head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.emb(x)
        return self.head(torch.relu(y + self.fc(y)).mean(1))


def test_the_rows_of_an_embedding_are_words_not_channels() -> None:
    batch = torch.randint(0, 6, (4, 5)), torch.randint(0, 3, (4,))
    config = [{"op_types": ["Embedding", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    pruner = SInGEPruner(Words(), config, **asked(batches=[batch]))
    assert {piece.name: piece.size for piece in pruner.pieces} == {"emb": 6, "fc": 8}
    assert pruner.partial == {"fc": ["emb.weight"]}
    kept = channel_masks(pruner.compress()[1])
    assert [int(kept[name].sum()) for name in ("emb", "fc")] == [3, 4]


class Twofold(Grouped):
    """Its ``extra`` layer is as wide as ``conv1``, which a grouped convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.last = nn.Conv2d(2, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.last(torch.relu(self.extra(x)).mean((2, 3)))


def test_a_dependency_group_joins_units_of_different_sizes() -> None:
    config = [{"op_names": ["conv1", "extra"], "sparse_ratio": 0.5, "dependency_group_id": "both"}]
    pruner = SInGEPruner(Twofold(), config, **asked(batches=images(), nodes=2))
    alone = SInGEPruner(
        copy.deepcopy(Twofold()), [{**config[0], "op_names": ["extra"]}], **asked(batches=images(), nodes=2)
    )
    assert [(piece.name, piece.size) for piece in alone.pieces] == [("extra", 16)]
    assert [(piece.name, piece.size) for piece in pruner.pieces] == [("conv1", 4)]
    metrics = metrics_of(pruner)
    assert torch.equal(metrics["conv1"]["weight"], metrics["extra"]["weight"])
    kept = channel_masks(pruner.compress()[1])
    assert torch.equal(kept["conv1"], kept["extra"])
    assert bool((kept["extra"].view(4, 4) == kept["extra"][:4]).all())
    assert int(kept["extra"].sum()) == 8


class Forked(nn.Module):
    """Half of a layer's channels are the model's output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.fc(x).split([4, 4], 1)
        return self.head(torch.relu(first)), second


def test_channels_of_one_layer_that_are_ranked_apart_have_names_of_their_own() -> None:
    batch = torch.randn(6, 4), torch.randint(0, 3, (6,))
    options: dict[str, Any] = {"objective": lambda out, y: nn.functional.cross_entropy(out[0] + out[1][:, :3], y)}
    config = [{"op_names": ["fc"], "sparse_ratio": 0.5}]
    pruner = SInGEPruner(Forked(), config, coupled="unverified", **asked(batches=[batch], **options))
    parts = {piece.name: piece.members["fc", "weight"].tolist() for piece in pruner.pieces}
    assert parts == {"fc": [0, 1, 2, 3, -1, -1, -1, -1], "fc#2": [-1, -1, -1, -1, 0, 1, 2, 3]}
    kept = channel_masks(pruner.compress()[1])["fc"]
    assert (int(kept[:4].sum()), int(kept[4:].sum())) == (2, 2)
