"""`BlockSparseExperts` against transformers' dense experts: outputs, gradients, odd routings, compile and export."""

import copy

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sparsify.bench.limits import flops_of
from sparsify.blocks import BlockMask, BlockShape
from sparsify.layers import kinds
from sparsify.layers.experts import BlockSparseExperts
from tests.kernels.oracle import DTYPES, assert_close

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
TOP = 2


def _dense(kind: str, hidden: int, inner: int) -> nn.Module:
    if kind == "qwen3":
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=6, **SIZES)
        module = Qwen3MoeExperts(config)
    elif kind == "mixtral":
        config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=4, **SIZES)
        module = MixtralExperts(config)
    else:
        config = GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=4, **SIZES)
        module = GptOssExperts(config)
    config._experts_implementation = "eager"
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.3 if name.endswith("bias") else 0.1)
    return module.eval()


KINDS = {
    "qwen3": ("qwen3", 64, 96, BlockShape(32, 32)),
    "mixtral": ("mixtral", 80, 72, BlockShape(16, 32)),  # halves of the first projection end inside a block
    "gpt_oss": ("gpt_oss", 48, 40, BlockShape(16, 16)),  # transposed, with biases and a gate of its own
}


def _pair(kind: str, dtype=torch.float32, density=0.4) -> tuple[nn.Module, BlockSparseExperts]:
    """A dense module, zero outside its masks, and its block-sparse equivalent."""
    name, hidden, inner, block = KINDS[kind]
    dense = _dense(name, hidden, inner)
    masks = {}
    for layer in kinds.matrices("experts", dense, block):
        masks[layer.name] = BlockMask(torch.rand(layer.grid) < density, layer.shape, block)
        layer.weight.mul_(masks[layer.name].elements())
    dense.to(dtype)
    sparse = kinds.to_sparse("experts", copy.deepcopy(dense), masks)
    assert isinstance(sparse, BlockSparseExperts)
    return dense, sparse


def _inputs(module, tokens, routing="uniform", dtype=torch.float32):
    experts = module.num_experts
    index = torch.rand(tokens, experts).argsort(1)[:, :TOP]
    if routing == "few":  # the others get nothing
        index = torch.rand(tokens, 2).argsort(1)
    elif routing == "one":  # both slots of every token
        index = torch.full((tokens, TOP), experts - 1)
    weights = torch.rand(tokens, TOP)
    hidden = torch.randn(tokens, next(iter(module.packed.values())).shape[1])
    return hidden.to(dtype), index, (weights / weights.sum(1, keepdim=True)).to(dtype)


def _exact(dense, hidden, index, weights):
    return copy.deepcopy(dense).double()(hidden.double(), index, weights.double())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense_experts_in_every_dtype(kind, dtype, training):
    dense, sparse = _pair(kind, dtype)
    inputs = _inputs(sparse, 37, dtype=dtype)
    with torch.set_grad_enabled(training):
        assert_close(sparse(*inputs).detach(), _exact(dense, *inputs).detach(), dense(*inputs).detach())


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("tokens", [0, 1, 19])
@pytest.mark.parametrize("routing", ["uniform", "few", "one"])
@pytest.mark.parametrize("kind", KINDS)
def test_routings(kind, routing, tokens, training):
    dense, sparse = _pair(kind)
    inputs = _inputs(sparse, tokens, routing)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(sparse(*inputs), dense(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_dense_experts(kind):
    dense, sparse = _pair(kind)
    grads = []
    inputs = _inputs(sparse, 23)
    upstream = torch.randn_like(inputs[0])
    for module in (dense, sparse):
        hidden, weights = (inputs[i].clone().requires_grad_() for i in (0, 2))
        module(hidden, inputs[1], weights).backward(upstream)
        grads.append((hidden.grad, weights.grad))
    for wanted, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for name, parameter in dense.named_parameters():
        if name not in sparse.packed:
            torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)
            continue
        full = copy.deepcopy(sparse)
        full.get_parameter(name).data.copy_(sparse.get_parameter(name).grad)
        kept = copy.deepcopy(sparse)
        kept.get_parameter(name).data.fill_(1.0)
        expected = parameter.grad * kept.dense_parameter(name)
        torch.testing.assert_close(full.dense_parameter(name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_without_an_expert_add_nothing(kind, training):
    """Tensor- and expert-parallel routers mark slots of other ranks' experts with the number of experts."""
    dense, sparse = _pair(kind)
    hidden, index, weights = _inputs(sparse, 11)
    index[::2, 0] = sparse.num_experts
    here = index < sparse.num_experts
    expected = dense(hidden, index.where(here, 0), weights * here)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(sparse(hidden, index, weights), expected, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_dtype_of_the_hidden_states():
    dense, sparse = _pair("qwen3")
    inputs = _inputs(sparse, 12)
    for training in (False, True):
        with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
            y = sparse(*inputs)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, dense(*inputs), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_and_exports(kind):
    _, sparse = _pair(kind)
    inputs = _inputs(sparse, 13)
    expected = sparse(*inputs)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    compiled(*inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in sparse.parameters())
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), expected)
        program = torch.export.export(sparse, inputs)
        torch.testing.assert_close(program.module()(*inputs), expected)


def test_one_product_for_all_experts_each():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Called(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name.removeprefix("sparsify::"))
            return func(*args, **(kwargs or {}))

    _, sparse = _pair("qwen3")
    inputs = _inputs(sparse, 13)
    with torch.no_grad(), Called() as fused:
        sparse(*inputs)
    assert fused.names.count("grouped_activated") == 2 and "grouped" not in fused.names
    assert "aten::silu" not in fused.names
    with Called() as trained:
        sparse(*inputs)
    assert trained.names.count("grouped") == 2


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_is_counted_as_if_experts_were_loaded_alike(kind, training):
    _, sparse = _pair(kind)
    inputs = _inputs(sparse, 12)
    stored = sum(sparse.get_parameter(name).numel() for name in sparse.packed)
    with torch.set_grad_enabled(training):
        assert flops_of(lambda: sparse(*inputs)) == 2 * 12 * TOP * stored // sparse.num_experts


def test_a_gate_of_the_models_own_is_left_to_it():
    assert _pair("qwen3")[1]._activation == _pair("mixtral")[1]._activation == "silu"
    assert _pair("gpt_oss")[1]._activation is None
