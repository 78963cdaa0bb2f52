"""The three products in plain torch: the CPU path, and the oracle that the Triton kernels are tested against.

Op names say the kinds of output and operands, S block-sparse and D dense (Triton's and STK's convention). With the
weight `W` `(N, K)`, activations `x` `(M, K)` and output gradient `dy` `(M, N)`:

    dsd:  y  = x W^T + bias      (M, N)
    dds:  dx = dy W              (M, K)
    sdd:  dW = dy^T x            at stored blocks only, (Z, bi, bo)

and, for inference, what may follow the forward product without another pass over its output: an activation, a product
with another tensor, and both as the first half of a gated MLP (`gated`).

Three ways, chosen by size. *Batched*: gather a tile of activations for every stored block, one batched product over the
blocks, add up by block row; few calls whatever the mask, run in chunks of tokens that stay in the cache. *By block*: a
product for each stored block, on views of activations and result, added up in place; nothing is copied, which pays for
the calls where a block and the tokens are large enough, but never in 16 bits. *By rows*: gather the columns that one
block row needs, one matrix product on the row's contiguous panel; sums are rounded once. MKL's BSR product is never
used: it is slower than dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sparsify.kernels.storage import Topology

# Bytes of gathered activations and products that one chunk of the batched way may hold: a few times the L2 cache of a
# core. Measured on two cores: 4 MB is best within a factor of two for float32 and bfloat16, at 80 % and at 90 %.
CHUNK_BYTES = 4 << 20
MIN_CHUNK, MAX_CHUNK = 32, 256

# Activations that a forward product can end with, "" for none; `gelu` is the exact one, with erf.
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")


# Multiply-adds of one block's product from which going block by block pays in float32, and the tokens it takes.
# Measured at 16x16 to 256x256: with one thread it would pay from a quarter of that, with two calls cost twice as much.
BLOCK_WORK, BLOCK_TOKENS = 1 << 20, 64


def _on_cpu(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _by_block(tokens: int, values: Tensor) -> bool:
    """By block pays for large products of float32."""
    if tokens < BLOCK_TOKENS or values.dtype != torch.float32 or not _on_cpu(values):
        return False
    _, block_in, block_out = values.shape
    return min(block_in, block_out) >= 32 and tokens * block_in * block_out >= BLOCK_WORK


def _by_rows(tokens: int, values: Tensor) -> bool:
    """By rows pays for many tokens, whose sums (`sdd`) are better not cut, and for wide panels in float32."""
    if tokens < 128 or not _on_cpu(values):
        return False
    block_out = values.shape[2]
    return (tokens >= 512 and block_out >= 64) or (values.dtype == torch.float32 and block_out >= 128)


def _chunks(tokens: int, values: Tensor) -> Iterator[slice]:
    """Slices of the token dimension whose working set stays near `CHUNK_BYTES` on the CPU."""
    blocks, block_in, block_out = values.shape
    step = tokens
    if _on_cpu(values):
        bytes_per_token = max(1, blocks * (block_in + block_out) * values.element_size())
        step = min(max(CHUNK_BYTES // bytes_per_token, MIN_CHUNK), MAX_CHUNK)
    for begin in range(0, tokens, max(1, step)):
        yield slice(begin, begin + step)


def _row_ranges(topo: Topology) -> Iterator[tuple[int, int, int]]:
    """`(row, first block, end)` of every block row that is not empty."""
    starts = topo.crow.tolist()
    for row, (begin, end) in enumerate(pairwise(starts)):
        if begin < end:
            yield row, begin, end


def _numbered(blocks: Tensor, topo: Topology) -> Iterator[tuple[Tensor, int, int]]:
    """`(block, row, column)` of every stored block."""
    return zip(blocks.unbind(0), topo.row.tolist(), topo.col.tolist(), strict=True)


def _in_place(side: int, values: Tensor) -> bool:
    """Whether adding up in the result itself, where rows of `side` elements lie apart, beats doing so elsewhere."""
    return _on_cpu(values) and side * values.element_size() >= 256


def _add_up(total: Tensor, index: Tensor, starts: Tensor, products: Tensor) -> None:
    """Sums the products `(Z, m, b)` of each block row (or column) in its part of `total` `(R, m, b)`.

    Where that is not done in place, `total` need not be set before. Elsewhere than on the CPU products come sorted: a
    GPU adds up by index in any order; by runs its results are the same from call to call.
    """
    if _in_place(total.shape[2], products):
        total.index_add_(0, index, products)
    elif _on_cpu(products):
        total.copy_(products.new_zeros(total.shape).index_add_(0, index, products))
    else:
        total.copy_(torch.segment_reduce(products, "sum", offsets=starts.long(), axis=0, initial=0))


def _pad_columns(x: Tensor, width: int) -> Tensor:
    return x if x.shape[1] == width else torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _grid(topo: Topology) -> tuple[int, int]:
    return topo.crow.numel() - 1, topo.t_crow.numel() - 1


def activate_(y: Tensor, activation: str) -> Tensor:
    """Applies one of `ACTIVATIONS` in place."""
    if activation == "relu":
        y.relu_()
    elif activation == "silu":
        torch.nn.functional.silu(y, inplace=True)
    elif activation:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_(y, approximate=approximate)
    return y


def dsd(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    topo: Topology,
    out_features: int,
    activation: str = "",
    multiply: Tensor | None = None,
) -> Tensor:
    """`y = activation(x W^T + bias) * multiply`.

    Args:
        x: `(M, K)`.
        values: `(Z, bi, bo)`, the dtype of `x`.
        bias: `(N,)` or `None`.
        topo: Indices of the weight.
        out_features: `N`.
        activation: One of `ACTIVATIONS`.
        multiply: `(M, N)`, contiguous, the dtype of `x`; `None` for no factor.

    Returns:
        `(M, N)`, contiguous.
    """
    tokens, (block_in, block_out) = x.shape[0], values.shape[1:]
    rows, cols = _grid(topo)
    x = _pad_columns(x, cols * block_in)
    by_block = _by_block(tokens, values)
    by_rows = not by_block and _by_rows(tokens, values)
    sums = by_block or (not by_rows and _in_place(block_out, values))  # products are added to what is there
    first = bias if sums and out_features == rows * block_out else None
    y = x.new_zeros(tokens, rows * block_out) if first is None else first.repeat(tokens, 1)
    if by_block:
        x_cols, y_rows = x.split(block_in, 1), y.split(block_out, 1)
        for block, row, col in _numbered(values, topo):
            y_rows[row].addmm_(x_cols[col], block)
    elif by_rows:
        x_blocks = x.unflatten(1, (cols, block_in))  # [M, C, bi]
        for row, begin, end in _row_ranges(topo):
            gathered = x_blocks.index_select(1, topo.col[begin:end]).flatten(1)  # [M, nnz * bi]
            torch.mm(
                gathered, values[begin:end].flatten(0, 1), out=y[:, row * block_out : (row + 1) * block_out]
            )
    else:
        x_blocks = x.unflatten(1, (cols, block_in)).transpose(0, 1)  # [C, M, bi]
        y_blocks = y.unflatten(1, (rows, block_out)).transpose(0, 1)  # [R, M, bo]
        for part in _chunks(tokens, values):
            products = torch.bmm(x_blocks[:, part].index_select(0, topo.col), values)  # [Z, m, bo]
            _add_up(y_blocks[:, part], topo.row, topo.crow, products)
    y = y[:, :out_features].contiguous()
    if bias is not None and first is None:
        y += bias
    activate_(y, activation)
    if multiply is not None:
        y *= multiply
    return y


def gated(
    x: Tensor,
    gate_values: Tensor,
    gate_bias: Tensor | None,
    gate_topo: Topology,
    up_values: Tensor,
    up_bias: Tensor | None,
    up_topo: Topology,
    out_features: int,
    activation: str,
) -> Tensor:
    """`y = activation(x Wg^T + bg) * (x Wu^T + bu)`: gate and up projection of a gated MLP.

    Args:
        x: `(M, K)`.
        gate_values: `(Zg, bi, bo)`, the dtype of `x`.
        gate_bias: `(N,)` or `None`.
        gate_topo: Indices of the gate's weight.
        up_values: `(Zu, bi', bo')`, the dtype of `x`; its blocks may have another shape than the gate's.
        up_bias: `(N,)` or `None`.
        up_topo: Indices of the other weight.
        out_features: `N`.
        activation: One of `ACTIVATIONS`.

    Returns:
        `(M, N)`, contiguous.
    """
    gate = dsd(x, gate_values, gate_bias, gate_topo, out_features, activation)
    return dsd(x, up_values, up_bias, up_topo, out_features, multiply=gate)


def dds(dy: Tensor, values: Tensor, topo: Topology, in_features: int) -> Tensor:
    """`dx = dy W`: the transposed product, without moving the values.

    Args:
        dy: `(M, N)`.
        values: `(Z, bi, bo)`, the dtype of `dy`.
        topo: Indices of the weight.
        in_features: `K`.

    Returns:
        `(M, K)`, contiguous.
    """
    tokens, (block_in, block_out) = dy.shape[0], values.shape[1:]
    rows, cols = _grid(topo)
    dy = _pad_columns(dy, rows * block_out)
    dx = dy.new_zeros(tokens, cols * block_in)
    if _by_block(tokens, values):
        dy_rows, dx_cols = dy.split(block_out, 1), dx.split(block_in, 1)
        for block, row, col in _numbered(values.transpose(1, 2), topo):
            dx_cols[col].addmm_(dy_rows[row], block)
    elif _by_rows(tokens, values):
        dx_blocks = dx.unflatten(1, (cols, block_in))
        for row, begin, end in _row_ranges(topo):
            product = torch.mm(
                dy[:, row * block_out : (row + 1) * block_out], values[begin:end].flatten(0, 1).T
            )
            dx_blocks.index_add_(1, topo.col[begin:end], product.unflatten(1, (end - begin, block_in)))
    else:
        order, index = (None, topo.row) if _on_cpu(values) else (topo.t_block, topo.t_row)
        blocks = values if order is None else values.index_select(0, order)
        dy_blocks = dy.unflatten(1, (rows, block_out)).transpose(0, 1)  # [R, M, bo]
        dx_blocks = dx.unflatten(1, (cols, block_in)).transpose(0, 1)  # [C, M, bi]
        for part in _chunks(tokens, values):
            products = torch.bmm(
                dy_blocks[:, part].index_select(0, index), blocks.transpose(1, 2)
            )  # [Z, m, bi]
            _add_up(dx_blocks[:, part], topo.col, topo.t_crow, products)
    return dx[:, :in_features].contiguous()


def sdd(dy: Tensor, x: Tensor, topo: Topology, block_in: int, block_out: int) -> Tensor:
    """`dW = dy^T x`, computed at the stored blocks only.

    Args:
        dy: `(M, N)`.
        x: `(M, K)`, the dtype of `dy`.
        topo: Indices of the weight.
        block_in: `bi`.
        block_out: `bo`.

    Returns:
        `(Z, bi, bo)`, contiguous; exactly zero in the padding.
    """
    tokens, blocks = x.shape[0], topo.col.numel()
    rows, cols = _grid(topo)
    x_blocks = _pad_columns(x, cols * block_in).unflatten(1, (cols, block_in))  # [M, C, bi]
    dy = _pad_columns(dy, rows * block_out)
    dw = x.new_zeros(blocks, block_in, block_out)
    if _by_block(tokens // 4, dw):  # with so few results to share, threads help little
        x_cols, dy_rows = x_blocks.flatten(1).T.split(block_in), dy.split(block_out, 1)
        for block, row, col in _numbered(dw, topo):
            torch.mm(x_cols[col], dy_rows[row], out=block)
    elif _by_rows(tokens, dw):
        for row, begin, end in _row_ranges(topo):
            gathered = x_blocks.index_select(1, topo.col[begin:end]).flatten(1)  # [M, nnz * bi]
            dy_row = dy[:, row * block_out : (row + 1) * block_out]
            torch.mm(gathered.T, dy_row, out=dw[begin:end].view(-1, block_out))
    else:
        dy_blocks = dy.unflatten(1, (rows, block_out))  # [M, R, bo]
        for part in _chunks(tokens, dw):
            dy_part = dy_blocks[part].transpose(0, 1).index_select(0, topo.row)  # [Z, m, bo]
            x_part = x_blocks[part].transpose(0, 1).index_select(0, topo.col)  # [Z, m, bi]
            dw.baddbmm_(x_part.transpose(1, 2), dy_part)
    return dw
