"""The three products in plain torch: the CPU path, and the oracle that the Triton kernels are tested against.

Op names say the kinds of output and operands, S block-sparse and D dense (Triton's and STK's convention). With the
weight `W` `(N, K)`, activations `x` `(M, K)` and output gradient `dy` `(M, N)`:

    dsd:  y  = x W^T + bias      (M, N)
    dds:  dx = dy W              (M, K)
    sdd:  dW = dy^T x            at stored blocks only, (Z, bi, bo)

and, for inference, what may follow the forward product without another pass over its output: an activation, a product
with another tensor, and both as the first half of a gated MLP (`gated`).

Two ways, chosen by size. *Batched*: gather a tile of activations for every stored block, one batched product over the
blocks, add up by block row; few calls whatever the mask, run in chunks of tokens that stay in the cache. *By rows*:
gather the columns that one block row needs, one matrix product on the row's contiguous panel; fewer bytes moved, a
call for each row. MKL's BSR product is never used: it is slower than dense.
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


def _by_rows(tokens: int, values: Tensor) -> bool:
    """By rows pays for many tokens, whose sums (`sdd`) are better not cut, and for wide panels in float32."""
    block_out = values.shape[2]
    wide = tokens >= 128 and block_out >= 128 and values.dtype == torch.float32
    return values.device.type == "cpu" and (wide or (tokens >= 512 and block_out >= 64))


def _chunks(tokens: int, values: Tensor) -> Iterator[slice]:
    """Slices of the token dimension whose working set stays near `CHUNK_BYTES` on the CPU."""
    blocks, block_in, block_out = values.shape
    step = tokens
    if values.device.type == "cpu":
        bytes_per_token = max(1, blocks * (block_in + block_out) * values.element_size())
        step = min(max(CHUNK_BYTES // bytes_per_token, MIN_CHUNK), MAX_CHUNK)
    for begin in range(0, tokens, max(1, step)):
        yield slice(begin, begin + step)


def _sums(products: Tensor, group: Tensor, ends: Tensor) -> Tensor:
    """Sums of the products `(Z, m, b)` of each group, `(G, m, b)`; elsewhere than on the CPU they are sorted by group.

    A GPU adds up by index in any order; by runs its results are the same from call to call.
    """
    if products.device.type == "cpu":
        groups = ends.numel() - 1
        return products.new_zeros(groups, *products.shape[1:]).index_add_(0, group, products)
    return torch.segment_reduce(products, "sum", offsets=ends.long(), axis=0, initial=0)


def _row_ranges(topo: Topology) -> Iterator[tuple[int, int, int]]:
    """`(row, first block, end)` of every block row that is not empty."""
    starts = topo.crow.tolist()
    for row, (begin, end) in enumerate(pairwise(starts)):
        if begin < end:
            yield row, begin, end


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
    x_blocks = _pad_columns(x, cols * block_in).unflatten(1, (cols, block_in))  # [M, C, bi]
    if _by_rows(tokens, values):
        y = x.new_zeros(tokens, rows * block_out)
        for row, begin, end in _row_ranges(topo):
            gathered = x_blocks.index_select(1, topo.col[begin:end]).flatten(1)  # [M, nnz * bi]
            torch.mm(
                gathered, values[begin:end].flatten(0, 1), out=y[:, row * block_out : (row + 1) * block_out]
            )
    else:
        y = x.new_empty(tokens, rows * block_out)
        for part in _chunks(tokens, values):
            gathered = x_blocks[part].transpose(0, 1).index_select(0, topo.col)  # [Z, m, bi]
            products = torch.bmm(gathered, values)  # [Z, m, bo]
            total = _sums(products, topo.row, topo.crow)
            y[part].unflatten(1, (rows, block_out)).copy_(total.transpose(0, 1))
    y = y[:, :out_features].contiguous()
    if bias is not None:
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
    dx = dy.new_zeros(tokens, cols, block_in)
    if _by_rows(tokens, values):
        for row, begin, end in _row_ranges(topo):
            product = torch.mm(
                dy[:, row * block_out : (row + 1) * block_out], values[begin:end].flatten(0, 1).T
            )
            dx.index_add_(1, topo.col[begin:end], product.unflatten(1, (end - begin, block_in)))
    else:
        dy_blocks = dy.unflatten(1, (rows, block_out))  # [M, R, bo]
        for part in _chunks(tokens, values):
            gathered = dy_blocks[part].transpose(0, 1).index_select(0, topo.row)  # [Z, m, bo]
            products = torch.bmm(gathered, values.transpose(1, 2))  # [Z, m, bi]
            if products.device.type == "cpu":
                total = _sums(products, topo.col, topo.t_crow)
            else:
                total = _sums(products.index_select(0, topo.t_block), topo.col, topo.t_crow)
            dx[part].copy_(total.transpose(0, 1))
    return dx.flatten(1)[:, :in_features].contiguous()


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
    if _by_rows(tokens, dw):
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
