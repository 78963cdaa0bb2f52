"""The Hopper kernels' work lists: walked over in torch, step by step as a kernel does, they give the dense product."""

import pytest
import torch

from sparsify import BlockMask, BlockShape, BlockSparseLinear
from sparsify.kernels import schedule
from sparsify.kernels.linear import work_decode, work_narrow, work_square
from sparsify.kernels.storage import Topology, pack, topology, unpack

SUB = schedule.SUB
NARROW = [(32, 32), (16, 16), (64, 16), (32, 64), (128, 16), (16, 128), (256, 32), (128, 32)]
SHAPES = [(256, 384), (200, 300), (512, 160)]


def make(
    shape: tuple[int, int], block: tuple[int, int], sparsity: float = 0.6
) -> tuple[torch.Tensor, Topology]:
    """Packed random float64 values and their indices; the second block row is empty."""
    torch.manual_seed(0)
    block_shape = BlockShape(*block)
    keep = torch.rand(block_shape.grid(shape)) >= sparsity
    if keep.shape[0] > 1:
        keep[1] = False
    mask = BlockMask(keep, shape, block_shape)
    values = pack(torch.randn(shape, dtype=torch.float64), mask)
    return values, topology(*mask.csr(), keep.shape[1])


def columns_of(x: torch.Tensor, first: int, width: int) -> torch.Tensor:
    """`width` columns of `x` from `first` on, zero outside, as the copy engine reads them."""
    padded = torch.zeros(x.shape[0], width, dtype=x.dtype)
    inside = x[:, first : first + width]
    padded[:, : inside.shape[1]] = inside
    return padded


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", NARROW, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["dsd", "dds"])
def test_stacks(shape, block, transposed):
    values, topo = make(shape, block)
    work = work_narrow.stacks(topo, block, transposed)
    weight = unpack(values, topo.crow, topo.col, shape)
    width, features = reversed(shape) if transposed else shape
    x = torch.randn(3, features, dtype=torch.float64)
    panels = _panels(values, work, block, transposed)
    y = torch.full((3, width), float("nan"), dtype=torch.float64)
    per_step = SUB // work.part
    for group, (begin, both, firsts, end) in enumerate(work.bound.tolist()):
        assert end - begin == work.cost[group]
        row0, row1, at, valid = work.panel[group].tolist()
        sums = torch.zeros(2, 3, SUB, dtype=torch.float64)
        for step in range(begin, end):
            own = work.column[step * per_step : (step + 1) * per_step].tolist()
            tokens = torch.cat([columns_of(x, first, work.part) for first in own], 1)
            if step == end - 1:
                tokens[:, valid * work.part :] = 0  # another row's: not multiplied
            if step < firsts:
                sums[0] += tokens @ panels[row0 : row0 + SUB, at : at + SUB]
                row0 += SUB
            if step < both or step >= firsts:
                beside = at + (SUB if work.source is None else 0)
                sums[1] += tokens @ panels[row1 : row1 + SUB, beside : beside + SUB]
                row1 += SUB
        for out, own in zip(work.out[group].tolist(), sums, strict=True):
            if out >= 0:
                y[:, out : out + SUB] = own[:, : max(0, min(SUB, width - out))]
    torch.testing.assert_close(y, x @ (weight if transposed else weight.T))


