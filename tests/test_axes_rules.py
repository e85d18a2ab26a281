"""Every rule against the operator itself: permuting units in the operands permutes them in the result, as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import deform_conv2d, roi_align, roi_pool

from singe_plugin.axes.algebra import Atom, labels, leaves
from singe_plugin.axes.forward import _Operators
from singe_plugin.axes.rules import RULES, pointwise
from singe_plugin.axes.substitutes import derangement
from singe_plugin.axes.trace import Trace
from singe_plugin.nested import call_model

from cuda_cells import gru_cell, lstm_cell
from references import Net

Operator = Callable[..., Any]


def put(x: Tensor, where: Any, value: Tensor) -> Tensor:
    """A copy with another value somewhere."""
    x = x.clone()
    x[where] = value
    return x


SHAPE = (2, 6, 4, 8)  # of the first operand, x; y has the same shape, w is 6 x 6 and v has 6 elements

OPERATORS: dict[str, Operator] = {
    "add": lambda x, y, **_: x + y,
    "mul, broadcast": lambda x, v, **_: x * v.view(1, 6, 1, 1),
    "where": lambda x, y, **_: torch.where(x > 0, x, y),
    "in place": lambda x, y, **_: x.clone().add_(y).relu_(),
    "activations": lambda x, **_: functional.hardswish(functional.gelu(torch.sigmoid(x))).clamp(0.1, 2),
    "prelu": lambda x, v, **_: functional.prelu(x, v),
    "zeros_like": lambda x, **_: torch.zeros_like(x) + x,
    "ones": lambda x, **_: x + torch.ones(6, 1, 1),
    "arange": lambda x, **_: x + torch.arange(6).view(-1, 1, 1),
    "a constant": lambda x, **_: x + torch.tensor([1.0, 2, 3, 4, 5, 6]).view(-1, 1, 1),
    "flatten": lambda x, **_: x.flatten(1),
    "view: split": lambda x, **_: x.view(2, 2, 3, 4, 2, 4),
    "view: merge and split": lambda x, **_: x.view(2, 12, 16),
    "view: there and back": lambda x, **_: x.reshape(2, 24, 8).reshape(2, 3, 2, 4, 8),
    "view: batch": lambda x, **_: x.reshape(-1, 8),
    "unsqueeze, squeeze": lambda x, **_: x.unsqueeze(1).unsqueeze(-1).squeeze(1),
    "permute": lambda x, **_: x.permute(3, 1, 0, 2),
    "transpose": lambda x, **_: x.transpose(1, -1).mT,
    "expand": lambda x, **_: x[:, :, None].expand(-1, -1, 3, -1, -1),
    "repeat": lambda x, **_: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x, **_: x.repeat_interleave(2, dim=1),
    "slice": lambda x, **_: x[:, 1:4],
    "slice: strided": lambda x, **_: x[:, :, :, ::2],
    "slice: odd": lambda x, **_: x[:, 1::2],
    "select": lambda x, **_: x[:, 2],
    "narrow": lambda x, **_: x.narrow(3, 2, 5),
    "unbind": lambda x, **_: x.unbind(2)[1],
    "split": lambda x, **_: x.split([1, 2, 3], 1)[2],
    "split: equal parts": lambda x, **_: x.split(2, 1)[1],
    "chunk": lambda x, **_: torch.cat(x.chunk(2, 1)[::-1], 1),
    "cat": lambda x, y, **_: torch.cat([x, y[:, :3], x], 1),
    "cat: views": lambda x, y, **_: torch.cat([x, y], 1).view(2, 2, 6, 4, 8).transpose(1, 2).flatten(1, 2),
    "cat: unlike parts": lambda x, y, **_: torch.cat([x, y[:, :2]], 1).view(2, 2, 4, 4, 8),
    "stack": lambda x, y, **_: torch.stack([x, y], 2).flatten(1, 2),
    "pad": lambda x, **_: functional.pad(x, (1, 0, 0, 0, 0, 2)),
    "pad: reflect": lambda x, **_: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    "roll": lambda x, **_: x.roll((1, 2), (2, 3)),
    "flip": lambda x, **_: x.flip(3),
    "cumsum": lambda x, **_: x.cumsum(2),
    "sort": lambda x, **_: x.sort(3).values,
    "topk": lambda x, **_: x.topk(2, dim=1).values,
    "index": lambda x, **_: x[:, :, [0, 2]],
    "index: a table": lambda w, **_: w[torch.randint(0, 6, (4, 4), generator=torch.Generator().manual_seed(0))],
    "index: a mask of two dimensions": lambda x, **_: x[torch.arange(12).view(2, 6) % 3 == 0],
    "index_put: a mask of two dimensions": lambda x, v, **_: put(x, torch.arange(12).view(2, 6) % 3 == 0, v[:1]),
    "index_put": lambda x, y, **_: torch.zeros_like(x).index_put_((torch.tensor([1, 0]),), y),
    "index_put: a mask": lambda x, y, **_: x.index_put((torch.tensor([True, False]),), y[:1]),
    "index_put: a later dimension": lambda x, y, **_: put(x, (slice(None), slice(None), [2, 0]), y[:, :, 1:3]),
    "index_put: two tables": lambda x, v, **_: put(x, ([1, 0], slice(None), [2, 0]), v[:, None]),
    "index_select": lambda x, **_: x.index_select(3, torch.tensor([1, 5])),
    "gather": lambda x, **_: x.gather(2, torch.zeros(2, 6, 3, 8, dtype=torch.int64)),
    "embedding": lambda w, **_: functional.embedding(torch.tensor([[1, 2], [4, 0]]), w),
    "unfold": lambda x, **_: x.unfold(3, 4, 2),
    "im2col": lambda x, **_: functional.unfold(x, 3, padding=1),
    "im2col and col2im": lambda x, **_: functional.fold(functional.unfold(x, 2, stride=2), (4, 8), 2, stride=2),
    "pixel_shuffle": lambda x, **_: functional.pixel_shuffle(torch.cat([x, x], 1), 2),
    "pixel_unshuffle": lambda x, **_: functional.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x, **_: functional.channel_shuffle(x, 3),
    "glu": lambda x, **_: functional.glu(x, 1) + functional.glu(x.flip(3), 1),
    "glu: the last": lambda x, **_: functional.glu(x),
    "mode": lambda x, **_: x.round().mode(1).values,
    "kthvalue": lambda x, **_: x.kthvalue(2, 1).values + x.kthvalue(1, 1, keepdim=True).values[:, 0],
    "nanmedian": lambda x, **_: x.nanmedian(1, keepdim=True).values * x,
    "where the largest is": lambda x, **_: x * x.max(1, keepdim=True).indices,
    "logcumsumexp": lambda x, **_: x.logcumsumexp(3),
    "weight norm": lambda x, v, **_: functional.conv2d(
        x, torch._weight_norm(x[0, :, :2, :3].reshape(6, 6), v[:, None].abs() + 1)[..., None, None]
    ),
    "weight norm, alone": lambda w, v, **_: torch._weight_norm(w, v[:, None]),
    "bilinear": lambda x, y, w, v, **_: functional.bilinear(
        x.flatten(1)[:, :4], y.flatten(1)[:, :6], w[:, :4, None] * w[:, None], v
    ),
    "linear": lambda x, w, v, **_: functional.linear(x.movedim(1, -1), w, v),
    "matmul": lambda x, y, **_: x @ y.mT,
    "matmul: batches": lambda x, y, **_: x.flatten(0, 1) @ y.flatten(0, 1).mT,
    "einsum": lambda x, w, **_: torch.einsum("bchw,dc->bdhw", x, w),
    "outer": lambda v, **_: torch.outer(v, v + 1),
    "conv": lambda x, w, v, **_: functional.conv2d(x, w[..., None, None], v),
    "conv: over rows": lambda x, w, **_: functional.conv2d(
        x.transpose(1, 2), w[:4, :4, None, None].expand(-1, -1, 3, 3)
    ),
    "conv: grouped": lambda x, w, **_: functional.conv2d(x, w[:, :3, None, None], groups=2),
    "conv: depthwise": lambda x, v, **_: functional.conv2d(x, v.view(6, 1, 1, 1).expand(-1, -1, 3, 3), groups=6),
    "conv: transposed": lambda x, w, **_: functional.conv_transpose2d(
        x, w[..., None, None].expand(-1, -1, 2, 2), stride=2
    ),
    "conv: transposed, grouped": lambda x, w, **_: functional.conv_transpose2d(x, w[:, :4, None, None], groups=3),
    "conv1d: a kernel of one": lambda x, w, **_: functional.conv1d(x[..., 0], w[..., None]),
    "attention": lambda x, y, **_: functional.scaled_dot_product_attention(x, y, y * 2),
    "attention: broadcast": lambda x, y, **_: functional.scaled_dot_product_attention(x, y[:, :1], y[:, :1]),
    "attention: grouped queries": lambda x, y, **_: functional.scaled_dot_product_attention(
        x, y[:, :2], y[:, 2:4], enable_gqa=True
    ),
    "attention: grouped queries by hand": lambda x, y, **_: (
        (x @ y[:, :2].repeat_interleave(3, 1).mT).softmax(-1) @ y[:, 2:4].repeat_interleave(3, 1)
    ),
    "attention: a mask": lambda x, y, **_: functional.scaled_dot_product_attention(x, y, y, attn_mask=x @ y.mT),
    "batch norm": lambda x, v, **_: functional.batch_norm(x, v, v.abs() + 1, v, v),
    "batch norm: its own statistics": lambda x, v, **_: functional.batch_norm(x, None, None, v, v, training=True),
    "layer norm": lambda x, v, **_: functional.layer_norm(x.movedim(1, -1), (6,), v, v),
    "layer norm: no weight": lambda x, **_: functional.layer_norm(x, (4, 8)),
    "rms norm": lambda x, v, **_: functional.rms_norm(x.movedim(1, -1), (6,), v),
    "group norm": lambda x, v, **_: functional.group_norm(x, 3, v, v),
    "instance norm": lambda x, v, **_: functional.instance_norm(x, weight=v, bias=v),
    "normalize": lambda x, **_: functional.normalize(x, dim=1),
    "softmax": lambda x, **_: x.softmax(1) + x.log_softmax(3),
    "mean": lambda x, **_: x.mean((2, 3)),
    "mean: kept": lambda x, **_: x - x.mean(1, keepdim=True),
    "sum": lambda x, **_: x.sum(-1),
    "amax": lambda x, **_: x.amax((1, 2), keepdim=True),
    "max: with indices": lambda x, **_: x.max(2).values,
    "argmax": lambda x, **_: x.argmax(1),
    "var": lambda x, **_: torch.var_mean(x, dim=(2, 3), keepdim=True)[0],
    "norm": lambda x, **_: torch.linalg.vector_norm(x, dim=(2, 3)),
    "max pool": lambda x, **_: functional.max_pool2d(x, 2),
    "average pool": lambda x, **_: functional.avg_pool2d(x, 2),
    "adaptive pool": lambda x, **_: functional.adaptive_avg_pool2d(x, (2, 2)),
    "global pool": lambda x, **_: functional.adaptive_avg_pool2d(x, 1),
    "interpolate": lambda x, **_: functional.interpolate(x, scale_factor=2, mode="bilinear"),
    "lstm": lambda x, **_: nn.LSTM(8, 3).requires_grad_(False)(x[0])[0],
    "lstm: a step on CUDA": lambda x, y, **_: torch.cat(lstm_cell(x[0].flatten(1), y[0].flatten(1), x[0, :, 0])[:2]),
    "lstm: with biases": lambda x, y, w, **_: lstm_cell(
        x[0].flatten(1), y[0].flatten(1), x[1, :, 0], x[0, 0].flatten(), y[1, 1].flatten()
    )[0],
    "gru: a step on CUDA": lambda x, y, **_: gru_cell(
        x[0, :, :3].flatten(1), y[0, :, :3].flatten(1), x[1, :, 0], x[0, 0, :3].flatten()
    )[0],
    "fft": lambda x, **_: torch.fft.fft(x, dim=2).abs(),
    "fft: of real images and back": lambda x, v, **_: torch.fft.irfft2(torch.fft.rfft2(x) * v.view(-1, 1, 1), s=(4, 8)),
    "complex numbers": lambda x, y, **_: torch.view_as_real(torch.polar(x, y) * torch.complex(x, y)),
    "complex numbers: of pairs": lambda x, **_: torch.view_as_complex(x.unflatten(3, (4, 2)).contiguous()).angle(),
    "boxes of maps": lambda x, **_: roi_align(x, [torch.tensor([[0.0, 0.0, 3.0, 3.0]])] * 2, 2),
    "boxes of maps: the largest": lambda x, **_: roi_pool(x, [torch.tensor([[0.0, 0.0, 3.0, 3.0]])] * 2, 2),
    "deformed": lambda x, y, w, v, **_: deform_conv2d(x, y[:, :2], w[..., None, None], v),
    "deformed: grouped": lambda x, y, w, v, **_: deform_conv2d(x, y[:, :2], w[:, :3, None, None], v),
    "deformed: in parts": lambda x, y, w, **_: deform_conv2d(x, y[:, :6], w[..., None, None], mask=y[:, 3:]),
    "group norm: across a seam": lambda x, **_: functional.group_norm(torch.cat([x, x[:, :4]], 1), 2),
    "no rule": lambda x, **_: x.histc(5),
}  # fmt: skip

FREE = {  # that a rule keeps the axes that it could keep: the sizes of the leaves of x that stay free
    "view: split": {2, 3, 4}, "permute": {2, 6, 4, 8}, "slice": {2, 3, 4, 8}, "cat": {2, 6, 4, 8},
    "chunk": {2, 3, 4, 8}, "matmul": {2, 6, 4, 8}, "conv": {2, 6, 4, 8}, "conv: depthwise": {2, 6},
    "attention": {2, 6, 4, 8}, "attention: grouped queries": {2, 4, 8},
    "attention: grouped queries by hand": {2, 3, 4, 8}, "layer norm": {2, 6, 4, 8},
    "mean": {2, 6, 4, 8}, "pixel_unshuffle": {2, 6},
    "channel_shuffle": {2, 4, 8}, "glu": {2, 3, 4}, "glu: the last": {2, 6, 4}, "mode": {2, 6, 4, 8},
    "kthvalue": {2, 4, 8}, "nanmedian": {2, 6, 4, 8}, "where the largest is": {2, 4, 8}, "logcumsumexp": {2, 6, 4},
    "im2col": {2, 6}, "group norm": {3, 2, 4, 8}, "max pool": {2, 6}, "roll": {2, 6}, "expand": {2, 6, 4, 8},
    "repeat": {2, 6, 4, 8}, "index": {2, 6, 8}, "index_put": {6, 4, 8}, "index: a mask of two dimensions": {4, 8},
    "no rule": set(), "split": {3, 4, 8, 2}, "lstm": {4},
    "lstm: a step on CUDA": {6, 8}, "fft": {2, 6, 8}, "fft: of real images and back": {2, 6},
    "complex numbers": {2, 6, 4, 8}, "complex numbers: of pairs": {2, 6, 4}, "boxes of maps": {6},
    "boxes of maps: the largest": {6}, "deformed": {2, 6}, "deformed: in parts": {2},
}  # fmt: skip


def operands() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"x": SHAPE, "y": SHAPE, "w": (6, 6), "v": (6,)}
    return {k: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).float()) for k, s in sizes.items()}


def permuted(tensor: Tensor, axes: Any, leaf: Atom, target: list[int]) -> Tensor:
    for dim, axis in enumerate(axes):
        if leaf in leaves(axis):
            units = labels(axis, leaf)
            own = np.flatnonzero(units >= 0)
            places = own[np.argsort(units[own], kind="stable")].reshape(len(target), -1)
            source = np.arange(len(units))
            source[places.ravel()] = places[np.array(target)].ravel()
            tensor = tensor.index_select(dim, torch.from_numpy(source))
    return tensor


def twice_in_a_product(axes: Any, leaf: Atom) -> bool:
    try:
        for axis in axes:
            labels(axis, leaf)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_permuted_in_the_operands_is_permuted_in_the_result(name: str) -> None:
    operator = OPERATORS[name]

    def compute(model: Any, _: Any) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = (
            operator(x=model.x, y=model.y, w=model.w, v=model.v)
            if "x" in operator.__code__.co_varnames
            else (operator(w=model.w, v=model.v))
        )
        return out

    model = Net(compute, **operands())
    with torch.no_grad():
        base = call_model(model, torch.zeros(1))
        state = Trace(model)
        with _Operators(state, RULES, pointwise):
            out = call_model(model, torch.zeros(1))
        assert torch.equal(out, base)
        state.read([out])
        of = {key: state.of(p) for key, p in model.named_parameters()}
        result = state.of(out)
        every = dict.fromkeys(leaf for axes in (*of.values(), result) for axis in axes for leaf in leaves(axis))
        free = [leaf for leaf in every if not leaf.fixed and leaf.size > 1]
        for leaf in free:
            if any(twice_in_a_product(axes, leaf) for axes in (*of.values(), result)):
                continue
            target = derangement(leaf.size, torch.Generator().manual_seed(leaf.size))
            moved = Net(
                compute, **{k: nn.Parameter(permuted(p, of[k], leaf, target)) for k, p in model.named_parameters()}
            )
            expected = permuted(base, result, leaf, target)
            torch.testing.assert_close(call_model(moved, torch.zeros(1)), expected, rtol=1e-4, atol=1e-5)
    if name in FREE:
        kept = {leaf.size for axis in of["x"] for leaf in leaves(axis) if not leaf.fixed}
        assert kept == FREE[name]


def test_every_rule_is_for_an_operator_that_exists() -> None:
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    known = {name[1].split(".")[0] for name in names if name[0] in ("aten", "torchvision")}
    assert set(RULES) - known <= {"swapaxes", "mT", "concat", "new_tensor", "_local_scalar_dense", "meshgrid"}
