"""The recurrent half of LSTM and GRU layers with block-sparse weights, one layer and direction at a time.

The input's half of the gates comes ready, from one product over all time steps. Here each step is one product with the
hidden state and one function of the gates (`cells`, on GPUs the kernels of `triton_cells`); or all steps are one
launch, where `triton_recurrence` takes them. The way back is the same in reverse, and the weight's gradient is one
product over all time steps at its end. Nothing waits for the GPU, so that all of it can be recorded as a CUDA graph.

Sequences of different lengths are laid out as in `torch.nn.utils.rnn.PackedSequence`: the longest first, and for each
time step the sequences that are still running, one step after the other.

    S rows of all time steps together, B sequences, H hidden units, P outputs (H, or fewer with a projection)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.kernels.dispatch import choose
from sparsify.kernels.linear import library
from sparsify.kernels.recurrent import cells as torch_cells
from sparsify.kernels.storage import Topology

_lib = torch.library.Library("sparsify", "FRAGMENT")
_lib.define(
    "recurrence(Tensor gates, Tensor h0, Tensor? c0, Tensor weight, Tensor[] topology, Tensor? bias, "
    "Tensor? projection, Tensor[] projection_topology, SymInt[] sizes, bool reverse, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_lib.define(
    "recurrence_back(Tensor dy, Tensor dh, Tensor dc, Tensor y, Tensor h0, Tensor saved, Tensor before, Tensor weight, "
    "Tensor[] topology, Tensor? projection, Tensor[] projection_topology, SymInt[] sizes, bool reverse, bool lstm, "
    "bool need_weight, bool need_projection) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class Weight(NamedTuple):
    """A weight `(N, K)`, block-sparse or dense.

    Attributes:
        values: `(Z, bi, bo)` packed blocks, or `(N, K)`.
        topo: Indices of the blocks; `None` for a dense weight.
    """

    values: Tensor
    topo: Topology | None = None


def recurrence(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    sizes: Sequence[int],
    *,
    projection: Weight | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs one layer of an LSTM or GRU through time, in one direction. Once differentiable.

    Args:
        gates: `(S, 4 H)` for an LSTM, `(S, 3 H)` for a GRU: the input's half of the gates in torch's order, with its
            bias; floating point.
        h0: `(B, P)`, hidden state at the start, the dtype of `gates` (autocast casts all).
        c0: `(B, H)`, cell state at the start; `None` for a GRU.
        weight: `(4 H, P)` or `(3 H, H)`, what the hidden state is multiplied with.
        bias: `(4 H,)` or `(3 H,)`, or `None`.
        sizes: How many sequences run at each time step, descending; the first is `B`, their sum `S`.
        projection: `(P, H)`, what the LSTM's hidden state goes through.
        reverse: From the last time step to the first.

    Returns:
        Outputs `(S, P)`, hidden state `(B, P)` and cell state `(B, H)` at the end (for a GRU an empty tensor).
    """
    tensors = (gates, h0, c0, weight.values, bias, None if projection is None else projection.values)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, h, c, _, _ = torch.ops.sparsify.recurrence(
        gates, h0, c0, weight.values, list(weight.topo or ()), bias,
        None if projection is None else projection.values,
        [] if projection is None else list(projection.topo or ()), list(sizes), reverse, keep,
    )  # fmt: skip
    return y, h, c


def hidden_before(y: Tensor, h0: Tensor, sizes: Sequence[int], reverse: bool) -> Tensor:
    """The hidden state that each row's step took, `(S, P)`, from the outputs `y` `(S, P)`."""
    if sizes[0] == sizes[-1]:
        batch = sizes[0]
        return torch.cat([y[batch:], h0] if reverse else [h0, y[:-batch]])
    parts: list[Tensor] = []
    begins = list(accumulate(sizes, initial=0))
    for t, size in enumerate(sizes):
        other = t + 1 if reverse else t - 1
        known = min(size, sizes[other]) if 0 <= other < len(sizes) else 0
        if known:
            parts.append(y[begins[other] : begins[other] + known])
        parts.append(h0[known:size])
    return torch.cat(parts)


