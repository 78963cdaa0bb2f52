"""Which kernel runs a product: rules of thumb, measurements over them, and what a decision costs."""

from __future__ import annotations

import math
from functools import partial
from timeit import timeit

import pytest
import torch

from sparsify.kernels import dispatch, tuning
from sparsify.kernels.dispatch import candidates, choose
from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.linear import reference
from sparsify.kernels.tuning_files import Candidate, Entry

BF16 = torch.bfloat16


class OnGPU:
    """All that the choice asks of a tensor, without a GPU."""

    is_cuda = True

    def __init__(
        self, *shape: int, dtype: torch.dtype = BF16, strides: tuple[int, int] | None = None, at: int = 0
    ):
        self.shape, self.dtype, self.at = shape, dtype, at
        self.strides = strides or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def stride(self):
        return self.strides

    def element_size(self):
        return self.dtype.itemsize

    def data_ptr(self):
        return 4096 + self.at

    def get_device(self):
        return 0


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A Hopper GPU of which nothing was measured."""
    monkeypatch.setattr(dispatch, "_hopper", lambda device: True)
    monkeypatch.setattr(dispatch, "load", lambda candidate, op: candidate)
    measured(monkeypatch)
    yield
    dispatch.forget()


def measured(monkeypatch, *entries: Entry) -> None:
    dispatch.forget()
    table = tuning.Table(entries)
    monkeypatch.setattr(tuning, "table", lambda device: table)


def entry(tokens: int, times: dict[str, float], density: float = 0.25, op: str = "dsd") -> Entry:
    return Entry(op, "bfloat16", (64, 64), (1024, 512), density, tokens, 100.0,
                 {Candidate.parse(text): time for text, time in times.items()})  # fmt: skip


def forward(tokens: int, block: tuple[int, int] = (64, 64), width: int = 1024, blocks: int = 32, **x):
    """Operands of a forward product with a weight of `width` by 512."""
    return "dsd", OnGPU(tokens, 512, **x), OnGPU(blocks, block[1], block[0]), block[::-1], width


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16], ids=str)
def test_the_cpu_and_float64_have_the_reference(dtype):
    x, values = torch.randn(4, 128, dtype=dtype), torch.randn(2, 64, 64, dtype=dtype)
    assert candidates("dsd", x, values, (64, 64), 128) == [Candidate("reference")]
    for op in ("dsd", "dds", "sdd", "gated"):
        assert choose(op, x, values, (64, 64), 128) is getattr(reference, op)
    double = OnGPU(4, 512, dtype=torch.float64)
    assert choose("dsd", double, OnGPU(32, 64, 64), (64, 64), 1024) is reference.dsd


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (forward(1), "hopper_decode"),
        (forward(64), "hopper_decode"),
        (forward(32, (32, 32)), "triton_decode"),
        (forward(32, dtype=torch.float32), "triton_decode"),
        (forward(64, (32, 32)), "triton_dsd"),
        (forward(300), "hopper_linear"),
        (forward(1 << 22), "hopper_linear"),
        (forward((1 << 22) + 1), "triton_dsd"),  # more token tiles than a work list can number
        (forward(300, (128, 16)), "hopper_narrow"),
        (forward(300, (16, 16)), "triton_dsd"),
        (forward(600, (16, 16)), "hopper_narrow"),
        (forward(600, (64, 32)), "hopper_narrow"),
        (forward(600, (8, 64)), "triton_dsd"),
        (forward(300, dtype=torch.float32), "triton_dsd"),
        (forward(300, blocks=0), "triton_dsd"),
        (forward(0), "triton_dsd"),
        (forward(300, width=1020), "triton_dsd"),
        (forward(300, at=8), "triton_dsd"),
        (forward(300, strides=(516, 1)), "triton_dsd"),
        (forward(300, strides=(1, 300)), "triton_dsd"),
        (forward(8, strides=(1, 8)), "triton_dsd"),
        (("dds", OnGPU(300, 1024), OnGPU(32, 64, 64), (64, 64), 512), "hopper_linear"),
        (("dds", OnGPU(300, 1024), OnGPU(32, 16, 128), (16, 128), 512), "triton_dds"),
        (("dds", OnGPU(600, 1024), OnGPU(32, 16, 128), (16, 128), 512), "hopper_narrow"),
        (("sdd", OnGPU(300, 1024), OnGPU(300, 512), (64, 64), 32), "hopper_sdd"),
        (("sdd", OnGPU(300, 1024), OnGPU(300, 512), (16, 128), 32), "hopper_narrow_sdd"),
        (("sdd", OnGPU(300, 1024), OnGPU(300, 512, strides=(0, 1), at=4), (64, 64), 32), "triton_sdd"),
    ],
)
def test_rules_of_thumb(arguments, first):
    assert candidates(*arguments)[0].kernel == first == choose(*arguments).kernel


def test_other_gpus_have_the_portable_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "_hopper", lambda device: False)
    assert {candidate.kernel for candidate in candidates(*forward(300))} == {"triton_dsd"}
    assert {candidate.kernel for candidate in candidates(*forward(8))} == {"triton_decode", "triton_dsd"}
    assert choose("gated", OnGPU(300, 512), OnGPU(32, 64, 64), (64, 64), 1024) is None


def test_candidates_are_distinct_and_offer_every_option():
    found = candidates(*forward(300))
    assert len(set(found)) == len(found) and found[0] == Candidate("hopper_linear")
    assert Candidate("hopper_linear", (("tile", 128),)) in found
    assert next(one for one in found if one.kernel == "triton_dsd") == Candidate("triton_dsd")


def test_a_measurement_wins_over_the_rules(monkeypatch):
    measured(monkeypatch, entry(256, {"hopper_linear tile=128": 30, "triton_dsd": 20, "hopper_linear": 40}))
    assert choose(*forward(256)) == Candidate("triton_dsd")
    assert choose(*forward(500)) == Candidate("triton_dsd")
    assert choose(*forward(500, at=8)) == Candidate("triton_dsd")
    # Too far from what was measured: few tokens, another density, another block shape.
    assert choose(*forward(32)).kernel == "hopper_decode"
    assert choose(*forward(256, blocks=8)).kernel == "hopper_linear"
    assert choose(*forward(256, (128, 128), blocks=8)).kernel == "hopper_linear"


def test_a_measurement_of_what_cannot_run_here_is_passed_over(monkeypatch):
    times = {"hopper_gone": 10, "hopper_linear tile=128": 20, "hopper_linear tile=64": 15, "triton_dsd": 30}
    measured(monkeypatch, entry(256, times))
    assert choose(*forward(256)) == Candidate("hopper_linear", (("tile", 128),))
    assert choose(*forward(256, at=8)) == Candidate("triton_dsd")  # the copy engine cannot address it


def test_the_weight_gradient_uses_its_number_of_blocks(monkeypatch):
    measured(
        monkeypatch,
        entry(256, {"triton_sdd": 10}, density=0.9, op="sdd"),
        entry(256, {"hopper_sdd": 10}, density=0.25, op="sdd"),
    )
    operands = OnGPU(256, 1024), OnGPU(256, 512)
    assert choose("sdd", *operands, (64, 64), 115).kernel == "triton_sdd"
    assert choose("sdd", *operands, (64, 64), 32).kernel == "hopper_sdd"


def test_decisions_do_not_depend_on_what_was_asked_before(monkeypatch):
    measured(monkeypatch, entry(64, {"triton_dsd": 10}), entry(1024, {"hopper_linear tile=256": 10}))
    counts = [*range(1, 300), 1000, 1024, 1025, 4095, 4096, 8192]
    upwards = [choose(*forward(tokens)) for tokens in counts]
    dispatch._chosen.clear()
    assert [choose(*forward(tokens)) for tokens in reversed(counts)] == upwards[::-1]
    assert len(dispatch._chosen) < 100  # few decisions, however the token count changes


def test_the_number_of_tokens_that_decides_is_never_smaller():
    for tokens in [*range(1, 2000), 65535, 65536, 65537]:
        product = dispatch._product(*forward(tokens))
        assert tokens <= product.tokens <= tokens * 1.25
        assert tokens > 64 or product.tokens == tokens
        assert product.tokens.bit_length() <= (tokens - 1).bit_length() + 1
    assert all(dispatch._product(*forward(1 << k)).tokens == 1 << k for k in range(20))


def test_a_candidate_becomes_a_call(monkeypatch):
    monkeypatch.undo()
    from sparsify.kernels.linear import triton_dsd

    assert dispatch.load(Candidate("triton_dsd"), "dsd") is triton_dsd.dsd
    bound = dispatch.load(Candidate("triton_dsd", (("tile", 64), ("warps", 8))), "dsd")
    assert isinstance(bound, partial) and bound.func is triton_dsd.dsd
    assert bound.keywords == {"tile": 64, "warps": 8}
    assert Candidate.parse("triton_dsd tile=64 warps=8").options == (("tile", 64), ("warps", 8))
    assert str(Candidate("triton_dsd", (("tile", 64), ("warps", 8)))) == "triton_dsd tile=64 warps=8"


def test_a_decision_is_made_once_and_then_costs_little(monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "lookup", lambda *query: asked.append(query) or [])
    arguments = forward(300)
    assert min(timeit(lambda: choose(*arguments), number=1000) for _ in range(5)) / 1000 < 10e-6
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("slots", "change", "kernel"),
    [
        pytest.param(4096, {}, "hopper_grouped", id="many"),
        pytest.param(4000, {}, "triton_grouped", id="few"),
        pytest.param(4096, {"bias": True}, "triton_grouped", id="bias"),
        pytest.param(4096, {"block": (32, 64)}, "triton_grouped", id="narrow"),
        pytest.param(4096, {"blocks": 0}, "triton_grouped", id="empty"),
        pytest.param(4096, {"features": 1001}, "triton_grouped", id="odd"),
        pytest.param(4096, {"dtype": torch.float32}, "triton_grouped", id="float32"),
        pytest.param(4096, {"dtype": torch.float64}, "reference", id="float64"),
        pytest.param(1 << 22, {}, "triton_grouped", id="too_many"),
    ],
)
def test_grouped_products_take_the_hopper_kernel_where_there_are_many_slots(
    monkeypatch, slots, change, kernel
):
    monkeypatch.setattr(dispatch, "_hopper", lambda device: True)
    groups = Groups(torch.empty(slots, device="meta"), torch.empty(9, device="meta"))
    dtype = change.get("dtype", BF16)
    x = OnGPU(slots // 2, change.get("features", 1024), dtype=dtype)
    values = OnGPU(change.get("blocks", 100), *change.get("block", (64, 64)), dtype=dtype)
    bias = x if change.get("bias") else None
    run = dispatch.choose_grouped("grouped", x, values, bias, groups, 2048)
    assert run.__module__.rpartition(".")[2] == kernel


def test_weights_gradients_of_grouped_products_are_portable(monkeypatch):
    monkeypatch.setattr(dispatch, "_hopper", lambda device: True)
    groups = Groups(torch.empty(9999, device="meta"), torch.empty(2, device="meta"))
    run = dispatch.choose_grouped("grouped_dw", OnGPU(9999, 64), None, None, groups, 0)
    assert run.__module__.endswith("triton_grouped")
