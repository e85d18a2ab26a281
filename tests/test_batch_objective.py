"""F as a function of the model and a batch: scored as it is trained, and nothing of the model is left changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

import singe_plugin
from singe_plugin import BatchObjective, ConfigError, DataError, FineTune, Scoring
from singe_plugin.axes import AxisGraph
from singe_plugin.method.scoring import score_groups
from singe_plugin.run.staging import count_examples, fingerprint_of


def _batches(count: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    "options",
    [{"criterion": "ig"}, {"criterion": "ig_abs", "nodes": 2}, {"criterion": "grad"}, {"path": "neuron", "nodes": 2},
     {"path": "neuron", "nodes": 2, "unit_batch": 1}],
)  # fmt: skip
def test_scores_are_those_of_the_same_function_of_outputs_and_targets(options: dict[str, Any]) -> None:
    net, batches = _net().eval(), _batches()
    groups = {name: group.unit_group() for name, group in AxisGraph(net, batches[0][0]).groups.items()}
    usual = score_groups(net, groups, batches, Scoring(**options))
    found = score_groups(net, groups, batches, Scoring(objective=BatchObjective(_loss), **options))
    for name in groups:
        torch.testing.assert_close(found[name], usual[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("importance", ["obs", tp.importance.TaylorImportance()])
def test_a_whole_run_is_the_same(importance: Any) -> None:
    options: dict[str, Any] = {"target": "params=0.5", "finetune": FineTune(steps=4, label_smoothing=0.0)}
    results = []
    for objective in ("loss", BatchObjective(_loss)):
        net = _net()
        scoring = Scoring(importance, objective=objective)
        results.append(singe_plugin.prune(net, _batches(), scoring=scoring, **options))
    usual, found = results
    assert found.history.removals() == usual.history.removals()
    assert found.options["finetune"]["minimises"] == "_loss"
    for mine, theirs in zip(found.model.parameters(), usual.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


SEEN: list[tuple[bool, ...]] = []  # not of the model, which is put back


class Detector(nn.Module):
    """Takes a list of images; in train mode it returns losses of boxes that it samples, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        SEEN.append(tuple(m.training for m in (self, self.body, self.body[1], self.body[3])))
        found = self.head(self.body(torch.stack(images)))
        if not self.training:
            return found
        assert targets is not None
        places = torch.randperm(found.shape[-1])[:3]
        wanted = torch.stack([t["boxes"] for t in targets]).mean((1, 2))
        return {"boxes": (found[..., places].mean((1, 2, 3)) - wanted).pow(2).mean(), "size": found.pow(2).mean()}


def _detections(count: int = 2) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            [torch.rand(3, 8, 8, generator=generator) for _ in range(4)],
            [{"boxes": torch.rand(2, 4, generator=generator)} for _ in range(4)],
        )
        for _ in range(count)
    ]


def _losses(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = sum(model(*batch).values())
    return found


def test_a_detector_is_scored_in_train_mode_with_its_statistics_held_still() -> None:
    torch.manual_seed(0)
    model = Detector()
    whole = BatchObjective(_losses, train=True, inputs=lambda batch: (batch[0],))
    before, state = fingerprint_of(model), torch.get_rng_state()
    groups = {n: g.unit_group() for n, g in AxisGraph(model, whole.inputs_of(_detections()[0])).groups.items()}
    assert list(groups) == ["body.0"]
    SEEN.clear()
    options = Scoring("ig", nodes=3, objective=whole)
    found = score_groups(model, groups, _detections(), options)["body.0"]
    assert set(SEEN) == {(True, True, False, False)}, "containers train, batch-norm and dropout do not"
    assert torch.equal(found, score_groups(model, groups, _detections(), options)["body.0"])  # drawn alike
    assert fingerprint_of(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize("criterion", ["auto", "ig_abs"])
def test_a_detector_is_pruned_repaired_and_trained(criterion: str) -> None:
    torch.manual_seed(0)
    model = Detector()
    whole = BatchObjective(_losses, train=True, inputs=lambda batch: (batch[0],))
    scoring = Scoring(criterion, objective=whole)
    result = singe_plugin.prune(model, _detections(), target="params=0.5", scoring=scoring, finetune=3, repair=8)
    assert (result.after.params, result.model.body[0].out_channels) == (4 * 28 + 8 + 4 * 5, 4)
    assert result.before.macs == 8 * 8 * (8 * 27 + 4 * 8)  # of one image of the four
    assert [row["loss"] > 0 for row in result.history.select("finetune_step")] == [True] * 3
    assert len(result.history.select("repaired")) == 1


def test_a_batch_of_any_form_is_scored_if_its_inputs_are_named() -> None:
    batches = [{"img": x, "cls": y, "paths": ["a"] * len(y)} for x, y in _batches()]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch["img"]), batch["cls"])

    named = BatchObjective(loss, inputs=lambda batch: batch["img"])
    result = singe_plugin.prune(_net(), batches, target="params=0.5", scoring=Scoring(objective=named), finetune=2)
    assert result.removed_params > 0.49
    with pytest.raises(DataError, match=r"none of which is a target .* BatchObjective\(inputs=lambda batch: ...\)"):
        singe_plugin.prune(
            _net(), batches, target="params=0.5", scoring=Scoring(objective=BatchObjective(loss)), finetune=0
        )
    wrong = BatchObjective(loss, inputs=lambda batch: batch["image"])
    with pytest.raises(DataError, match=r"BatchObjective\(inputs=...\) failed on a batch \(dict\) with KeyError"):
        singe_plugin.prune(_net(), batches, target="params=0.5", scoring=Scoring(objective=wrong), finetune=0)


def test_what_it_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match=r"needs a function \(model, batch\) -> scalar"):
        BatchObjective("loss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is a function of a batch"):
        BatchObjective(_loss, inputs="img")  # type: ignore[arg-type]
    vector = BatchObjective(lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(singe_plugin.ScoringError, match="one number"):
        singe_plugin.prune(_net(), _batches(), target="params=0.5", scoring=Scoring("ig", objective=vector), finetune=0)


def test_examples_of_detectors_are_counted_by_their_images() -> None:
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)]
    assert [count_examples(x) for x in ((images,), torch.zeros(5, 3), {"x": torch.zeros(4, 2)}, torch.tensor(1.0))] == [
        2, 5, 4, 1,
    ]  # fmt: skip
