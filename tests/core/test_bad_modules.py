"""Modules that cannot be pruned, or only in part: one clear line, and the model as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized import dynamic
from torch.nn.utils import parametrizations

import sparsify
from sparsify.blocks import BlockShape
from sparsify.errors import ConfigError, PrunerError, TargetError
from sparsify.targets import select


def reasons(model: nn.Module) -> dict[str, str]:
    return {kept.name: kept.reason for kept in select(model, BlockShape(8, 8)).dense}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_scripted_model() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    with pytest.raises(
        TargetError, match=r"a torch\.jit module is a compiled program: prune the Python module"
    ):
        sparsify.prune(model, block=8)


def test_scripted_part_stays_dense_and_is_told_of_once() -> None:
    model = nn.Sequential(
        nn.Linear(16, 16), torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    )
    assert list(reasons(model)) == ["1"] and "torch.jit" in reasons(model)["1"]
    result = sparsify.prune(model, block=8)
    assert set(result.masks) == {"0"} and model(torch.randn(2, 16)).shape == (2, 16)


def test_traced_part() -> None:
    traced: Any = torch.jit.trace(nn.Linear(16, 16), torch.randn(2, 16))
    assert "torch.jit" in reasons(nn.Sequential(nn.Linear(16, 16), traced))["1"]


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm]
)
def test_computed_weight(wrap) -> None:
    model = nn.Sequential(nn.Linear(16, 16), wrap(nn.Linear(16, 16)))
    assert "computed anew in each call" in reasons(model)["1"]
    with pytest.raises(TargetError, match="computed anew in each call"):
        sparsify.prune(model, block=8, targets=["1"])


def test_lazy_layer() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    assert reasons(model)["1"] == "its shape is not known before the model has run once"
    model(torch.randn(2, 16))
    assert not reasons(model)


def test_shared_module_and_shared_weight() -> None:
    shared, other = nn.Linear(16, 16), nn.Linear(16, 16)
    model = nn.ModuleDict(
        {"a": shared, "b": shared, "c": nn.Linear(16, 16), "d": other, "e": nn.Linear(16, 16)}
    )
    model["e"].weight = other.weight
    assert reasons(model) == {
        "a": "shares its weight with b",
        "d": "shares its weight with e",
        "e": "shares its weight with d",
    }
    before = state(model)
    with pytest.raises(TargetError, match="target 'd' cannot be pruned: it shares its weight with e"):
        sparsify.prune(model, block=8, targets=["d"])
    assert unchanged(model, before)
    sparsify.prune(model, block=8)
    assert model["a"] is model["b"] and model["e"].weight is model["d"].weight


def test_model_that_is_the_layer() -> None:
    model = nn.Linear(16, 16)
    before = state(model)
    with pytest.raises(
        ConfigError, match=r"the model is itself the layer to prune, a Linear.*nn\.Sequential"
    ):
        sparsify.prune(model, block=8)
    assert unchanged(model, before)
    assert sparsify.prune(model, block=8, convert=False).sparsity == 0.5


class Detour(nn.Module):
    """Takes another way where its input's mean is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index != 1 or x.mean() >= 0:
                x = x + block(x).tanh() * 1e-3
        return x


@pytest.mark.parametrize("reconstruct", [0, 2])
def test_control_flow_that_depends_on_the_data(reconstruct: int) -> None:
    model = Detour()
    before = state(model)
    batches = [{"x": torch.rand(4, 16)}, {"x": -torch.rand(4, 16)}]
    with pytest.raises(
        PrunerError, match=r"block blocks\.1 ran 0 times in calibration batch 1, and once in the first"
    ):
        sparsify.prune(model, method="wanda", block=8, calibration=batches, reconstruct=reconstruct)
    assert unchanged(model, before)
    with pytest.raises(PrunerError, match=r"layer blocks\.1\.0 saw no calibration input"):
        sparsify.prune(model, method="wanda", block=8, calibration=batches[1:], reconstruct=reconstruct)
    assert unchanged(model, before)
    sparsify.prune(model, method="wanda", block=8, calibration=batches[:1], reconstruct=reconstruct)


@pytest.mark.parametrize("batch", [torch.rand(4, 16), (torch.rand(4, 16),)], ids=["tensor", "tuple"])
def test_calibration_batch_of_the_wrong_kind(batch) -> None:
    model = Detour()
    before = state(model)
    with pytest.raises(PrunerError, match=r"calibration batch 0 is a \w+: expected the keyword arguments"):
        sparsify.prune(model, method="wanda", block=8, calibration=[batch])
    with pytest.raises(PrunerError, match="there is no calibration data"):
        sparsify.prune(model, method="wanda", block=8, calibration=[])
    assert unchanged(model, before)


def of_dtype(dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class Boxed(Tensor):
    """What quantizing libraries put in a weight's place: a tensor of another class, of the dtype that it stands for."""


def boxed() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Boxed))
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: of_dtype(torch.int8), "its weight is int8: expected float16"),
        (lambda: of_dtype(torch.float8_e4m3fn), "its weight is float8_e4m3fn"),
        (lambda: nn.Linear(16, 16, dtype=torch.complex64), "its weight is complex64"),
        (lambda: nn.Conv2d(16, 16, 3, dtype=torch.complex64), "its weight is complex64"),
        (lambda: nn.LSTM(16, 16, dtype=torch.complex64), "its weight_ih_l0 is complex64"),
        (boxed, "its weight is a Boxed, no plain tensor"),
        (lambda: dynamic.Linear(16, 16), "prune the model first, then quantize it"),
        (lambda: nn.Conv3d(16, 16, 3), "convolutions of one and two dimensions"),
        (lambda: nn.LazyConv2d(16, 3), "not known before the model has run once"),
    ],
    ids=[
        "int8",
        "float8",
        "complex",
        "complex convolution",
        "complex LSTM",
        "subclass",
        "quantized",
        "3d",
        "lazy",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_values_that_no_product_takes(make, reason: str) -> None:
    told = reasons(nn.Sequential(nn.Linear(16, 16), make()))
    assert list(told) == ["1"] and reason in told["1"]
    with pytest.raises(TargetError, match=re.escape(reason)):
        sparsify.prune(nn.Sequential(make()), block=8)


@pytest.mark.parametrize("cls", [nn.Linear, nn.GRU])
def test_weights_that_are_not_in_memory(cls) -> None:
    model = nn.Sequential(nn.Linear(16, 16), cls(16, 16, device="meta"))
    before = state(model[:1])
    with pytest.raises(
        PrunerError, match=r"the weight of 1\S* is on the meta device.*load the model into memory"
    ):
        sparsify.prune(model, block=8)
    assert unchanged(model[:1], before)


def test_parameters_that_share_their_memory() -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    model = nn.Sequential(first, second, nn.Linear(16, 16))
    second.weight = nn.Parameter(first.weight.detach())
    assert reasons(model) == {"0": "shares its weight with 1", "1": "shares its weight with 0"}
    parts = torch.randn(32, 16)  # the halves of one tensor are two weights
    first.weight, second.weight = nn.Parameter(parts[:16]), nn.Parameter(parts[16:])
    assert not reasons(model)


def test_too_few_channels_in_a_group() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=4), nn.Linear(16, 16))
    assert reasons(model) == {"0": "smaller than one block of 8x8"}
    with pytest.raises(TargetError, match=r"0 stays dense \(smaller than one block of 8x8\)"):
        sparsify.prune(model, block=8, targets=["0"])
