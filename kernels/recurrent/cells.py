"""One time step of an LSTM or GRU, forward and back, apart from its matrix product: torch functions, in place.

    LSTM, gates (i, f, g, o) = x W_ih^T + b_ih + h W_hh^T + b_hh      (Hochreiter & Schmidhuber 1997, as in nn.LSTM)
        c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')
    GRU, gates (r, z, n) = x W_ih^T + b_ih and (r, z, m) = h W_hh^T + b_hh      (Cho et al. 2014, as in nn.GRU)
        r, z = sigmoid of the sums,  n' = tanh(n + r m),  h' = (1 - z) n' + z h

The CPU path, and the oracle of `triton_cells`, whose functions have the same names and arguments. Sums are formed in
float32, in float64 for float64. The cell state `c` and what belongs to it stay in that dtype from step to step.

    b sequences that are still running, H hidden units; saved `(b, 4 H)`: (i, f, g, o), or (r, z, n', m)
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of cell states and sums for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lstm(
    gates: Tensor, product: Tensor, c: Tensor, h: Tensor, saved: Tensor | None, before: Tensor | None
) -> None:
    """A step of the LSTM.

    Args:
        gates: `(b, 4 H)`, the input's half of the gates, with its bias.
        product: `(b, 4 H)`, the hidden state's half, with its bias.
        c: `(b, H)` wide, the cell state, which is replaced by the next one.
        h: `(b, H)`, written: the next hidden state.
        saved: `(b, 4 H)`, written for the way back: the gates after their functions.
        before: `(b, H)` wide, written for the way back: the cell state that came in.
    """
    i, f, g, o = (gates.to(c.dtype) + product.to(c.dtype)).chunk(4, 1)
    i, f, g, o = i.sigmoid_(), f.sigmoid_(), g.tanh_(), o.sigmoid_()
    if saved is not None and before is not None:
        torch.cat([i.to(h.dtype), f.to(h.dtype), g.to(h.dtype), o.to(h.dtype)], 1, out=saved)
        before.copy_(c)
    c.mul_(f).addcmul_(i, g)
    h.copy_(o * c.tanh())


def lstm_back(
    dy: Tensor | None, dh: Tensor, dc: Tensor, saved: Tensor, before: Tensor, dgates: Tensor
) -> None:
    """The way back through a step of the LSTM.

    Args:
        dy: `(b, H)`, the gradient of the step's output; `None` where it is in `dh` already.
        dh: `(b, H)`, the gradient of the hidden state that the next step took.
        dc: `(b, H)` wide, the gradient of the next cell state, which is replaced by that of the one before.
        saved: What `lstm` wrote.
        before: What `lstm` wrote.
        dgates: `(b, 4 H)`, written: the gradient of the sums.
    """
    i, f, g, o = saved.to(dc.dtype).chunk(4, 1)
    dh = dh.to(dc.dtype) if dy is None else dh.to(dc.dtype) + dy
    t = (f * before + i * g).tanh_()
    dc.addcmul_(dh * o, 1 - t * t)
    parts = (dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o))
    torch.cat([part.to(dgates.dtype) for part in parts], 1, out=dgates)
    dc.mul_(f)


def gru(gates: Tensor, product: Tensor, h_before: Tensor, h: Tensor, saved: Tensor | None) -> None:
    """A step of the GRU.

    Args:
        gates: `(b, 3 H)`, the input's half of the gates, with its bias.
        product: `(b, 3 H)`, the hidden state's half, with its bias.
        h_before: `(b, H)`, the hidden state.
        h: `(b, H)`, written: the next one.
        saved: `(b, 4 H)`, written for the way back.
    """
    dtype = wide(h.dtype)
    rx, zx, nx = gates.to(dtype).chunk(3, 1)
    rh, zh, m = product.to(dtype).chunk(3, 1)
    r, z = (rx + rh).sigmoid_(), (zx + zh).sigmoid_()
    n = torch.addcmul(nx, r, m).tanh_()
    if saved is not None:
        torch.cat([r.to(h.dtype), z.to(h.dtype), n.to(h.dtype), m.to(h.dtype)], 1, out=saved)
    h.copy_(n + z * (h_before.to(dtype) - n))


def gru_back(
    dy: Tensor, dh: Tensor, carry: Tensor, saved: Tensor, h_before: Tensor, dgates: Tensor, dproduct: Tensor
) -> None:
    """The way back through a step of the GRU.

    Args:
        dy: `(b, H)`, the gradient of the step's output.
        dh: `(b, H)`, the part of the next step's gradient that came through its product.
        carry: `(b, H)` wide, the part that came past it, which is replaced by this step's.
        saved: What `gru` wrote.
        h_before: `(b, H)`, the hidden state that came in.
        dgates: `(b, 3 H)`, written: the gradient of `gates`.
        dproduct: `(b, 3 H)`, written: the gradient of `product`.
    """
    r, z, n, m = saved.to(carry.dtype).chunk(4, 1)
    carry.add_(dh).add_(dy)
    dn = carry * (1 - z) * (1 - n * n)
    dz = carry * (h_before.to(carry.dtype) - n) * z * (1 - z)
    dr = dn * m * r * (1 - r)
    dgates.copy_(torch.cat([dr, dz, dn], 1))
    dproduct.copy_(torch.cat([dr, dz, dn * r], 1))
    carry.mul_(z)
