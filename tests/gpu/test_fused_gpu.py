"""Products that go on in their kernels, on a GPU: every kernel that may be chosen, and whole MLPs."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify.kernels import dispatch
from sparsify.kernels.linear.ops import Operand, block_sparse_gated, block_sparse_linear
from sparsify.kernels.linear.reference import ACTIVATIONS
from sparsify.layers.fusion import FusedMlp, unfuse
from sparsify.layers.swap import convert
from tests.architectures.zoo import prune
from tests.kernels.oracle import Case, assert_close, make

pytestmark = pytest.mark.gpu

FUNCTIONS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
BLOCKS = [(64, 64), (128, 128), (128, 16), (32, 32), (16, 16)]


def _poison() -> None:
    """Fills the allocator's free memory with NaN, so that unwritten outputs show."""
    poison = torch.full((1 << 22,), float("nan"), device="cuda")
    del poison


@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_kernel_applies_activation_and_factor(block, tokens):
    o = make(Case(tokens, 520, 384, block, 0.4, empty_row=True), torch.bfloat16, "cuda")
    before = F.linear(o.x.double(), o.weight.double(), o.bias.double())
    dense = F.linear(o.x, o.weight, o.bias)
    found = dispatch.candidates("dsd", o.x, o.values, (block[1], block[0]), 520)
    for candidate in {candidate.kernel: candidate for candidate in reversed(found)}.values():
        run = dispatch.load(candidate, "dsd")
        for activation in ACTIVATIONS if tokens == 64 else ("silu",):
            function = FUNCTIONS[activation]
            _poison()
            y = run(o.x, o.values, o.bias, o.topo, 520, activation)
            assert_close(y, function(before), function(dense))
            _poison()
            z = run(o.x, o.values, o.bias, o.topo, 520, activation, o.dy)
            assert_close(z, function(before) * o.dy.double(), function(dense) * o.dy)


@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 64, 300])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_gated(block, tokens):
    gate = make(Case(tokens, 520, 384, block, 0.4, empty_row=True), torch.bfloat16, "cuda")
    up = make(Case(tokens, 520, 384, block, 0.2, bias=False), torch.bfloat16, "cuda")
    operands = Operand(gate.values, gate.bias, gate.topo), Operand(up.values, None, up.topo)
    x = gate.x.double()
    exact = F.silu(F.linear(x, gate.weight.double(), gate.bias.double())) * F.linear(x, up.weight.double())
    dense = F.silu(F.linear(gate.x, gate.weight, gate.bias)) * F.linear(gate.x, up.weight)
    _poison()
    y = block_sparse_gated(gate.x, *operands, 520, "silu")
    assert_close(y, exact, dense)
    assert torch.equal(y, block_sparse_gated(gate.x, *operands, 520, "silu"))


@pytest.mark.parametrize("tokens", [1, 20, 300])
def test_gated_in_blocks_of_different_shapes(tokens):
    gate = make(Case(tokens, 512, 384, (64, 64), 0.4), torch.bfloat16, "cuda")
    up = make(Case(tokens, 512, 384, (128, 16), 0.4), torch.bfloat16, "cuda")
    operands = Operand(gate.values, gate.bias, gate.topo), Operand(up.values, up.bias, up.topo)
    y = block_sparse_gated(gate.x, *operands, 512, "gelu")
    x = gate.x.double()
    exact = F.gelu(F.linear(x, gate.weight.double(), gate.bias.double()))
    exact = exact * F.linear(x, up.weight.double(), up.bias.double())
    dense = F.gelu(F.linear(gate.x, gate.weight, gate.bias)) * F.linear(gate.x, up.weight, up.bias)
    assert_close(y, exact, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_dtypes(dtype):
    o = make(Case(20, 200, 136, (32, 32)), dtype, "cuda")
    y = block_sparse_linear(o.x, o.values, o.bias, o.topo, 200, "gelu")
    exact = F.gelu(F.linear(o.x.double(), o.weight.double(), o.bias.double()))
    assert_close(y, exact, F.gelu(F.linear(o.x, o.weight, o.bias)))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=1000,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to("cuda", torch.bfloat16)
    masks, _ = prune(model, "64x64")
    convert(model, masks)
    return model


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40, 500])
def test_a_fused_model_agrees_with_itself_unfused(model, tokens):
    assert sum(isinstance(module, FusedMlp) for module in model.modules()) == 2
    ids = torch.randint(1000, (1, tokens), device="cuda")
    fused = model(ids, use_cache=False).logits
    other = deepcopy(model)
    unfuse(other)
    assert _relative(fused, other(ids, use_cache=False).logits) < 0.02


@torch.no_grad()
def test_a_fused_mlp_replays_as_a_cuda_graph(model):
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    mlp(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mlp(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, mlp(x))


@torch.no_grad()
def test_a_fused_model_compiles_whole(model):
    ids = torch.randint(1000, (1, 12), device="cuda")
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # recorded and replayed
        actual = compiled(ids, use_cache=False).logits.clone()
    assert _relative(actual, expected) < 0.02
