"""`BlockSparseEmbedding`: `nn.Embedding` that stores only the kept blocks of its table.

A block is `bo` neighbouring rows times `bi` neighbouring features. Where rows are in order of how often they are
asked for, pruning leaves frequent ones more features than rare ones: the embeddings of mixed dimensions of Ginart et
al. (2019), found rather than set. The table of a recommender or a small language model is most of its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.blocks import BlockMask, BlockShape
from sparsify.errors import BlockShapeError
from sparsify.kernels.embedding import block_slots, block_sparse_rows
from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.kernels.storage import pack
from sparsify.layers.packed import PackedModule, PackedWeight


class TiedEmbedding(nn.Embedding):
    """An embedding whose table is the output's weight too: called with ids it looks up, with vectors it scores.

    One module for both, so that masks, pruning and packing reach both uses of the one table.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Rows or scores.

        Args:
            input: Integers `(...)`, or floating-point vectors `(..., embedding_dim)`.

        Returns:
            The rows `(..., embedding_dim)` of integers; of vectors their product with every row,
            `(..., num_embeddings)`.
        """
        return functional.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class BlockSparseEmbedding(PackedModule):
    """A table `W` of shape `(num_embeddings, embedding_dim)` in blocks: `W[ids]`, and `x W^T` of vectors.

    Attributes:
        weight: Packed values `(Z, bi, bo)` of the `Z` kept blocks, row by row, each transposed.
        crow_indices: `(R + 1,)` int32, first block of each block row.
        col_indices: `(Z,)` int32, block column of each block.
        padding_idx: Row that gets no gradient from lookups, or `None`.

    Args:
        num_embeddings: Rows, `N`.
        embedding_dim: Features, `K`.
        block_shape: `(bo, bi)`: rows and features of a block, powers of two from 8 to 256; anything
            `BlockShape.parse` reads.
        mask: Kept blocks; all where neither it nor `blocks` is given.
        padding_idx: As of `nn.Embedding`.
        device: Where the table is made.
        dtype: Its dtype.
        blocks: Number of stored blocks of a layer whose indices will be loaded later.

    Raises:
        BlockShapeError: If the block shape is not supported or the mask does not fit.
    """

    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        block_shape: BlockShape | str | int | tuple[int, int],
        mask: BlockMask | None = None,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocks: int | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.block_shape, self.padding_idx = BlockShape.parse(block_shape), padding_idx
        if mask is None and blocks is None:
            mask = BlockMask.full(self.shape, self.block_shape)
        if mask is not None:
            self._check(mask)
        stored = mask.blocks_kept if mask is not None else blocks or 0
        packed = torch.empty(stored, self.block_shape.cols, self.block_shape.rows, device=device, dtype=dtype)
        self.weight = nn.Parameter(packed)
        slots = torch.full(self.block_shape.grid(self.shape), -1, dtype=torch.int32, device=packed.device)
        self.register_buffer("_slots", slots, persistent=False)
        description = PackedWeight("weight", "", 1, self.shape, self.block_shape, stored)
        self._register(description, None if mask is None else [mask])
        if mask is not None and packed.device.type != "meta":
            self.reset_parameters()

    def _check(self, mask: BlockMask) -> None:
        if (mask.shape, mask.block) != (self.shape, self.block_shape):
            raise BlockShapeError(
                f"mask is for a {mask.shape} weight in blocks of {mask.block}, "
                f"the table is {self.shape} in blocks of {self.block_shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape of the table, `(num_embeddings, embedding_dim)`."""
        return self.num_embeddings, self.embedding_dim

    @property
    def mask(self) -> BlockMask:
        """Which blocks are stored, on the layer's device."""
        return self.mask_of("weight")

    @property
    def density(self) -> float:
        """Share of the table's elements that is stored, 0 to 1."""
        return self.mask.density

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises as `nn.Embedding` does; padding is zero."""
        dense = torch.randn(self.shape, device=self.weight.device, dtype=self.weight.dtype)
        if self.padding_idx is not None:
            dense[self.padding_idx] = 0
        self.weight.copy_(pack(dense, self.mask))

    def _refresh(self, packed: PackedWeight, name: str) -> None:
        super()._refresh(packed, name)
        if self.crow_indices.device.type != "meta":
            self._slots = block_slots(self.topology("weight"), packed.grid)

    def forward(self, input: Tensor) -> Tensor:
        """Rows or scores, as of `TiedEmbedding`.

        Args:
            input: Integers `(...)`, or vectors `(..., embedding_dim)` of the table's dtype (any under autocast).

        Returns:
            The rows `(..., embedding_dim)` of integers; of vectors their product with every row,
            `(..., num_embeddings)`.

        Raises:
            IndexError: If an integer is none of a row (on a GPU, as in torch, a device-side assertion).
            ValueError: If vectors have another number of features or another dtype.
        """
        if input.is_floating_point():
            if input.shape[-1] != self.embedding_dim:
                raise ValueError(
                    f"block-sparse table: got vectors of {input.shape[-1]} features, expected {self.embedding_dim}"
                )
            return block_sparse_linear(input, self.weight, None, self.topology("weight"), self.num_embeddings)
        rows = block_sparse_rows(input, self.weight, self._slots, self.shape)
        if self.padding_idx is None:
            return rows
        return torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, mask: BlockMask) -> BlockSparseEmbedding:
        """Packs the kept blocks of a dense table; kept values stay bit-identical.

        Raises:
            BlockShapeError: If the mask does not fit.
        """
        rows, width = embedding.weight.shape
        layer = cls(rows, width, mask.block, None, embedding.padding_idx, "meta", blocks=0)
        layer._check(mask)
        weight = embedding.weight
        layer.weight = nn.Parameter(pack(weight.detach(), mask), requires_grad=weight.requires_grad)
        layer._register(PackedWeight("weight", "", 1, layer.shape, mask.block, mask.blocks_kept), [mask])
        return layer.train(embedding.training)

    def dense_weight(self) -> Tensor:
        """The table as `(num_embeddings, embedding_dim)`, zero where no block is stored; a detached copy."""
        return self.dense_of("weight")

    def extra_repr(self) -> str:
        """Shape, block shape, stored blocks and density, for `print(model)`."""
        known = self.crow_indices.device.type != "meta"
        density = f", density={self.density:.3f}" if known else ""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, block_shape={self.block_shape}, "
            f"blocks={self.weight.shape[0]}{density}"
        )
