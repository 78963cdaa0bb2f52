"""`BlockSparseConv2d` and `BlockSparseConv1d`: convolutions that store and multiply only kept blocks of their weight.

Blocks lie over output and input channels. Their mask is shared by all kernel positions, or each position has its own;
with several groups each group has its own blocks. See `sparsify.conv_weight` and docs/decisions/0011-convolutions.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.blocks import BlockMask, BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.errors import BlockShapeError, ConfigError
from sparsify.kernels.convolution.geometry import Geometry
from sparsify.kernels.convolution.ops import block_sparse_conv, indices, pointwise
from sparsify.kernels.storage import Topology
from sparsify.layers.packed import PackedModule, PackedWeight

Size: TypeAlias = int | tuple[int, ...]
Masks: TypeAlias = BlockMask | Sequence[BlockMask] | Tensor


class BlockSparseConv(PackedModule):
    """What convolutions of one and of two dimensions share. Not used alone.

    Attributes:
        weight: Packed values `(Z, bi, bo)` of the `Z` stored blocks, each at one kernel position; row by row, in
            ascending position and input channel within a row, each transposed.
        bias: `(out_channels,)` or `None`.
        crow_indices: `(groups * R + 1,)` int32, first block of each block row of output channels.
        col_indices: `(Z,)` int32, `position * C + block of input channels` of each block.
        layout: Channels, kernel and groups, and whether kernel positions share a mask.

    Args:
        in_channels: `I`.
        out_channels: `O`.
        kernel_size: Size of the kernel, one number for all dimensions or one for each.
        block_shape: `(bo, bi)` in output and input channels, powers of two from 8 to 256.
        mask: Kept blocks: a `BlockMask`, one for each group (and kernel position, group by group), or a bool tensor
            `(R, C)` or `(count, R, C)`; all blocks where neither it nor `blocks` is given.
        stride: Pixels between two outputs, likewise.
        padding: Pixels added on each side, likewise; or `"same"` or `"valid"`.
        dilation: Pixels between two kernel positions, likewise.
        groups: Groups of channels, each with blocks of its own.
        bias: Whether there is a bias.
        padding_mode: What is added: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`. All but zeros copy the
            input.
        device: Where parameters are made.
        dtype: Dtype of the parameters: float32, float16, bfloat16 (float64 runs on the reference).
        per_position: Whether each kernel position has a mask of its own.
        blocks: Number of stored blocks of a layer whose indices will be loaded later (meta-device builds).

    Raises:
        BlockShapeError: If the block shape is not supported or the mask does not fit.
        ConfigError: If `groups` does not divide the channels, or `"same"` comes with a stride.
    """

    weight: nn.Parameter
    crow_indices: Tensor
    col_indices: Tensor
    dimensions: ClassVar[int]
    dense_class: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        block_shape: BlockShape | str | int | tuple[int, int],
        mask: Masks | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        per_position: bool = False,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ConfigError(
                f"groups {groups} do not divide {in_channels} input and {out_channels} output channels: each group "
                f"needs as many of both"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = map(self._each, (kernel_size, stride, dilation))
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.padding_mode = padding_mode
        self.block_shape = BlockShape.parse(block_shape)
        self.layout = ConvWeight(out_channels, in_channels, self.kernel_size, groups, per_position)
        margins = self._margins()
        self._margin = () if padding_mode == "zeros" else margins
        self.geometry = self._geometry(margins if padding_mode == "zeros" else (0, 0) * self.dimensions)
        keep = None
        if mask is not None:
            keep = self._keep(mask)
        elif blocks is None:
            keep = torch.ones(self.layout.grid(self.block_shape), dtype=torch.bool)
        stored = int(keep.sum()) if keep is not None else blocks or 0
        packed = torch.empty(stored, self.block_shape.cols, self.block_shape.rows, device=device, dtype=dtype)
        self.weight = nn.Parameter(packed)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self._index(keep, stored)
        if keep is not None and self.weight.device.type != "meta":
            self.reset_parameters()

    def _each(self, size: Size) -> tuple[int, ...]:
        sizes = (size,) * self.dimensions if isinstance(size, int) else tuple(size)
        if len(sizes) != self.dimensions:
            raise ConfigError(f"got {sizes}, expected one number for each of {self.dimensions} dimensions")
        return sizes

    def _margins(self) -> tuple[int, ...]:
        """Pixels added before and after each dimension, the last dimension first, as `functional.pad` takes them."""
        if self.padding == "same":
            if any(step != 1 for step in self.stride):
                raise ConfigError("padding 'same' has no meaning for a stride above 1: give it in pixels")
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        else:
            each = (0,) * self.dimensions if isinstance(self.padding, str) else self.padding
            if isinstance(self.padding, str) and self.padding != "valid":
                raise ConfigError(
                    f"padding {self.padding!r} is unknown: expected 'same', 'valid' or a number"
                )
            sides = [(side, side) for side in each]
        return tuple(side for pair in reversed(sides) for side in pair)

    def _geometry(self, margins: Sequence[int]) -> Geometry:
        lead = (1,) * (2 - self.dimensions)  # one dimension is an image of height 1
        (kernel_h, kernel_w), (stride_h, stride_w) = lead + self.kernel_size, lead + self.stride
        dilation_h, dilation_w = lead + self.dilation
        left, right, top, bottom = (*margins, 0, 0)[:4]
        return Geometry(
            self.groups, self.in_channels, self.out_channels, kernel_h, kernel_w, stride_h, stride_w,
            top, bottom, left, right, dilation_h, dilation_w,
        )  # fmt: skip

    def _keep(self, mask: Masks) -> Tensor:
        """Which blocks are stored, `(groups * R, P * C)` bool."""
        layout, own = self.layout, self.layout.block(self.block_shape)
        if isinstance(mask, Tensor):
            mask = [BlockMask(part, layout.shape, own) for part in (mask if mask.dim() == 3 else mask[None])]
        masks = [mask] if isinstance(mask, BlockMask) else list(mask)
        if any(part.block != own for part in masks):
            raise BlockShapeError(
                f"mask is for blocks of {masks[0].block} over {masks[0].block.positions} kernel positions, the layer "
                f"has blocks of {own} over {own.positions}"
            )
        return layout.stored(masks)

    def _index(self, keep: Tensor | None, stored: int) -> None:
        """Adds the index buffers of the stored matrix."""
        packed = PackedWeight.of_conv(self.layout, self.block_shape, stored)
        self._register(packed, None if keep is None else [BlockMask(keep, packed.shape, self.block_shape)])

    def _lists(self, packed: PackedWeight) -> int:
        phases = 1 if pointwise(self.geometry) else self.geometry.phases
        return self.groups * self._channel_blocks * phases

    def _derive(self, packed: PackedWeight, crow: Tensor, col: Tensor) -> Topology:
        return indices(crow, col, self.geometry, self._channel_blocks)

    @property
    def _channel_blocks(self) -> int:
        return self.layout.channel_grid(self.block_shape)[1]

    def _stored(self) -> Tensor:
        """Which blocks of the stored matrix there are, `(groups * R, P * C)` bool on the layer's device."""
        packed, topo = self.packed["weight"], self.topology("weight")
        return BlockMask.from_csr(topo.crow, topo.col, packed.shape, packed.block).keep

    @property
    def masks(self) -> list[BlockMask]:
        """The mask of each group (and kernel position), on the layer's device."""
        return self.layout.masks(self._stored(), self.block_shape)

    @property
    def density(self) -> float:
        """Share of the weight's elements that is stored, 0 to 1."""
        masks = self.masks
        return sum(mask.density for mask in masks) / len(masks)

    def named_masks(self, module_name: str) -> dict[str, BlockMask]:
        """The mask of each weight matrix by the name that its dense `PrunableLayer` has."""
        return dict(zip(self.layout.names(module_name), self.masks, strict=True))

    def mask_of(self, name: str, index: int = 0) -> BlockMask:
        """Which blocks of matrix `index` are stored, on the layer's device."""
        return self.masks[index]

    def dense_of(self, name: str, index: int = 0) -> Tensor:
        """Matrix `index` as `(N, K)` with zeros; a detached copy."""
        return self.layout.matrix(self.dense_weight(), index)

    def dense_weight(self) -> Tensor:
        """The weight as `(O, I / groups, *kernel)`, zero where no block is stored; a detached copy."""
        return self.layout.unpack(self.whole_values("weight"), self._stored())

    def reset_parameters(self) -> None:
        """Initialises as torch's convolutions do, for the mean number of stored inputs; padding is zero."""
        fan_in = math.prod(self.layout.full_shape[1:]) * self.density
        bound = 1.0 / math.sqrt(max(1.0, fan_in))
        with torch.no_grad():
            place: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
            dense = torch.empty(self.layout.full_shape, **place).uniform_(-bound, bound)
            self.weight.copy_(self.layout.pack(dense, self._stored(), self.block_shape))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: `(B, I, H, W)` (of one dimension `(B, I, L)`), or without `B`; the dtype of `weight` (any under
                autocast). In channels-last memory it is read in place, any other is copied to it first.

        Returns:
            `(B, O, OH, OW)`, in channels-last memory if `x` is, else contiguous.

        Raises:
            ValueError: If `x` has another rank, number of channels or dtype, or is smaller than the kernel.
        """
        rank = self.dimensions + 2
        if x.dim() not in (rank - 1, rank) or x.shape[x.dim() - rank + 1] != self.in_channels:
            raise ValueError(
                f"block-sparse convolution: got {tuple(x.shape)}, expected {self.in_channels} channels, a batch before "
                f"and {self.dimensions} dimension{'s' if self.dimensions > 1 else ''} behind them"
            )
        batch = x if x.dim() == rank else x.unsqueeze(0)
        if self._margin:
            batch = functional.pad(batch, self._margin, self.padding_mode)
        in_place = batch.stride(1) == 1
        images = batch.movedim(1, -1)
        images = images if in_place else images.contiguous()
        if self.dimensions == 1:
            images = images.unsqueeze(1)
        y = block_sparse_conv(images, self.weight, self.bias, self.topology("weight"), self.geometry)
        y = (y.squeeze(1) if self.dimensions == 1 else y).movedim(-1, 1)
        y = y if in_place else y.contiguous()
        return y if x.dim() == rank else y.squeeze(0)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        mask: Masks,
        block_shape: BlockShape | str | int | tuple[int, int] | None = None,
        *,
        per_position: bool = False,
    ) -> Self:
        """Packs the kept blocks of a dense convolution; kept weights and bias stay bit-identical.

        Args:
            conv: Dense layer, of `dense_class`.
            mask: Kept blocks, as for the class.
            block_shape: Needed where `mask` is a plain tensor.
            per_position: Whether each kernel position has a mask of its own.

        Raises:
            BlockShapeError: If the mask does not fit, or a plain mask comes without block shape.
        """
        assert isinstance(conv, cls.dense_class)
        if isinstance(mask, Tensor):
            if block_shape is None:
                raise BlockShapeError("from_conv needs block_shape when the mask is a plain tensor")
        elif block_shape is None:
            first = mask if isinstance(mask, BlockMask) else mask[0]
            block_shape = BlockShape(first.block.rows, first.block.channels)
        assert block_shape is not None
        layer = cls.like(conv, block_shape, per_position=per_position, device="meta", blocks=0)
        keep, weight = layer._keep(mask), conv.weight
        values = layer.layout.pack(weight.detach(), keep, layer.block_shape)
        layer.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        if conv.bias is not None:
            layer.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        layer._index(keep, len(values))
        return layer.train(conv.training)

    @classmethod
    def like(cls, conv: Any, block_shape: Any, **options: Any) -> Self:
        """A layer with the sizes of a dense convolution; `options` are further arguments of the class."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, block_shape, stride=conv.stride,
            padding=conv.padding, dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None,
            padding_mode=conv.padding_mode, **options,
        )  # fmt: skip

    def to_conv(self) -> nn.Conv1d | nn.Conv2d:
        """The same layer as a dense convolution with zeros in place of the missing blocks."""
        mode: Any = self.padding_mode
        sizes: Any = (self.kernel_size, self.stride, self.padding, self.dilation)
        conv = self.dense_class(
            self.in_channels, self.out_channels, *sizes, groups=self.groups, bias=self.bias is not None,
            padding_mode=mode, device="meta",
        )  # fmt: skip
        conv.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, block shape, stored blocks and density, for `print(model)`."""
        known = self.crow_indices.device.type != "meta"
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        ]
        parts += [f"padding={self.padding}"] if self.padding not in ("valid", (0,) * self.dimensions) else []
        parts += [f"dilation={self.dilation}"] if set(self.dilation) != {1} else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"bias={self.bias is not None}, block_shape={self.block_shape}"]
        parts += ["per_position=True"] if self.layout.per_position else []
        parts += [f"blocks={self.weight.shape[0]}"] + ([f"density={self.density:.3f}"] if known else [])
        return ", ".join(parts)


class BlockSparseConv2d(BlockSparseConv):
    """`nn.Conv2d` with a block-sparse weight `(O, I / groups, height, width)`; arguments as for `BlockSparseConv`."""

    dimensions = 2
    dense_class = nn.Conv2d


class BlockSparseConv1d(BlockSparseConv):
    """`nn.Conv1d` with a block-sparse weight `(O, I / groups, length)`; arguments as for `BlockSparseConv`."""

    dimensions = 1
    dense_class = nn.Conv1d