def _cells(x: Tensor) -> ModuleType:
    """Where the functions of the gates run."""
    if not x.is_cuda or x.dtype == torch.float64:
        return torch_cells
    from sparsify.kernels.recurrent import triton_cells

    return triton_cells


# Whether all time steps may be one launch; benchmarks compare both ways.
PERSISTENT = True


def _whole(x: Tensor, weight: Weight, projection: Weight | None, units: int, sizes: Sequence[int]) -> Any:
    """`triton_recurrence`, if it runs all the steps of this layer in one launch; else `None`."""
    if (
        not PERSISTENT
        or not x.is_cuda
        or x.dtype == torch.float64
        or weight.topo is None
        or projection is not None
    ):
        return None
    from sparsify.kernels.recurrent import triton_recurrence

    return triton_recurrence if triton_recurrence.takes(x, weight.values, units, sizes) else None


def _steps(sizes: Sequence[int], reverse: bool) -> Iterator[tuple[slice, int]]:
    """Rows and number of sequences of each time step, in the order in which they run."""
    steps = [(slice(end - size, end), size) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    return reversed(steps) if reverse else iter(steps)


def _weight(values: Tensor, topology: Sequence[Tensor]) -> Weight:
    return Weight(values, Topology(*topology) if topology else None)


def _product(x: Tensor, weight: Weight, bias: Tensor | None, width: int) -> Tensor:
    """`x W^T + bias`, `(b, N)`."""
    values, topo = weight
    if topo is None:
        return F.linear(x, values, bias)
    _, block_in, block_out = values.shape
    return choose("dsd", x, values, (block_in, block_out), width)(x, values, bias, topo, width)


def _product_back(dy: Tensor, weight: Weight, width: int) -> Tensor:
    """`dy W`, `(b, K)`."""
    values, topo = weight
    if topo is None:
        return dy @ values
    _, block_in, block_out = values.shape
    return choose("dds", dy, values, (block_in, block_out), width)(dy, values, topo, width)


def _weight_gradient(dy: Tensor, x: Tensor, weight: Weight) -> Tensor:
    """`dy^T x`, in the layout of the weight."""
    values, topo = weight
    if topo is None:
        return dy.t() @ x
    _, block_in, block_out = values.shape
    return choose("sdd", dy, x, (block_in, block_out), topo.col.numel())(dy, x, topo, block_in, block_out)


def forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    projection: Weight | None,
    sizes: Sequence[int],
    reverse: bool,
    keep: bool,
    cells: ModuleType | None = None,
    whole: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`recurrence`, and with `keep` what the way back needs: `saved` `(S, 4 H)` and `before` `(S, H)` (see `cells`).

    `cells` is where the functions of the gates run, `whole` what runs all steps at once; both are chosen if left out.
    """
    cells = cells or _cells(gates)
    gates, h = gates.contiguous(), h0.contiguous()
    rows, batch, lstm = gates.shape[0], h0.shape[0], c0 is not None
    width = gates.shape[1]
    units = width // (4 if lstm else 3)
    dtype = torch_cells.wide(gates.dtype)
    y = gates.new_empty(rows, h0.shape[1])
    saved = gates.new_empty(rows if keep else 0, 4 * units)
    before = gates.new_empty(rows if keep and lstm else 0, units, dtype=dtype)
    c = gates.new_empty(0, units, dtype=dtype) if c0 is None else c0.to(dtype, copy=True).contiguous()
    whole = whole or _whole(gates, weight, projection, units, sizes)
    if whole is not None and weight.topo is not None:
        kept = (saved if keep else None, before if keep and lstm else None)
        whole.forward(
            gates, h, c if lstm else None, weight.values, weight.topo, bias, len(sizes), reverse, y, *kept
        )
        h = y[:batch] if reverse else y[-batch:]
        return y, h.clone(), c.to(gates.dtype, copy=True), saved, before
    one_size = not sizes or sizes[0] == sizes[-1]
    h = h if one_size else h.clone()
    hidden = gates.new_empty(batch, units) if projection is not None else None
    for at, size in _steps(sizes, reverse):
        if not size:
            continue
        product = _product(h[:size], weight, bias, width)
        out = y[at] if hidden is None else hidden[:size]
        kept = saved[at] if keep else None
        if lstm:
            cells.lstm(gates[at], product, c[:size], out, kept, before[at] if keep else None)
        else:
            cells.gru(gates[at], product, h[:size], out, kept)
        if projection is not None:
            y[at] = _product(out, projection, None, y.shape[1])
        if one_size:
            h = y[at]
        else:
            h[:size] = y[at]
    # The operator's results may not share memory.
    return y, h.clone(), c.to(gates.dtype, copy=True), saved, before


def backward(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    h0: Tensor,
    saved: Tensor,
    before: Tensor,
    weight: Weight,
    projection: Weight | None,
    sizes: Sequence[int],
    reverse: bool,
    lstm: bool,
    need_weight: bool,
    need_projection: bool,
    cells: ModuleType | None = None,
    whole: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `gates`, `h0`, `c0`, the weight, its bias and the projection.

    Args:
        dy: `(S, P)`.
        dh: `(B, P)`, of the hidden state at the end.
        dc: `(B, H)`, of the cell state at the end; empty for a GRU.
        y: What `forward` returned, and so `saved` and `before`.
        h0: As in `forward`, and so what follows.
        saved: See `y`.
        before: See `y`.
        weight: See `h0`.
        projection: See `h0`.
        sizes: See `h0`.
        reverse: See `h0`.
        lstm: Whether it is an LSTM.
        need_weight: Whether the weight's gradient is wanted; if not, it is empty.
        need_projection: The same of the projection.
        cells: Where the functions of the gates run.
        whole: What runs all steps at once.
    """
    cells = cells or _cells(y)
    rows, units = saved.shape[0], saved.shape[1] // 4
    dtype, batch, outputs = torch_cells.wide(y.dtype), h0.shape[0], h0.shape[1]
    dy = dy.contiguous()
    dgates = y.new_empty(rows, (4 if lstm else 3) * units)
    dproduct = dgates if lstm else torch.empty_like(dgates)
    state = h0.contiguous() if lstm else hidden_before(y, h0, sizes, reverse)
    # What comes past the product: the cell state of an LSTM, part of the hidden state of a GRU.
    past = dc.to(dtype, copy=True).contiguous() if lstm else y.new_zeros(batch, units, dtype=dtype)
    dh = dh.to(y.dtype, copy=True).contiguous()
    dhidden = y.new_empty(rows if projection is not None else 0, outputs)
    whole = whole or _whole(y, weight, projection, units, sizes)
    if whole is not None and weight.topo is not None:
        carried = (before if lstm else state, weight.values, weight.topo, len(sizes), reverse, lstm)
        whole.backward(dy, dh, past, saved, *carried, dgates, dproduct)
        first = slice(rows - batch, rows) if reverse else slice(batch)
        dh = _product_back(dproduct[first], weight, outputs)
    else:
        for at, size in reversed(list(_steps(sizes, reverse))):
            if not size:
                continue
            if projection is not None:
                torch.add(dy[at], dh[:size], out=dhidden[at])
                inner = _product_back(dhidden[at], projection, units)
                cells.lstm_back(None, inner, past[:size], saved[at], before[at], dgates[at])
            elif lstm:
                cells.lstm_back(dy[at], dh[:size], past[:size], saved[at], before[at], dgates[at])
            else:
                args = dy[at], dh[:size], past[:size], saved[at], state[at], dgates[at], dproduct[at]
                cells.gru_back(*args)
            step = _product_back(dproduct[at], weight, outputs)
            if size == batch:
                dh = step
            else:
                dh[:size] = step
    dweight, dprojection = y.new_empty(0), y.new_empty(0)
    if need_weight:
        state = hidden_before(y, h0, sizes, reverse) if lstm else state
        dweight = _weight_gradient(dproduct, state, weight)
    if need_projection and projection is not None:
        dprojection = _weight_gradient(dhidden, last_hidden(saved, before), projection)
    dh0 = dh if lstm else dh + past.to(y.dtype)
    dc0 = past.to(y.dtype, copy=True) if lstm else y.new_empty(0)
    return dgates, dh0, dc0, dweight, dproduct.sum(0), dprojection


def last_hidden(saved: Tensor, before: Tensor) -> Tensor:
    """An LSTM's hidden states before their projection, `(S, H)`, from what `forward` kept."""
    i, f, g, o = saved.to(before.dtype).chunk(4, 1)
    return (o * (f * before + i * g).tanh()).to(saved.dtype)


def _forward_op(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight: Tensor,
    topology: Sequence[Tensor],
    bias: Tensor | None,
    projection: Tensor | None,
    projection_topology: Sequence[Tensor],
    sizes: Sequence[int],
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = None if projection is None else _weight(projection, projection_topology)
    return forward(gates, h0, c0, _weight(weight, topology), bias, last, sizes, reverse, keep)


def _backward_op(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    h0: Tensor,
    saved: Tensor,
    before: Tensor,
    weight: Tensor,
    topology: Sequence[Tensor],
    projection: Tensor | None,
    projection_topology: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = None if projection is None else _weight(projection, projection_topology)
    return backward(dy, dh, dc, y, h0, saved, before, _weight(weight, topology), last, *rest)


def _fake_forward(gates: Tensor, h0: Tensor, c0: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    keep, lstm, rows = args[-1], c0 is not None, gates.shape[0]
    units = gates.shape[1] // (4 if lstm else 3)
    dtype = torch_cells.wide(gates.dtype)
    return (
        gates.new_empty(rows, h0.shape[1]),
        gates.new_empty(h0.shape),
        gates.new_empty(h0.shape[0] if lstm else 0, units),
        gates.new_empty(rows if keep else 0, 4 * units),
        gates.new_empty(rows if keep and lstm else 0, units, dtype=dtype),
    )


def _fake_backward(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    h0: Tensor,
    saved: Tensor,
    before: Tensor,
    weight: Tensor,
    topology: Sequence[Tensor],
    projection: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    lstm, need_weight, need_projection = rest[-3:]
    units = saved.shape[1] // 4
    width = (4 if lstm else 3) * units
    return (
        y.new_empty(saved.shape[0], width),
        y.new_empty(h0.shape),
        y.new_empty(h0.shape[0], units) if lstm else y.new_empty(0),
        y.new_empty(weight.shape) if need_weight else y.new_empty(0),
        y.new_empty(width),
        y.new_empty(projection.shape) if need_projection and projection is not None else y.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, h0, c0, weight, topology, bias, projection, projection_topology, sizes, reverse, _ = inputs
    y, h, c, saved, before = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(saved, before)
    ctx.save_for_backward(y, h0, saved, before, weight, projection, *topology, *projection_topology)
    ctx.lengths = len(topology), list(sizes)
    ctx.reverse, ctx.lstm, ctx.has_bias, ctx.shapes = (
        reverse,
        c0 is not None,
        bias is not None,
        (h.shape, c.shape),
    )


def _back(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    y, h0, saved, before, weight, projection, *indices = ctx.saved_tensors
    count, sizes = ctx.lengths
    shapes = (y.shape, *ctx.shapes)
    dy, dh, dc = (
        y.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads[:3], shapes, strict=True)
    )
    needs = ctx.needs_input_grad
    dgates, dh0, dc0, dweight, dbias, dprojection = torch.ops.sparsify.recurrence_back(
        dy, dh, dc, y, h0, saved, before, weight, indices[:count], projection, indices[count:], sizes, ctx.reverse,
        ctx.lstm, needs[3], projection is not None and needs[6],
    )  # fmt: skip
    return (
        dgates,
        dh0,
        dc0 if ctx.lstm else None,
        dweight if needs[3] else None,
        [None] * count,
        dbias if ctx.has_bias else None,
        dprojection if projection is not None and needs[6] else None,
        [None] * (len(indices) - count),
        None,
        None,
        None,
    )


_lib.impl("recurrence", _forward_op, "CompositeExplicitAutograd")
_lib.impl("recurrence_back", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::recurrence", _fake_forward, lib=_lib)
torch.library.register_fake("sparsify::recurrence_back", _fake_backward, lib=_lib)
torch.library.register_autograd("sparsify::recurrence", _back, setup_context=_save, lib=_lib)
for _key, _device in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
    _lib.impl("recurrence", library.autocasting("recurrence", _device), _key)
