"""A small Llama-like decoder made of block-sparse layers, shared by the tests of compiling and exporting."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import BlockShape, BlockSparseLinear


def sparse_linear(
    out_features: int, in_features: int, block: tuple[int, int], density: float = 0.4, bias: bool = False
) -> BlockSparseLinear:
    """A layer with a random mask whose first block row is empty."""
    shape = BlockShape(*block)
    keep = torch.rand(shape.grid((out_features, in_features))) < density
    keep[0] = False
    return BlockSparseLinear(in_features, out_features, shape, mask=keep, bias=bias)


class DecoderLayer(nn.Module):
    """Grouped-query attention and a gated MLP, `(batch, tokens, width)` to the same."""

    def __init__(self, width: int, heads: int, inner: int, block: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj = sparse_linear(width, width, block, bias=True)
        self.kv_proj = sparse_linear(width, width, block, bias=True)  # half as many heads, keys and values
        self.o_proj = sparse_linear(width, width, block)
        self.gate_proj = sparse_linear(inner, width, block)
        self.up_proj = sparse_linear(inner, width, block)
        self.down_proj = sparse_linear(width, inner, block)

    def forward(self, x: Tensor) -> Tensor:
        """One layer, with residual connections."""
        h = self.norm1(x)
        q = self.q_proj(h).unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        kv = self.kv_proj(h).unflatten(-1, (self.heads, self.head)).transpose(1, 2)
        k, v = kv.chunk(2, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def decoder(
    width: int = 96, inner: int = 200, layers: int = 2, block: tuple[int, int] = (32, 16)
) -> nn.Module:
    """A decoder in evaluation mode; the default sizes need padding on both sides of a block."""
    return nn.Sequential(*[DecoderLayer(width, 4, inner, block) for _ in range(layers)]).eval()
