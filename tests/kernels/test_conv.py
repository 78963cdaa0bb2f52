"""The convolutions, in the torch reference and in the Triton kernels (interpreter), against dense float64."""

import os
from dataclasses import replace

import pytest
import torch

from sparsify.kernels.convolution import reference as conv_reference
from tests.kernels.conv_oracle import CASES, Case, check_products, dense_conv, make
from tests.kernels.oracle import DTYPES, in_turn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="with a GPU the compiled kernels are tested")


@pytest.mark.parametrize("way", ["by_position", "dense"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, dtype, way, monkeypatch):
    monkeypatch.setattr(conv_reference, "_small_blocks", lambda *_: way == "dense")
    check_products(case, dtype, conv_reference)


def test_small_blocks_are_multiplied_with_their_zeros():
    for block, density, dense in ((8, 0.5, True), (8, 0.03, False), (64, 0.8, True), (64, 0.25, False)):
        # Of 512 channels; with few channels copies cost more than is saved.
        o = make(Case((4, 4), (512, 512), (block, block)), torch.float32)
        blocks = round(density * 9 * (512 // block) ** 2)
        values = torch.empty(1).expand(blocks, block, block)
        assert conv_reference._small_blocks(values, o.topo, o.geometry) == dense
        few = make(Case((4, 4), (64, 64), (block, block)), torch.float32)
        assert conv_reference._small_blocks(values[:0], few.topo, few.geometry)


@interpreted
@pytest.mark.parametrize(("case", "dtype"), in_turn(CASES))
def test_triton_kernels_in_the_interpreter(case, dtype):
    from sparsify.kernels.convolution import triton_conv

    check_products(case, dtype, triton_conv)


@interpreted
def test_the_largest_blocks():
    from sparsify.kernels.convolution import triton_conv

    case = Case((5, 7), (40, 20), (256, 256), kernel=(3, 3), density=1.0, batch=1)
    check_products(case, torch.float32, triton_conv)
    check_products(case, torch.bfloat16, triton_conv)


@interpreted
@pytest.mark.parametrize("case", [replace(CASES[0], batch=1), CASES[3]], ids=str)
def test_tiles_that_no_size_divides(case):
    from sparsify.kernels.convolution import triton_conv

    check_products(case, torch.float32, triton_conv, tile=16, step=16)


@interpreted
def test_the_weights_gradient_is_the_same_in_parts():
    from sparsify.kernels.convolution import triton_conv

    o = make(Case((16, 15), (16, 32)), torch.float32)
    arguments = o.dy, o.x, o.topo, o.geometry, 16, 16
    whole = triton_conv.conv_dw(*arguments, parts=1)
    torch.testing.assert_close(triton_conv.conv_dw(*arguments, parts=5, step=32), whole)


@interpreted
def test_triton_reads_strided_activations():
    from sparsify.kernels.convolution import triton_conv

    o = make(CASES[2], torch.float32)
    x, dy = (t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in (o.x, o.dy))
    assert not x.is_contiguous() and not dy.is_contiguous()
    y = triton_conv.conv(x, o.values, o.bias, o.topo, o.geometry)
    torch.testing.assert_close(y, dense_conv(o, o.x, o.weight, o.bias))
    for kernel, operand, more in (
        (triton_conv.conv_dx, dy, (o.values, o.topo, o.geometry, *CASES[2].size)),
        (triton_conv.conv_dw, dy, (x, o.topo, o.geometry, 8, 8)),
    ):
        contiguous = tuple(t.contiguous() if t is x else t for t in more)
        torch.testing.assert_close(kernel(operand, *more), kernel(operand.contiguous(), *contiguous))


@pytest.mark.parametrize("kernels", ["reference", pytest.param("triton_conv", marks=interpreted)])
def test_an_empty_batch(kernels):
    from importlib import import_module

    module = import_module(f"sparsify.kernels.convolution.{kernels}")
    o = make(CASES[0], torch.float32)
    x, dy = o.x[:0], o.dy[:0]
    assert module.conv(x, o.values, o.bias, o.topo, o.geometry).shape == dy.shape
    assert module.conv_dx(dy, o.values, o.topo, o.geometry, 7, 9).shape == x.shape
    assert not module.conv_dw(dy, x, o.topo, o.geometry, 16, 16).any()
