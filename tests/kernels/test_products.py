"""The three products, in the torch reference and in the Triton kernels (interpreter), against dense float64."""

import os

import pytest
import torch

from sparsify.kernels.linear import reference
from tests.kernels.oracle import CASES, DTYPES, Case, check_products, in_turn, make

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("way", ["batched", "by_rows", "by_block", "sorted"])
def test_reference(case, dtype, way, monkeypatch):
    monkeypatch.setattr(reference, "_by_rows", lambda *_: way == "by_rows")
    monkeypatch.setattr(reference, "_by_block", lambda *_: way == "by_block")
    monkeypatch.setattr(reference, "MAX_CHUNK", 32)  # several chunks even at these few tokens
    if way == "sorted":  # as on a GPU
        monkeypatch.setattr(reference, "_on_cpu", lambda *_: False)
    check_products(case, dtype, reference.dsd, reference.dds, reference.sdd)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the compiled kernels are tested, see tests/gpu")
@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES))
def test_triton_kernels_in_the_interpreter(case, dtype):
    from sparsify.kernels.linear import triton_dds, triton_dsd, triton_sdd

    check_products(case, dtype, triton_dsd.dsd, triton_dds.dds, triton_sdd.sdd)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the compiled kernels are tested, see tests/gpu")
@pytest.mark.parametrize(
    ("case", "dtype"), in_turn([c for c in CASES if c.tokens <= 32] + [Case(2, 64, 1600, (16, 32))])
)
def test_decode_kernel_in_the_interpreter(case, dtype):
    from sparsify.kernels import lasting
    from sparsify.kernels.linear import triton_dds, triton_decode, triton_sdd

    check_products(case, dtype, triton_decode.dsd, triton_dds.dds, triton_sdd.sdd)
    assert not any(own.any() for own in lasting._own.values())  # left as it was found


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the compiled kernels are tested, see tests/gpu")
def test_triton_reads_strided_activations():
    from sparsify.kernels.linear import triton_dds, triton_dsd, triton_sdd

    o = make(CASES[1], torch.float32)
    wide = torch.randn(CASES[1].tokens, 2 * CASES[1].in_features)
    x, dy = wide[:, ::2], o.dy.T.contiguous().T
    assert not x.is_contiguous() and not dy.is_contiguous()
    y = triton_dsd.dsd(x, o.values, o.bias, o.topo, CASES[1].out_features)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, o.weight, o.bias))
    torch.testing.assert_close(triton_dds.dds(dy, o.values, o.topo, CASES[1].in_features), dy @ o.weight)
    block_in, block_out = o.values.shape[1:]
    contiguous = triton_sdd.sdd(dy.contiguous(), x.contiguous(), o.topo, block_in, block_out)
    torch.testing.assert_close(triton_sdd.sdd(dy, x, o.topo, block_in, block_out), contiguous)


def test_reference_beats_dense_on_the_cpu():
    """80 % sparse, 64x64 blocks, 256 tokens, 3072x768: the CPU path must be worth having."""
    from statistics import median
    from time import thread_time  # not the clock: other work may run beside it

    o = make(Case(256, 3072, 768, (64, 64), density=0.2), torch.float32)
    dense_weight = torch.randn_like(o.weight)
    times = {"dense": [], "sparse": []}
    for _ in range(15):
        begin = thread_time()
        torch.nn.functional.linear(o.x, dense_weight, o.bias)
        middle = thread_time()
        reference.dsd(o.x, o.values, o.bias, o.topo, 3072)
        times["dense"].append(middle - begin)
        times["sparse"].append(thread_time() - middle)
    assert median(times["sparse"]) < median(times["dense"])
