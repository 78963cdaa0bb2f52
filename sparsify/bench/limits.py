"""How fast work could be at best: what its arithmetic and its bytes take at the speeds that this machine reaches.

The speeds are those of a large dense matrix product and of a large copy, measured here: not a data sheet's. The limit
of a layer or a model is the longer of the two times, a roofline (Williams, Waterman, Patterson 2009); a time is then
told as its share of that limit. Bytes are those that must move at least once: weights, of a layer also activations, of
a decoding step also keys and values. What stays in a cache can beat the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sparsify.bench.timing import race
from sparsify.kernels.convolution import ops as conv_ops  # noqa: F401  (register the operators)
from sparsify.kernels.recurrent import recurrence  # noqa: F401
from sparsify.layers.experts import BlockSparseExperts, projections

# Side of the matrices and bytes of the copy: large enough for the full speed.
GPU_SIDE, GPU_BYTES = 8192, 1 << 30
CPU_SIDE, CPU_BYTES = 1024, 1 << 27
ROUNDS = 7


@dataclass(frozen=True)
class Limits:
    """Speeds that a machine reaches.

    Attributes:
        flops: Floating-point operations a second, of a dense matrix product.
        bytes: Bytes a second, read and written, of a copy.
    """

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The least time of so many operations and so many bytes moved."""
        return max(flops / self.flops, moved / self.bytes)


def machine_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measures the machine; about a second.

    Args:
        device: Where.
        dtype: Of the matrix product; on a GPU with the tensor cores that torch is allowed to use for it.
    """
    on_gpu = device.type == "cuda"
    side, size = (GPU_SIDE, GPU_BYTES) if on_gpu else (CPU_SIDE, CPU_BYTES)
    if on_gpu:
        # No more than a tenth of what is free: models are in memory already.
        free = torch.cuda.mem_get_info(device)[0]
        size = min(size, free // 20)
        side = min(side, int((free // 40 // dtype.itemsize) ** 0.5) // 256 * 256 or 256)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    product = race({"": lambda: a @ b}, device, ROUNDS).seconds[""]
    copy = race({"": lambda: target.copy_(source)}, device, ROUNDS).seconds[""]
    return Limits(flops=2 * side**3 / product, bytes=2 * size / copy)


def flops_of(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions of a call, which is made once."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        call()
    return counter.get_total_flops()


def weight_bytes(model: nn.Module, tokens: int, chosen: int | None = None) -> int:
    """Bytes of the weights that a forward pass of so many tokens reads: all but rows of an embedding not asked for.

    Of fused experts no more are read than tokens are sent to; a weight that is shared counts once.

    Args:
        model: A model, or one layer.
        tokens: Tokens of the pass.
        chosen: Experts that a token is sent to; by default what the model's config says.
    """
    skipped, chosen = _looked_up(model), chosen or experts_per_token(model)
    total, seen = 0.0, set()
    for module in model.modules():
        share = _share_of_experts(module, tokens, chosen)
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            if tensor.data_ptr() in skipped:
                total += min(tokens, len(tensor)) * tensor[0].nbytes
            else:
                total += share * tensor.nbytes
    return round(total)


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts a model's config sends a token to, if it says so."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    return next((count for name in names if isinstance(count := getattr(config, name, None), int)), None)


def _looked_up(model: nn.Module) -> set[int]:
    """Addresses of embeddings that nothing else uses, of which only the rows that are asked for are read."""
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    others = {
        tensor.data_ptr()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for tensor in module.parameters(recurse=False)
    }
    return tables - others


def _share_of_experts(module: nn.Module, tokens: int, chosen: int | None) -> float:
    """Largest share of a module's weights that so many tokens can need."""
    count = None
    if isinstance(module, BlockSparseExperts):
        count = module.num_experts
    elif (names := projections(module)) is not None:
        count = len(module.get_parameter(names[0]))
    return 1.0 if count is None or chosen is None else min(1.0, tokens * chosen / count)


def _dsd(x: Any, values: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    blocks, block_in, block_out = values
    return 2 * x[0] * blocks * block_in * block_out


def _gated(x: Any, gate: Any, gate_bias: Any, gate_topology: Any, up: Any, *_: Any, **__: Any) -> int:
    return _dsd(x, gate) + _dsd(x, up)


def _conv(x: Any, values: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # A stored block meets every output pixel at its kernel position.
    blocks, block_in, block_out = values
    return 2 * math.prod(out_shape[:-1]) * blocks * block_in * block_out


def _recurrence(
    gates: Any, h0: Any, c0: Any, weight: Any, topology: Any, bias: Any, projection: Any, *_: Any, **__: Any
) -> int:
    # Every time step's states meet all that is stored of the weight, packed or dense.
    return 2 * gates[0] * (math.prod(weight) + (0 if projection is None else math.prod(projection)))


def _experts(x: Any, values: Any, bias: Any, topology: Any, groups: Any, *_: Any, **__: Any) -> int:
    # Each slot meets the blocks of one expert; which one is the data's matter, so all count alike.
    (slots,), (bounds,) = groups
    blocks, block_in, block_out = values
    return round(2 * slots * blocks * block_in * block_out / (bounds - 1))


def _experts_activated(x: Any, values: Any, bias: Any, scale: Any, *rest: Any, **__: Any) -> int:
    return _experts(x, values, bias, *rest)


def _grouped(a: Any, b: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Each row of `a` (tokens, K) meets one of the matrices `b` (groups, K, N).
    return 2 * a[0] * a[1] * b[-1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_FORMULAS: dict[Any, Any] = {
    torch.ops.sparsify.recurrence: _recurrence,
    torch.ops.sparsify.dsd: _dsd,
    torch.ops.sparsify.activated: _dsd,
    torch.ops.sparsify.gated: _gated,
    torch.ops.sparsify.conv: _conv,
    torch.ops.sparsify.grouped: _experts,
    torch.ops.sparsify.grouped_activated: _experts_activated,
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
