"""Recurrent layers on a GPU, against torch's in float64 on the CPU: every way of running them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import sparsify
from sparsify.kernels.recurrent import recurrence
from sparsify.kernels.storage import unpack

pytestmark = pytest.mark.gpu

# What decides how a layer runs: whether the units divide into tiles, the blocks, a projection, several directions.
LAYERS = {
    "persistent": (lambda: nn.LSTM(96, 256, 2, bidirectional=True), "32x32"),
    "persistent-gru": (lambda: nn.GRU(96, 256, 2, batch_first=True), "64x16"),
    "odd-units": (lambda: nn.LSTM(96, 250), "32x32"),
    "low-blocks": (lambda: nn.GRU(96, 256), "8x32"),
    "projection": (lambda: nn.LSTM(96, 256, proj_size=64), "32x32"),
}


def pair(make: Any, block: str) -> tuple[Any, Any, dict[str, Any]]:
    """A block-sparse layer on the GPU, the dense one of the same weights in float64, and the masks."""
    torch.manual_seed(0)
    net: Any = nn.ModuleDict({"rnn": make()})
    dense = copy.deepcopy(net)
    masks = sparsify.prune(net, block=block, sparsity=0.7, scope="layer").masks
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask.elements())
    return net["rnn"].cuda(), dense["rnn"].double(), masks


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    gap = (got.detach().double().cpu() - expected.detach()).norm()
    assert float(gap) <= tolerance * float(expected.detach().norm())


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients(name: str, uneven: bool) -> None:
    sparse, dense, masks = pair(*LAYERS[name])
    x = torch.randn(19, 7, 96)
    results = []
    for layer, place, kind in ((sparse, "cuda", torch.float32), (dense, "cpu", torch.float64)):
        given = x.to(place, kind, copy=True).requires_grad_()
        rows = given.transpose(0, 1) if layer.batch_first else given
        if uneven:
            lengths = torch.tensor([19, 17, 17, 9, 3, 2, 1])
            packed = pack_padded_sequence(rows, lengths, batch_first=layer.batch_first)
            out, states = layer(packed)
            y = out.data
        else:
            y, states = layer(rows)
        ends = states if isinstance(states, tuple) else (states,)
        (y.square().sum() + sum(end.sum() for end in ends)).backward()
        results.append([y, *ends, given.grad])
    for got, expected in zip(*results, strict=True):
        close(got, expected, 2e-4)
    for full, mask in masks.items():
        weight = full.removeprefix("rnn.")
        topo = sparse.topology(weight)
        grad = unpack(sparse.get_parameter(weight).grad, topo.crow, topo.col, mask.shape)
        close(grad, dense.get_parameter(weight).grad * mask.elements(), 2e-4)


@pytest.mark.parametrize("name", ["persistent", "persistent-gru"])
def test_one_launch_and_step_by_step_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, _, _ = pair(*LAYERS[name])
    x = torch.randn(50, 16, 96, device="cuda")
    with torch.no_grad():
        together = sparse(x)[0]
        monkeypatch.setattr(recurrence, "PERSISTENT", False)
        torch.testing.assert_close(sparse(x)[0], together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_trains(name: str) -> None:
    sparse, dense, _ = pair(*LAYERS[name])
    x = torch.randn(19, 7, 96)
    rows = x.transpose(0, 1) if sparse.batch_first else x
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = sparse(rows.cuda())
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    close(y, dense(rows.double())[0], 3e-2)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in sparse.parameters())


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell], ids=["lstm", "gru"])
def test_cells(cls: Any) -> None:
    sparse, dense, _ = pair(lambda: cls(96, 256), "32x32")
    x = torch.randn(7, 96)
    got, expected = sparse(x.cuda()), dense(x.double())
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (got, expected)), strict=True):
        close(a, b, 1e-4)


def test_compiled_as_cuda_graphs() -> None:
    sparse, _, _ = pair(*LAYERS["persistent"])
    x = torch.randn(19, 7, 96, device="cuda")
    with torch.no_grad():
        expected = sparse(x)[0]
        compiled = torch.compile(sparse, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            torch.testing.assert_close(compiled(x)[0].clone(), expected, rtol=0, atol=1e-5)
