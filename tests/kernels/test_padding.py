"""What comes before and after the Hopper kernel of grouped products: rows of slots, work lists, tiles of programs.

That kernel does not run here; `emulate` walks the same lists in its place, so that all but its machine code is checked.
"""

import os

import pytest
import torch
from torch.nn import functional as F

from sparsify.kernels.grouped import reference as grouped_reference
from sparsify.kernels.grouped.work_grouped import grouped_steps
from tests.kernels.grouped_oracle import Case, make

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, see tests/gpu"
)

CASES = [
    Case(60, 2, 4, 256, 192, (64, 64), bias=False),
    Case(
        50, 2, 5, 192, 130, (64, 64), routing="few", bias=False
    ),  # an odd number of block rows, padded columns
    Case(45, 2, 3, 200, 256, (128, 64), routing="none", bias=False),
    Case(40, 1, 3, 128, 256, (64, 128), routing="one", bias=False),
    Case(30, 2, 3, 256, 256, (128, 128), density=0.0, bias=False),
    Case(1, 2, 4, 64, 64, (64, 64), density=1.0, bias=False),
]


def emulate(padding, work, x, values, width, block_out, tile, transposed):
    """`linear_kernel`: every program walks its items, every item the steps of its row pair."""
    y = x.new_full((padding.rows, width + 64), float("nan"))
    x = F.pad(x, (0, 64 * (1 + int(work.column.max())) - x.shape[1]))
    subs, flat, done = block_out // 64, values.reshape(-1, block_out), set()
    bins, ptr = padding.bins.tolist(), work.ptr.tolist()
    for item in padding.items[: bins[-1]].tolist():
        group, row = item & 0xFFFF, (item >> 16) * tile
        assert (group, row) not in done
        done.add((group, row))
        for subs_of, out in ((work.first, work.first_out), (work.second, work.second_out)):
            total, begin = x.new_zeros(tile, 64), int(out[group])
            for step in range(ptr[group], ptr[group + 1]):
                number = int(subs_of[step])
                if number >= 0:
                    at, column = number // subs * 64, number % subs * 64
                    block = flat[at : at + 64, column : column + 64]
                    tokens = x[row : row + tile, int(work.column[step]) * 64 :][:, :64]
                    total += tokens @ (block.T if transposed else block)
            if 0 <= begin < width:
                y[row : row + tile, begin : begin + 64] = total
    return y[:, :width].contiguous()


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize(("case", "programs"), list(zip(CASES, [3, 40] * 3, strict=True)), ids=str)
def test_products_by_these_lists(case, transposed, programs):
    from sparsify.kernels.grouped.triton_padding import gather, pad, scatter

    tile, o = 16, make(case, torch.float32)
    work = grouped_steps(o.topo, case.experts, case.block, transposed)
    padding = pad(o.groups, tile, work.pairs, programs)
    assert padding.bins[0] == 0 and padding.bins.diff().max() - padding.bins.diff().min() <= 1
    operand, width = (o.dy, case.in_features) if transposed else (o.x, case.out_features)
    x = gather(operand, padding)
    y = emulate(padding, work, x, o.values, width, case.block[0], tile, transposed)
    if transposed:
        expected = grouped_reference.grouped_dx(o.dy, o.values, o.topo, o.groups, width)
        torch.testing.assert_close(scatter(y, padding), expected)
        return
    for options in ("", None, False), ("silu", o.scale, True), ("relu", o.scale, False):
        expected = grouped_reference.grouped(o.x, o.values, None, o.topo, o.groups, width, *options)
        torch.testing.assert_close(scatter(y, padding, *options), expected)


def test_strided_activations_are_gathered():
    from sparsify.kernels.grouped.triton_padding import gather, pad

    o = make(CASES[0], torch.float32)
    padding, x = pad(o.groups, 16, 2, 4), torch.randn(60, 384)[:, ::2]
    assert torch.equal(gather(x, padding)[padding.place.long()], x.repeat_interleave(2, 0))


@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("routing", ["uniform", "one", "few", "none"])
def test_rows_of_slots(routing, tile):
    """Every expert begins with a new tile, in its slots' order; nothing else is in it."""
    from sparsify.kernels.grouped.triton_padding import pad

    case = Case(90, 2, 7, 64, 64, (64, 64), routing=routing)
    o = make(case, torch.float32)
    padding = pad(o.groups, tile, 5, 4)
    place, begin = padding.place, 0
    assert (place[o.experts >= 7] == -1).all()
    for expert in range(7):
        own = (o.experts == expert).nonzero().flatten()
        assert place[own].tolist() == list(range(begin, begin + len(own)))
        begin += -(-len(own) // tile) * tile
    assert begin <= padding.rows
    items = padding.items[: int(padding.bins[-1])]
    assert len(items) == begin // tile * 5
    owner = torch.full((begin // tile,), -1)
    owner[place[place >= 0].long() // tile] = o.experts[place >= 0]
    assert torch.equal((items & 0xFFFF) // 5, owner[items.long() >> 16].int())
    assert len(items.unique()) == len(items)
