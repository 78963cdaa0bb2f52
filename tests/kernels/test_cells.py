"""The functions of an LSTM's and a GRU's gates: torch's against float64 autograd, Triton's against torch's."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.kernels.recurrent import cells, recurrence, triton_cells
from sparsify.kernels.recurrent.recurrence import Weight
from sparsify.kernels.storage import pack, topology

SIZES = [(1, 16), (3, 40), (2, 515)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def numbers(
    *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu", scale: float = 2.0
) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)


def poison(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype, device=like.device)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_triton_equals_torch(size, dtype, device):
    batch, units = size
    gates, product = (numbers(batch, 4 * units, dtype=dtype, device=device) for _ in range(2))
    c, h = numbers(batch, units, device=device).float(), numbers(batch, units, dtype=dtype, device=device)
    dy, dh = (numbers(batch, units, dtype=dtype, device=device) for _ in range(2))
    past = numbers(batch, units, device=device).float()
    results, kept = [], []
    for module in (cells, triton_cells):
        cell, out = c.clone(), poison(batch, units, like=h)
        saved, before = poison(batch, 4 * units, like=h), poison(batch, units, like=c)
        module.lstm(gates, product, cell, out, saved, before)
        again, quiet = c.clone(), poison(batch, units, like=h)
        module.lstm(gates, product, again, quiet, None, None)
        assert torch.equal(quiet, out) and torch.equal(again, cell)
        narrow = [half[:, : 3 * units].contiguous() for half in (gates, product)]
        g, g_saved = poison(batch, units, like=h), poison(batch, 4 * units, like=h)
        module.gru(narrow[0], narrow[1], h, g, g_saved)
        # The way back starts from the same: where a gate is nearly shut, its last bit makes all the difference.
        kept = kept or [saved, before, g_saved]
        dc, dgates = past.clone(), poison(batch, 4 * units, like=h)
        module.lstm_back(dy, dh, dc, *kept[:2], dgates)
        dc_inner, dgates_inner = past.clone(), poison(batch, 4 * units, like=h)
        module.lstm_back(None, dh, dc_inner, *kept[:2], dgates_inner)
        carry, d1, d2 = past.clone(), *(poison(batch, 3 * units, like=h) for _ in range(2))
        module.gru_back(dy, dh, carry, kept[2], h, d1, d2)
        results.append(
            (cell, out, saved, before, dc, dgates, dc_inner, dgates_inner, g, g_saved, carry, d1, d2)
        )
    for expected, got in zip(*results, strict=True):
        scale = float(expected.abs().max().clamp(min=1))
        torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_large_sums_do_not_overflow():
    gates = torch.tensor([[-200.0, 200.0, -200.0, 200.0]]).repeat_interleave(8, 1)
    for module in (cells, triton_cells):
        c, h = torch.ones(1, 8), torch.empty(1, 8)
        module.lstm(gates, gates, c, h, None, None)
        torch.testing.assert_close(h, torch.full((1, 8), 1.0).tanh())


def weight(
    rows: int, cols: int, block: str, density: float, dtype: torch.dtype, device: str
) -> tuple[Weight, torch.Tensor]:
    shape = BlockShape.parse(block)
    keep = torch.rand(*shape.grid((rows, cols))) < density
    mask = BlockMask(keep, (rows, cols), shape)
    dense = numbers(rows, cols, scale=cols**-0.5) * mask.elements()
    crow, col = mask.csr()
    topo = topology(crow.to(device), col.to(device), keep.shape[1])
    return Weight(pack(dense, mask).to(device, dtype), topo), dense


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", [[3, 3, 3], [4, 2, 1, 1]], ids=["even", "uneven"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("lstm", [True, False], ids=["lstm", "gru"])
def test_recurrence_with_the_kernels_against_float64(lstm, reverse, sizes, dtype, device):
    """The whole recurrence with Triton's cells, forward and back, against the reference in float64."""
    units, gates_of, batch, rows = 40, 4 if lstm else 3, sizes[0], sum(sizes)
    packed, dense = weight(gates_of * units, units, "16x8", 0.5, dtype, device)
    exact = Weight(dense)
    gates = numbers(rows, gates_of * units, dtype=dtype, device=device)
    bias = numbers(gates_of * units, dtype=dtype, device=device, scale=0.1)
    h0, c0, dh, dc = (numbers(batch, units, dtype=dtype, device=device, scale=0.5) for _ in range(4))
    dy = numbers(rows, units, dtype=dtype, device=device)
    found = []
    for given, kind, module in ((packed, dtype, triton_cells), (exact, torch.float64, cells)):
        place = device if kind == dtype else "cpu"
        g, b, h, c, a, d, e = (t.to(place, kind) for t in (gates, bias, h0, c0, dy, dh, dc))
        c_in, d_cell = (c, e) if lstm else (None, e[:0])
        out = recurrence.forward(g, h, c_in, given, b, None, sizes, reverse, True, module)
        y, h_end, c_end, saved, before = out
        grads = recurrence.backward(
            a, d, d_cell, y, h, saved, before, given, None, sizes, reverse, lstm, False, False, module
        )
        found.append([y, h_end, c_end, *grads])
    for got, expected in zip(*found, strict=True):
        scale = float(expected.abs().max().clamp(min=1)) if expected.numel() else 1.0
        torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=4 * TOLERANCE[dtype] * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_layer_on_a_gpu_and_as_a_cuda_graph(cls):
    """The layer against cuDNN in float32, and its replay as a CUDA graph against itself."""
    import copy

    import sparsify

    net: Any = nn.ModuleDict({"rnn": cls(256, 512, 2, bidirectional=True)}).cuda()
    dense = copy.deepcopy(net)
    result = sparsify.prune(net, block="32x32", sparsity=0.75)
    with torch.no_grad():
        for name, mask in result.masks.items():
            dense.get_parameter(name).mul_(mask.elements().cuda())
    x = torch.randn(17, 5, 256, device="cuda")
    y, expected = net["rnn"](x)[0], dense["rnn"](x)[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=5e-3)  # cuDNN may use TF32
    y.square().sum().backward()
    expected.square().sum().backward()
    theirs = dense["rnn"].weight_hh_l1.grad * result.masks["rnn.weight_hh_l1"].elements().cuda()
    sparse = net["rnn"]
    topo = sparse.topology("weight_hh_l1")
    from sparsify.kernels.storage import unpack

    own = unpack(sparse.weight_hh_l1.grad, topo.crow, topo.col, (theirs.shape[0], theirs.shape[1]))
    assert float((own - theirs).norm() / theirs.norm()) < 2e-2
    with torch.no_grad():
        half = sparse.to(torch.bfloat16)
        fixed = x.to(torch.bfloat16)
        expected = half(fixed)[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = half(fixed)[0]
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsify.kernels.recurrent import triton_cells

WIDE = {"c_ptr", "before_ptr", "dc_ptr", "carry_ptr"}
for name in ("_lstm_kernel", "_lstm_back_kernel", "_gru_kernel", "_gru_back_kernel"):
    for dtype in sys.argv[1:]:
        kernel = getattr(triton_cells, name)
        names = kernel.arg_names
        constants = {n: v for n, v in dict(KEEP=True, HAS_DY=True, WIDTH=512).items() if n in names}
        types = {n: "*fp32" if n in WIDE else "*" + dtype for n in names}
        types |= {"H": "i32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, {})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "ld.global" in compiled.asm["ptx"]
"""


@pytest.mark.parametrize(
    "dtypes", [["bf16"], pytest.param(["fp16", "fp32"], marks=pytest.mark.slow)], ids="-".join
)
def test_kernels_compile_for_a_gpu(dtypes):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *dtypes], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
