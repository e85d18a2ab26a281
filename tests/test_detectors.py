"""What detectors and diffusion UNets do: grids kept by shape, forms for export, sorted boxes, norms over seams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from singe_plugin.axes import AxisGraph, Trackers, remove_units, verify_groups
from singe_plugin.axes.choices import Choices, Repeated
from singe_plugin.nested import relative_change, tensors_in

from masking import Masked

IMAGES = torch.randn(2, 3, 16, 16)


class Split(nn.Module):
    """Cut with ``chunk``; ``forward_split`` is for export and cuts at ``width``; ``forward_first`` is another thing."""

    def __init__(self, width: int, limit: int = 6) -> None:
        super().__init__()
        self.width, self.limit = width, limit
        self.enter, self.inside = nn.Conv2d(4, 2 * width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Conv2d(3 * width, 4, 1)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return self.leave(torch.cat([*parts, self.inside(parts[-1]).relu()], 1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self._joined(list(self.enter(x).relu().chunk(2, 1)))

    def forward_split(self, x: Tensor) -> Tensor:
        return self._joined(list(self.enter(x).relu().split((self.width, self.width), 1)))

    def forward_first(self, x: Tensor) -> Tensor:
        return self.enter(x)[:, : self.limit]  # type: ignore[no-any-return]


class Anchored(nn.Module):
    """A detector that keeps its grid until the shape of its input changes, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.box = nn.Conv2d(3, 4, 3, padding=1), Split(6), nn.Conv2d(4, 4, 1)
        self.shape: torch.Size | None = None
        self.grid = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.box(self.block(self.stem(x).relu()).relu())
        if self.shape != boxes.shape:
            self.shape = boxes.shape
            self.grid = torch.stack(torch.meshgrid(*map(torch.arange, boxes.shape[2:]), indexing="ij")).repeat(2, 1, 1)
        return (boxes.sigmoid() + self.grid).flatten(2)  # type: ignore[no-any-return]


