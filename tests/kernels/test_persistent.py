"""All time steps in one launch: against the steps one by one, and against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sparsify.kernels.recurrent import cells, recurrence, triton_recurrence
from sparsify.kernels.recurrent.recurrence import Weight
from tests.kernels.test_cells import TOLERANCE, numbers, weight

# Sequences, units, block, steps: several tiles of units and of sequences, one sequence, blocks wider than a tile.
SHAPES = [(3, 48, "16x16", 4), (1, 64, "32x16", 3), (70, 32, "16x32", 2), (16, 96, "32x64", 3)]
LARGE = [(1, 1024, "64x64", 40), (16, 2048, "64x64", 20), (64, 1024, "32x32", 40), (100, 768, "128x16", 30)]


def compare(shape, lstm, reverse, dtype, device, density=0.5, tolerance=4.0):
    batch, units, block, steps = shape
    packed, dense = weight((4 if lstm else 3) * units, units, block, density, dtype, device)
    assert triton_recurrence.takes(packed.values, packed.values, units, [batch] * steps)
    width = dense.shape[0]
    gates = numbers(steps * batch, width, dtype=dtype, device=device)
    bias = numbers(width, dtype=dtype, device=device, scale=0.1)
    h0, c0, dh, dc = (numbers(batch, units, dtype=dtype, device=device, scale=0.5) for _ in range(4))
    dy = numbers(steps * batch, units, dtype=dtype, device=device)
    found = []
    for given, kind, way in (
        (packed, dtype, {"whole": triton_recurrence}),
        (Weight(dense), torch.float64, {"cells": cells}),
    ):
        place = device if kind == dtype else "cpu"
        g, b, h, c, a, d, e = (t.to(place, kind) for t in (gates, bias, h0, c0, dy, dh, dc))
        sizes = [batch] * steps
        y, *ends, saved, before = recurrence.forward(
            g, h, c if lstm else None, given, b, None, sizes, reverse, True, **way
        )
        quiet = recurrence.forward(g, h, c if lstm else None, given, b, None, sizes, reverse, False, **way)
        assert torch.equal(quiet[0], y) and quiet[3].numel() == 0
        grads = recurrence.backward(
            a,
            d,
            e if lstm else e[:0],
            y,
            h,
            saved,
            before,
            given,
            None,
            sizes,
            reverse,
            lstm,
            False,
            False,
            **way,
        )
        found.append([y, *ends, *grads])
    for got, expected in zip(*found, strict=True):
        if expected.numel():
            gap = (got.double().cpu() - expected).norm()
            assert float(gap) <= tolerance * TOLERANCE[dtype] * float(expected.norm())


def every_pair():
    """Of shape, cell, direction and dtype: any value of one meets any of another; all combinations run on a GPU."""
    for i, shape in enumerate(SHAPES):
        for j, dtype in enumerate(TOLERANCE):
            lstm, reverse = (i + j) % 2 == 0, (i // 2 + j) % 2 == 1
            name = f"{shape}-{'lstm' if lstm else 'gru'}-{'backwards' if reverse else 'forwards'}-{dtype}"
            yield pytest.param(shape, lstm, reverse, dtype, id=name)


@pytest.mark.parametrize(("shape", "lstm", "reverse", "dtype"), list(every_pair()))
def test_against_float64(shape, lstm, reverse, dtype):
    compare(shape, lstm, reverse, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64_compiled(shape, lstm, reverse, dtype):
    compare(shape, lstm, reverse, dtype, "cuda")


@pytest.mark.parametrize("density", [0.0, 1.0], ids=["empty", "full"])
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
def test_extreme_masks(lstm, density):
    compare((3, 32, "16x16", 3), lstm, False, torch.float32, "cpu", density)


@pytest.mark.parametrize(
    ("units", "block", "sizes", "taken"),
    [
        (32, "16x16", [2, 2], True),
        (32, "16x16", [2, 1], False),
        (32, "16x16", [2], False),
        (40, "16x16", [2, 2], False),
        (32, "8x16", [2, 2], False),
        (32, "16x16", [200, 200], False),
    ],
    ids=["even", "uneven", "one-step", "odd-units", "low-blocks", "many-sequences"],
)
def test_what_it_takes(units, block, sizes, taken):
    packed, _ = weight(4 * units, units, block, 0.5, torch.float32, "cpu")
    assert triton_recurrence.takes(packed.values, packed.values, units, sizes) is taken


@pytest.mark.gpu
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_many_programs(shape, lstm, reverse):
    """With as many programs as the GPU runs at a time: whoever reads before the others have written is found out."""
    # Against float64 a recurrence of bfloat16 drifts over many steps; float32 shows a stale read all the same.
    compare(shape, lstm, reverse, torch.float32, "cuda", 0.25, tolerance=50.0)


@pytest.mark.gpu
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_same_results_again_and_again_and_as_a_cuda_graph(shape, lstm):
    batch, units, block, steps = shape
    packed, dense = weight((4 if lstm else 3) * units, units, block, 0.25, torch.bfloat16, "cuda")
    gates = numbers(steps * batch, dense.shape[0], dtype=torch.bfloat16, device="cuda")
    h0 = torch.zeros(batch, units, dtype=torch.bfloat16, device="cuda")
    c0 = torch.zeros_like(h0) if lstm else None

    def run():
        y, _, _, saved, before = recurrence.forward(
            gates, h0, c0, packed, None, None, [batch] * steps, False, True, whole=triton_recurrence
        )
        ends = (y, torch.ones_like(h0), torch.ones_like(h0) if lstm else h0[:0], y, h0, saved, before)
        grads = recurrence.backward(
            *ends, packed, None, [batch] * steps, False, lstm, False, False, whole=triton_recurrence
        )
        return y, grads[0]

    first = [tensor.clone() for tensor in run()]
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
    for tensor in again:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from sparsify.kernels.recurrent import triton_recurrence

name, capability, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
kernel = getattr(triton_recurrence, name)
names = kernel.arg_names
INDICES = {"counter_ptr", "crow_ptr", "col_ptr", "t_crow_ptr", "t_row_ptr", "t_block_ptr"}
lstm = sys.argv[4] == "lstm"
high, width, step, warps = map(int, sys.argv[5].split(","))
wide = {"c_ptr", "past_ptr", "before_ptr"} if lstm else {"c_ptr", "past_ptr"}
constants = dict(
    LSTM=lstm, REVERSE=True, KEEP=True, HAS_BIAS=True, BI=64, BO=64, BM=high, U=width, BK=step, PRECISION="ieee",
    WIDEN=False,
)
constants = {n: v for n, v in constants.items() if n in names}
types = {n: "i32" if not n.endswith("_ptr") else "*i32" if n in INDICES else "*" + dtype for n in names}
types |= dict.fromkeys(wide & set(names), "*fp32") | dict.fromkeys(constants, "constexpr")
attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "H"}
source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, attributes)
options = {"num_warps": warps, "num_stages": 3, "launch_cooperative_grid": True}
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
assert compiled.metadata.shared <= 101376, compiled.metadata.shared
code = compiled.asm["ptx"]
# The state goes past the L1 cache, and programs meet by a counter that orders what they wrote before.
assert "cp.async.cg.shared.global" in code
assert code.count("atom.global.gpu.acq_rel.add") == 1 and "global.gpu.acquire" in code
with tempfile.TemporaryDirectory() as folder:
    ptx = Path(folder, "kernel.ptx")
    ptx.write_text(code)
    architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", ptx, "-o", f"{ptx}.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
assert int(re.search(r"(\\d+) bytes spill stores", done.stderr).group(1)) <= 64, done.stderr
"""

SMALL, SQUARE = "16,16,128,4", "32,32,64,8"
COMPILED = [
    ("_forward_kernel", 90, "bf16", "lstm", SMALL),
    ("_backward_kernel", 90, "bf16", "lstm", SMALL),
    *(
        pytest.param(name, capability, dtype, cell, tile, marks=pytest.mark.slow)
        for name in ("_forward_kernel", "_backward_kernel")
        for capability in (90, 80)
        for dtype in ("bf16", "fp32")
        for cell, tile in (("gru", SMALL), ("lstm", SQUARE))
    ),
]


@pytest.mark.parametrize(("name", "capability", "dtype", "cell", "tile"), COMPILED)
def test_compiles_for_a_gpu(name, capability, dtype, cell, tile):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name, str(capability), dtype, cell, tile]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
