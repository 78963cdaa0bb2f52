"""The portable kernels' options: whatever tiles a tuning asks for, the result is the same product."""

import os
from functools import partial

import pytest
import torch

from sparsify.kernels.dispatch import KERNELS
from tests.kernels.oracle import Case, check_products

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU `sparsify tune` checks every candidate"
)
CASE = Case(70, 100, 150, (32, 64), empty_row=True)


def options() -> list[dict[str, int]]:
    """Every set of options that a portable kernel is tuned over."""
    found = [dict(pairs) for kernel in KERNELS if kernel.name == "triton_dsd" for pairs in kernel.options]
    return [*found, {"tile": 16, "step": 16, "warps": 2, "stages": 1}]


@pytest.mark.parametrize("settings", options(), ids=str)
def test_options_do_not_change_the_result(settings):
    from sparsify.kernels import triton_dds, triton_dsd, triton_sdd

    products = (triton_dsd.dsd, triton_dds.dds, triton_sdd.sdd)
    check_products(CASE, torch.float32, *(partial(product, **settings) for product in products))