def pruned(model: nn.Module, inputs: Any, least: int = 1) -> tuple[AxisGraph, nn.Module]:
    """Verify, remove half of every group, and return the graph with the reference."""
    graph = AxisGraph(model.eval(), inputs)
    assert verify_groups(graph) == {}
    masked = Masked(model)
    for group in graph.groups.values():
        if not group.secondary:
            remove_units(graph, group, range(max(group.size // 2, least)), Trackers(emas=[masked.tags]))
    return graph, masked.model()


def same(a: Any, b: Any) -> bool:
    return relative_change([t.detach() for t in tensors_in(a)], [t.detach() for t in tensors_in(b)]) < 1e-12


@pytest.mark.parametrize("ran", [False, True])
def test_a_grid_that_is_kept_by_shape_is_no_obstacle(ran: bool) -> None:
    model = Anchored().eval()
    if ran:
        model(IMAGES)
    grid, shape = model.grid, model.shape
    graph, reference = pruned(model, IMAGES)
    assert set(graph.groups) == {"stem", "block.enter", "block.inside", "block.leave"}
    assert model.grid is grid
    assert model.shape == shape
    for images in (IMAGES, torch.randn(1, 3, 8, 12)):
        assert same(model.double()(images.double()), reference.double()(images.double()))


def test_a_width_that_only_another_form_of_the_forward_pass_reads_follows() -> None:
    model = Anchored()
    pruned(model, IMAGES)
    block, x = model.block, torch.randn(1, model.stem.out_channels, 5, 5)
    assert (block.width, block.limit, block.inside.in_channels) == (3, 6, 3)
    assert torch.equal(block(x), block.forward_split(x))


def test_a_method_that_computes_something_else_changes_nothing() -> None:
    graph = AxisGraph(Anchored().eval(), IMAGES)
    limits = [place for place in graph.trace.links if place.attr == "limit"]
    assert not limits
    assert graph.groups["block.enter"].size == 6


class Chosen(nn.Module):
    """Choose by numbers of which two are always the same, computed in two ways: rounding decides which is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.score, self.value = nn.Linear(6, 16), nn.Linear(16, 1, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inside(x).tanh()
        once = self.score(h)[..., 0]
        scores = torch.stack([once, (h * self.score.weight[0]).sum(-1), once / 2], -1).flatten(1)
        best = scores.topk(4, dim=1)
        places = best.indices.to(x.dtype) + 1
        return best.values[..., None] + places[..., None] * self.value(h).mean(1, keepdim=True)


def test_what_rounding_would_decide_is_no_difference() -> None:
    graph = AxisGraph(Chosen().eval(), torch.randn(2, 7, 6))
    assert list(graph.groups) == ["inside"]
    assert verify_groups(graph) == {}


def test_a_wrong_group_is_still_found_behind_a_choice() -> None:
    graph = AxisGraph(Chosen().eval(), torch.randn(2, 7, 6))
    (group,) = graph.groups.values()
    places = graph.places[group.leaf.root()]
    places[:] = [(held, dim) for held, dim in places if held.owner is not graph.model.value]
    graph.changed()
    assert "inside" in verify_groups(graph)


def test_choices_are_repeated_only_where_the_numbers_agree() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [5.0, 5.0, 9.0, 9.0]])
    scores = torch.tensor([0.5, 0.5 + 1e-7, 0.1])

    def run(scores: Tensor) -> list[list[Any]]:
        order = scores.sort(descending=True, stable=True)
        found = [nms(boxes, scores, 0.5), order.indices, scores.argmax(), scores > 0.5, (scores * 2).to(torch.int64)]
        return [t.tolist() for t in (*found, order.values, scores.max(0).indices, scores.max(0).values)]

    with Choices() as choices:
        first = run(scores)
    near, far = scores + torch.tensor([2e-7, 0.0, 0.0]), scores + torch.tensor([0.2, 0.0, 0.0])
    with Repeated(choices, 1e-5):
        again = run(near)
    with Repeated(choices, 1e-5):
        other = run(far)
    assert run(near)[:3] != first[:3]
    assert [*again[:5], again[6]] == [*first[:5], first[6]]
    assert [again[5], again[7]] == [near[[1, 0, 2]].tolist(), float(near[1])]  # the values are those of now
    assert other == run(far)


class Seam(nn.Module):
    """The way up of a UNet: a group norm over two streams, whose groups end inside of them."""

    def __init__(self, wide: int, narrow: int, groups: int) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, wide, 3, padding=1), nn.Conv2d(3, narrow, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(groups, wide + narrow), nn.Conv2d(wide + narrow, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(torch.cat([self.one(x), self.other(x)], 1)).sigmoid())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("wide", "narrow", "groups", "units"),
    [(12, 6, 6, {3, 2, 4}), (16, 8, 4, {2}), (16, 8, 2, {4}), (20, 10, 3, {10, 2}), (8, 8, 4, {4, 2})],
)
def test_a_group_norm_over_a_seam_loses_the_same_of_each_group(
    wide: int, narrow: int, groups: int, units: set[int]
) -> None:
    model = Seam(wide, narrow, groups)
    graph, reference = pruned(model, IMAGES)
    assert {group.initial for group in graph.groups.values()} == units
    images = IMAGES.double()
    assert model.norm.num_channels == model.one.out_channels + model.other.out_channels < wide + narrow
    assert same(model.double()(images), reference.double()(images))


class TwoStages(nn.Module):
    """Cut out what is in the best boxes of an image, and look at it again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rank = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        self.inside, self.head = nn.Linear(8 * 4, 10), nn.Linear(10, 2)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            maps = self.body(image[None]).relu()
            scores = self.rank(maps).flatten()
            corners = torch.stack(
                [torch.arange(len(scores)) % maps.shape[3], torch.arange(len(scores)) // maps.shape[3]]
            )
            boxes = torch.cat([corners, corners + 4]).T.to(maps.dtype)
            kept = nms(boxes, scores, 0.3)[:5]
            cut = roi_align(maps, [boxes[kept]], 2)
            across, down = boxes[kept[0], 2:].long()  # bounds of a slice that are tensors
            inside = maps[0, :, :down, :across].sum()
            found.append(
                {"inside": inside, "boxes": boxes[kept], "scores": self.head(self.inside(cut.flatten(1)).relu())}
            )
        return found


def test_two_stages_over_a_list_of_images() -> None:
    model, images = TwoStages(), [torch.randn(3, 10, 12), torch.randn(3, 8, 9)]
    graph, reference = pruned(model, (images,))
    assert set(graph.groups) == {"body", "inside"}
    doubles = [image.double() for image in images]
    assert same(model.double()(doubles), reference.double()(doubles))
