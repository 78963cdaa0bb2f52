"""Matrices of more than 2**31 elements, in every kernel that takes them."""

import gc

import pytest
import torch

from sparsify import BlockMask, BlockShape
from sparsify.kernels.storage import topology
from tests.gpu.test_stress_gpu import every_kernel
from tests.kernels.oracle import Case, assert_close
from tests.kernels.stress import check, poisoned_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 << 30,
        reason="needs a GPU of 40 GB",
    ),
]

DEVICE, DTYPE = "cuda", torch.bfloat16
TOKENS, LONG, SHORT = 160_000, 14336, 64  # 2.3e9 elements by the longer side


@pytest.fixture(autouse=True)
def memory_given_back():
    yield
    gc.collect()
    torch.cuda.empty_cache()


def _thin(rows, cols, block):
    """Values, indices and used long features of a weight with five blocks along its long side, the last one too."""
    shape = BlockShape(*block)
    grid = shape.grid((rows, cols))
    keep = torch.zeros(grid, dtype=torch.bool)
    along = torch.linspace(0, max(grid) - 1, 5).round().long()
    keep[(along, slice(None)) if grid[0] > grid[1] else (slice(None), along)] = True
    mask = BlockMask(keep, (rows, cols), shape)
    crow, col = (index.to(DEVICE) for index in mask.csr())
    values = torch.randn(mask.blocks_kept, shape.cols, shape.rows, device=DEVICE, dtype=DTYPE)
    return values, topology(crow, col, grid[1]), mask.elements().any(1 if rows > cols else 0).to(DEVICE)


def _run(op, kernel, *arguments):
    with poisoned_memory():
        result = kernel(*arguments)
    assert all(part.isfinite().all() for part in result.split(20_000)), f"{op} left something unwritten"
    return result


def _dense(values, topo, rows, cols):
    _, block_in, block_out = values.shape
    weight = values.new_zeros(rows, cols)
    for block, row, col in zip(values, topo.row.tolist(), topo.col.tolist(), strict=True):
        weight[row * block_out :, col * block_in :][:block_out, :block_in] = block.T
    return weight.double()


@pytest.mark.parametrize("block", [(64, 64), (128, 16), (32, 32)], ids=str)
def test_more_activations(block):
    """As result, as operand and under the sum over tokens, of forward product and both gradients."""
    big = torch.randn(TOKENS, LONG, device=DEVICE, dtype=DTYPE)
    small = torch.randn(TOKENS, SHORT * 2, device=DEVICE, dtype=DTYPE)
    checked = torch.tensor([0, 1, 2**31 // LONG - 1, 2**31 // LONG, TOKENS - 2, TOKENS - 1], device=DEVICE)
    for tall in (True, False):
        shape = (LONG, SHORT * 2) if tall else (SHORT * 2, LONG)
        values, topo, used = _thin(*shape, block)
        weight = _dense(values, topo, *shape)
        sizes = values.shape[1], values.shape[2]

        op, width = ("dsd", shape[0]) if tall else ("dds", shape[1])  # the result is large
        for name, kernel in every_kernel(op, small, values, sizes, width).items():
            arguments = (values, None, topo, width) if op == "dsd" else (values, topo, width)
            result = _run(f"{op} in {name}", kernel, small, *arguments)[checked]
            exact = small[checked].double() @ (weight.T if tall else weight)
            assert_close(result, exact, exact.to(DTYPE))

        op, width = ("dds", shape[1]) if tall else ("dsd", shape[0])  # the operand is large
        exact = big[:, used].double() @ (weight[used] if tall else weight[:, used].T)
        for name, kernel in every_kernel(op, big, values, sizes, width).items():
            arguments = (values, None, topo, width) if op == "dsd" else (values, topo, width)
            assert_close(_run(f"{op} in {name}", kernel, big, *arguments), exact, exact.to(DTYPE))

        dy, x = (big, small) if tall else (small, big)
        product = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
        product[used if tall else slice(None), slice(None) if tall else used] = (
            dy[:, used].double().T @ x.double() if tall else dy.double().T @ x[:, used].double()
        )
        for name, kernel in every_kernel("sdd", dy, x, sizes, topo.col.numel()).items():
            dw = _run(f"sdd in {name}", kernel, dy, x, topo, *sizes)
            exact = product * (weight != 0)
            assert_close(_dense(dw, topo, *shape).to(DTYPE), exact, exact.to(DTYPE))


@pytest.mark.parametrize("tokens", [16, 200])
def test_more_weights(tokens):
    block, side = 128, 128 * 363  # 131769 blocks, 2.2e9 elements
    grid = side // block
    keep = torch.ones(grid, grid, dtype=torch.bool)
    crow, col = BlockMask(keep, (side, side), BlockShape(block, block)).csr()
    topo = topology(crow.to(DEVICE), col.to(DEVICE), grid)
    values = torch.randn(grid * grid, block, block, device=DEVICE, dtype=DTYPE)
    assert values.numel() > 2**31
    x, dy = (torch.randn(tokens, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    rows = values.view(grid, grid, block, block)  # [row, col, in, out]
    for at in (0, grid // 2, grid - 1):
        here = slice(at * block, (at + 1) * block)
        forward = x.double() @ rows[at].flatten(0, 1).double()
        backward = dy.double() @ rows[:, at].transpose(1, 2).flatten(0, 1).double()
        for name, kernel in every_kernel("dsd", x, values, (block, block), side).items():
            y = _run(f"dsd in {name}", kernel, x, values, None, topo, side)
            assert_close(y[:, here], forward, forward.to(DTYPE))
        for name, kernel in every_kernel("dds", dy, values, (block, block), side).items():
            dx = _run(f"dds in {name}", kernel, dy, values, topo, side)
            assert_close(dx[:, here], backward, backward.to(DTYPE))
    del values, rows
    for name, kernel in every_kernel("sdd", dy, x, (block, block), grid * grid).items():
        dw = _run(f"sdd in {name}", kernel, dy, x, topo, block, block).view(grid, grid, block, block)
        for row, column in ((0, 0), (grid // 2, 7), (grid - 1, grid - 1)):
            exact = x[:, column * block :][:, :block].double().T @ dy[:, row * block :][:, :block].double()
            assert_close(dw[row, column], exact, exact.to(DTYPE))
        del dw


def test_rows_further_apart_than_32_bits_count():
    apart = 2**30 + 8

    def spread(t):
        buffer = torch.empty(2 * apart + t.shape[1], dtype=t.dtype, device=t.device)
        return buffer.as_strided(t.shape, (apart, 1)).copy_(t)

    check(every_kernel, Case(3, 520, 392, (64, 64), 0.6), DTYPE, DEVICE, arrange=spread)
