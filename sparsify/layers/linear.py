"""`BlockSparseLinear`: `nn.Linear` that stores and multiplies only the kept blocks of its weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import BlockShapeError
from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.kernels.storage import pack
from sparsify.layers.packed import PackedModule, PackedWeight


class BlockSparseLinear(PackedModule):
    """`y = x W^T + b` with a block-sparse `W` of shape `(out_features, in_features)`.

    Attributes:
        weight: Packed values `(Z, bi, bo)` of the `Z` kept blocks, row by row, each transposed.
        bias: `(out_features,)` or `None`.
        crow_indices: `(R + 1,)` int32, first block of each block row.
        col_indices: `(Z,)` int32, block column of each block.
        transposed: Whether the dense layer kept its weight as `(K, N)` (GPT-2's `Conv1D`).

    Args:
        in_features: `K`.
        out_features: `N`.
        block_shape: `(bo, bi)`, powers of two from 8 to 256; anything `BlockShape.parse` reads.
        mask: Kept blocks, a `BlockMask` or an `(R, C)` bool tensor; all blocks where neither it nor `blocks` is given.
        bias: Whether there is a bias.
        device: Where parameters are made.
        dtype: Dtype of the parameters: float32, float16, bfloat16 (float64 runs on the reference).
        blocks: Number of stored blocks of a layer whose indices will be loaded later (meta-device builds).

    Raises:
        BlockShapeError: If the block shape is not supported or the mask does not fit.
    """

    crow_indices: Tensor
    col_indices: Tensor
    transposed: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_shape: BlockShape | str | int | tuple[int, int],
        mask: BlockMask | Tensor | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_shape = BlockShape.parse(block_shape)
        if mask is not None:
            mask = self._own_mask(mask)
        elif blocks is None:
            mask = BlockMask.full(self.shape, self.block_shape)
        stored = mask.blocks_kept if mask is not None else blocks or 0
        packed = torch.empty(stored, self.block_shape.cols, self.block_shape.rows, device=device, dtype=dtype)
        self.weight = nn.Parameter(packed)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        description = PackedWeight("weight", "", 1, self.shape, self.block_shape, stored)
        self._register(description, None if mask is None else [mask])
        if mask is not None and self.weight.device.type != "meta":
            self.reset_parameters()

    def _own_mask(self, mask: BlockMask | Tensor) -> BlockMask:
        if isinstance(mask, Tensor):
            return BlockMask(mask, self.shape, self.block_shape)
        if (mask.shape, mask.block) != (self.shape, self.block_shape):
            raise BlockShapeError(
                f"mask is for a {mask.shape} weight in blocks of {mask.block}, "
                f"the layer is {self.shape} in blocks of {self.block_shape}"
            )
        return mask

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape of the weight, `(out_features, in_features)`."""
        return self.out_features, self.in_features

    @property
    def mask(self) -> BlockMask:
        """Which blocks are stored, on the layer's device."""
        return self.mask_of("weight")

    @property
    def density(self) -> float:
        """Share of the logical weight's elements that is stored, 0 to 1."""
        return self.mask.density

    def reset_parameters(self) -> None:
        """Initialises as `nn.Linear` does, for the mean number of stored inputs of an output; padding is zero."""
        bound = 1.0 / math.sqrt(max(1.0, self.in_features * self.density))
        with torch.no_grad():
            dense = torch.empty(self.shape, device=self.weight.device, dtype=self.weight.dtype)
            self.weight.copy_(pack(dense.uniform_(-bound, bound), self.mask))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: `(..., in_features)`, the dtype of `weight` (any under autocast).

        Returns:
            `(..., out_features)`.

        Raises:
            ValueError: If `x` has another number of features or another dtype.
        """
        # The product itself knows the blocks alone, and would take any width that ends inside the last one.
        if x.shape[-1] != self.in_features:
            raise ValueError(f"block-sparse layer: got {x.shape[-1]} features, expected {self.in_features}")
        return block_sparse_linear(x, self.weight, self.bias, self.topology("weight"), self.out_features)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: BlockMask | Tensor,
        block_shape: BlockShape | str | int | tuple[int, int] | None = None,
    ) -> BlockSparseLinear:
        """Packs the kept blocks of a dense layer; kept weights and bias stay bit-identical.

        Args:
            linear: Dense layer, `weight` `(N, K)`.
            mask: Kept blocks.
            block_shape: Needed where `mask` is a plain `(R, C)` tensor.

        Raises:
            BlockShapeError: If the mask does not fit, or a plain mask comes without block shape.
        """
        if isinstance(mask, Tensor):
            if block_shape is None:
                raise BlockShapeError("from_linear needs block_shape when the mask is a plain tensor")
            mask = BlockMask(mask, (linear.out_features, linear.in_features), BlockShape.parse(block_shape))
        return cls.from_dense(linear.weight, linear.bias, mask).train(linear.training)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None, mask: BlockMask) -> BlockSparseLinear:
        """Packs the kept blocks of a weight `(N, K)`; `requires_grad` of weight and bias is carried over.

        Raises:
            BlockShapeError: If the mask does not fit.
        """
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, mask.block, bias=bias is not None, device="meta", blocks=0)
        mask = layer._own_mask(mask)
        values = nn.Parameter(pack(weight.detach(), mask), requires_grad=weight.requires_grad)
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return cls.from_packed(values, bias, mask)

    @classmethod
    def from_packed(
        cls, values: nn.Parameter, bias: nn.Parameter | None, mask: BlockMask
    ) -> BlockSparseLinear:
        """A layer of these very parameters, the blocks `(Z, bi, bo)` that `mask` keeps of an `(N, K)` weight."""
        out_features, in_features = mask.shape
        layer = cls(in_features, out_features, mask.block, bias=bias is not None, device="meta", blocks=0)
        layer.weight, layer.bias = values, bias
        layer._register(PackedWeight("weight", "", 1, mask.shape, mask.block, mask.blocks_kept), [mask])
        return layer

    def dense_weight(self) -> Tensor:
        """The weight as `(out_features, in_features)`, zero where no block is stored; a detached copy."""
        return self.dense_of("weight")

    def to_linear(self) -> nn.Linear:
        """The same layer as a dense `nn.Linear` with zeros in place of the missing blocks."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Shape, block shape, stored blocks and density, for `print(model)`."""
        known = self.crow_indices.device.type != "meta"
        density = f", density={self.density:.3f}" if known else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_shape={self.block_shape}, blocks={self.weight.shape[0]}{density}"
        )
