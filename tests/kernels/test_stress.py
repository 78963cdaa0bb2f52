"""Properties of every kernel over random shapes, masks, dtypes and layouts; Triton's run in its interpreter.

The same checks run on a GPU, on the compiled kernels and at larger sizes: see tests/gpu/test_stress_gpu.py.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.kernels.linear import reference
from tests.kernels.oracle import PATTERNS, Case
from tests.kernels.stress import LAYOUTS, TOKENS, check, check_containment

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reference(op, *operands):
    return {"reference": getattr(reference, op)}


def _interpreted(op, operand, *rest):
    from sparsify.kernels.linear import triton_dds, triton_decode, triton_dsd, triton_sdd

    found = {f"triton_{op}": getattr({"dsd": triton_dsd, "dds": triton_dds, "sdd": triton_sdd}[op], op)}
    if op == "dsd" and operand.shape[0] <= triton_decode.MAX_TOKENS and operand.stride(1) == 1:
        found["triton_decode"] = triton_decode.dsd
    return found


KERNELS = [pytest.param(_reference, id="reference")]
if INTERPRETED:  # with a GPU the compiled kernels are tested
    KERNELS.append(pytest.param(_interpreted, id="triton"))

cases = st.builds(
    Case,
    tokens=st.integers(1, 70),
    out_features=st.integers(1, 150),
    in_features=st.integers(1, 150),
    block=st.tuples(*[st.sampled_from([8, 16, 32, 64, 128])] * 2),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    empty_row=st.booleans(),
    bias=st.booleans(),
    pattern=st.sampled_from(["uniform", *PATTERNS]),
)


@pytest.mark.parametrize("kernels", KERNELS)
@settings(max_examples=20)
@given(case=cases, dtype=st.sampled_from(DTYPES))
def test_random_products(kernels, case, dtype):
    torch.manual_seed(0)
    check(kernels, case, dtype)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("tokens", [t for t in TOKENS if t < 1000])
def test_every_number_of_tokens(kernels, tokens):
    check(kernels, Case(tokens, 72, 40, (32, 16), 0.5), torch.bfloat16)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [7, 40])
def test_layouts(kernels, layout, tokens):
    check(kernels, Case(tokens, 72, 100, (16, 32), 0.5), torch.float32, arrange=LAYOUTS[layout])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from Triton's interpreter
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("block", [(32, 32), (64, 16), (16, 64), (8, 8)], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_nan_and_infinity_stay_where_they_belong(kernels, block, tokens):
    rows, cols = (height * 3 - 3 for height in block)
    check_containment(kernels, Case(tokens, rows, cols, block, 0.5), torch.bfloat16)


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_further_apart_than_32_bits_count(kernels):
    """Such as the last token of each sequence in a long batch. The memory between the rows is never touched."""
    apart = 2**30 + 8

    def spread(t):
        buffer = torch.empty(2 * apart + t.shape[1], dtype=t.dtype)
        return buffer.as_strided(t.shape, (apart, 1)).copy_(t)

    check(kernels, Case(3, 40, 24, (8, 16), 0.6), torch.bfloat16, arrange=spread)