def _panels(values, work, block, transposed):
    beyond = torch.zeros(SUB, block[0] if work.source is None else SUB, dtype=values.dtype)
    if work.source is None:
        return torch.cat([values.reshape(-1, block[0]), beyond])
    part_stride, high_stride = (1, block[0]) if transposed else (block[0], 1)
    inside = torch.arange(work.part)[:, None] * part_stride + torch.arange(work.high) * high_stride
    panels = torch.zeros(work.source.shape[0], work.part, SUB // work.high, work.high, dtype=values.dtype)
    for piece, sources in enumerate(work.source.tolist()):
        for place, source in enumerate(sources):
            if source >= 0:
                panels[piece, :, place] = values.flatten()[source + inside]
    return torch.cat([panels.reshape(-1, SUB), beyond])


@pytest.mark.parametrize("block", [*NARROW, (64, 64), (128, 64), (64, 128), (256, 256)], ids=str)
def test_units_of_the_weight_gradient(block):
    values, topo = make((512, 512), block)
    x, dy = torch.randn(5, 512, dtype=torch.float64), torch.randn(5, 512, dtype=torch.float64)
    product = dy.T @ x
    dw = torch.full_like(values, float("nan"))
    if min(block) >= SUB:
        work, subs = work_square.units(topo, block), block[0] // SUB
        rows = dw.view(-1, block[0])
        for unit in work.table.tolist():
            for who in range(2):
                for column, number in zip(unit[2 + 2 * who :][:2], unit[6 + 2 * who :][:2], strict=True):
                    if number >= 0:
                        row, at = number // subs * SUB, number % subs * SUB
                        sums = product[unit[who] * SUB :][:SUB, column * SUB :][:, :SUB]
                        rows[row : row + SUB, at : at + SUB] = sums.T
        assert not work.shared or torch.equal(work.table[:, 2:4], work.table[:, 4:6])
    else:
        work, flat = work_narrow.narrow_units(topo, block), dw.view(-1)
        parts = 2 * SUB // work.part
        inside = torch.arange(work.part)[:, None] * block[0] + torch.arange(work.high)
        for unit, cells in zip(work.table.tolist(), work.cells.tolist(), strict=True):
            for who in range(2):
                for place, row in enumerate(cells[who]):
                    for part, cell in enumerate(row):
                        if cell >= 0:
                            first, out = unit[2 + who * parts + part], unit[who] + place * work.high
                            flat[cell + inside] = product[out:][: work.high, first:][:, : work.part].T
        assert not work.shared or torch.equal(work.table[:, 2 : 2 + parts], work.table[:, 2 + parts :])
    expected = torch.empty_like(values)
    for block_at, (row, col) in enumerate(zip(topo.row.tolist(), topo.col.tolist(), strict=True)):
        expected[block_at] = product[row * block[0] :][: block[0], col * block[1] :][:, : block[1]].T
    assert torch.equal(dw, expected)


@pytest.mark.parametrize("block", [(64, 64), (128, 16), (256, 32), (64, 128)], ids=str)
@pytest.mark.parametrize("weights", [1, 2])
@pytest.mark.parametrize("most_parts", [1, 4])
def test_decode_work(block, weights, most_parts):
    shape = (512, 1000)
    made = [make(shape, block, sparsity) for sparsity in (0.4, 0.8)[:weights]]
    height = min(block[0], 128)
    work = work_decode.decode_work([topo for _, topo in made], block, height, 24, 2, most_parts)
    x = torch.randn(2, shape[1], dtype=torch.float64)
    part = min(block[1], SUB)
    sums = torch.zeros(weights, 2, shape[0], dtype=torch.float64)
    arrived: dict[int, list[int]] = {}
    for program, (group, count, firsts, parts, base, *valid) in enumerate(work.programs.tolist()):
        arrived.setdefault(group, []).append(program)
        assert base <= program < base + parts <= base + most_parts
        at = group % (block[0] // height) * height
        for i in range(count):
            row, *features = work.units[program * work.most + i].tolist()
            which = int(i >= firsts)
            rows = columns_of(made[which][0].reshape(-1, block[0]).T, row, SUB).T
            if i == (firsts, count)[which] - 1:
                rows[valid[which] * part :] = 0  # another row's: not multiplied
            tokens = torch.cat([columns_of(x, first, part) for first in features], 1)
            out = slice(group * height, (group + 1) * height)
            sums[which][:, out] += tokens @ rows[:, at : at + height]
    assert sorted(arrived) == list(range(work.groups))
    assert all(len(programs) == work.programs[programs[0], 3] for programs in arrived.values())
    for own, (values, topo) in zip(sums, made, strict=True):
        torch.testing.assert_close(own, x @ unpack(values, topo.crow, topo.col, shape).T)


def test_lists_and_plans_last_as_long_as_the_indices():
    _, topo = make((256, 256), (64, 64))
    work, plans = work_square.steps(topo, (64, 64), False), schedule.plans(topo)
    for index in topo:  # as DistributedDataParallel does before each step
        index.copy_(index.clone())
    assert work_square.steps(topo, (64, 64), False) is work
    assert schedule.plans(topo) is plans


def test_loaded_indices_have_lists_of_their_own():
    keep = torch.rand(4, 4) < 0.5
    masks = [BlockMask(kept, (256, 256), BlockShape(64, 64)) for kept in (keep, keep.flip(0))]
    layer, other = (BlockSparseLinear(256, 256, (64, 64), mask=mask) for mask in masks)
    before = layer.topology("weight")
    work, plans = work_square.steps(before, (64, 64), False), schedule.plans(before)
    layer.load_state_dict(other.state_dict())
    topo = layer.topology("weight")
    assert topo.col is before.col  # written in place
    assert work_square.steps(topo, (64, 64), False) is not work
    assert schedule.plans(topo) is not plans


def test_weights_are_unchanged_until_somebody_writes_to_them():
    weight = torch.randn(4)
    assert not schedule.unchanged(weight)
    assert schedule.unchanged(weight)
    weight.mul_(2)
    assert not schedule.unchanged(weight)
    assert schedule.unchanged(weight)
    with torch.inference_mode():
        assert not schedule.unchanged(torch.randn(4))
