"""Kernels' options: every kernel takes those it is tuned over, and whatever they are the product is the same."""

import ast
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsify.kernels import dispatch
from sparsify.kernels.dispatch import KERNELS, Kernel, Product
from tests.kernels.oracle import Case, check_products

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "linear"
OPS = ("dsd", "dds", "sdd", "gated")
CASE = Case(70, 100, 150, (32, 64), empty_row=True)


def functions(kernel: Kernel) -> dict[str, set[str]]:
    """Names of all arguments of each function of a kernel's module, read without importing it."""
    tree = ast.parse((FOLDER / f"{kernel.name}.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: {arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)} for node in found}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_has_its_products_and_options(kernel, monkeypatch):
    monkeypatch.setattr(dispatch, "_hopper", lambda device: True)
    own = functions(kernel)
    sides = (8, 16, 32, 64, 128, 256)
    taken = {
        op
        for op in OPS
        for tokens in (1, 16, 64, 200, 4096)
        for high in sides
        for wide in sides
        if kernel.takes(Product(op, 0, torch.bfloat16, tokens, 1024, 1024, high, wide, 9, True, True))
    }
    assert taken and taken <= own.keys()
    for op in taken:
        assert {name for options in kernel.options for name, _ in options} <= own[op]
    forward = {"activation", "multiply"} if "dsd" in taken else set()
    assert forward <= own.get("dsd", set())


def options() -> list[dict[str, int]]:
    """Every set of options that a portable kernel is tuned over."""
    found = [dict(pairs) for kernel in KERNELS if kernel.name == "triton_dsd" for pairs in kernel.options]
    return [*found, {"tile": 16, "step": 16, "warps": 2, "stages": 1}]


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU `sparsify tune` checks every candidate"
)
@pytest.mark.parametrize("settings", options(), ids=str)
def test_options_do_not_change_the_result(settings):
    from sparsify.kernels.linear import triton_dds, triton_dsd, triton_sdd

    products = (triton_dsd.dsd, triton_dds.dds, triton_sdd.sdd)
    check_products(CASE, torch.float32, *(partial(product, **settings) for product in products))
