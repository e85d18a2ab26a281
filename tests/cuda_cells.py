"""What CUDA computes for one step of an LSTM or a GRU without cuDNN, as CPU kernels of the same operators."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gru_cell", "lstm_cell"]


def _lstm(
    inputs: Tensor, states: Tensor, cell: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    gates = inputs + states + (0 if b_ih is None else b_ih) + (0 if b_hh is None else b_hh)
    i, f, g, o = gates.chunk(4, 1)
    new = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * new.tanh(), new, gates.clone()


def _gru(
    inputs: Tensor, states: Tensor, hidden: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    a, b = inputs + (0 if b_ih is None else b_ih), states + (0 if b_hh is None else b_hh)
    (ir, iz, new), (hr, hz, own) = a.chunk(3, 1), b.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (new + r * own).tanh()
    return (hidden - n) * z + n, torch.cat([a, b[:, : 2 * hidden.shape[1]]], 1)


_library = torch.library.Library("aten", "IMPL")
_library.impl("_thnn_fused_lstm_cell", _lstm, "CPU")
_library.impl("_thnn_fused_gru_cell", _gru, "CPU")

lstm_cell = torch.ops.aten._thnn_fused_lstm_cell
gru_cell = torch.ops.aten._thnn_fused_gru_cell
