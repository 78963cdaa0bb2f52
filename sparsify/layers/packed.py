"""What every block-sparse module shares: the indices of its packed weights and all that derives from them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.conv_weight import ConvWeight
from sparsify.errors import CheckpointError
from sparsify.kernels.storage import Topology, topology, unpack, validate_indices

# Buffers that follow from the indices and are never saved; block numbers count within one matrix.
_DERIVED = ("crow", "row", "t_crow", "t_row", "t_block")


@dataclass(frozen=True)
class PackedWeight:
    """Description of one packed parameter: `count` matrices of one shape, stored one after the other.

    Attributes:
        name: The parameter's name, such as `weight`; its values are `(Z, bi, bo)`.
        prefix: Begin of the names of its index buffers.
        count: Number of matrices; 1 for a linear layer, the number of experts for fused experts.
        shape: Logical `(N, K)` of one matrix.
        block: Block shape `(bo, bi)`.
        blocks: Stored blocks of all matrices together, `Z`.
        conv: For a convolution, whose one stored matrix is padded to whole blocks at each kernel position, what its
            weight is; see `sparsify.conv_weight`.
    """

    name: str
    prefix: str
    count: int
    shape: tuple[int, int]
    block: BlockShape
    blocks: int
    conv: ConvWeight | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns of one matrix, `(R, C)`."""
        return self.block.grid(self.shape)

    @classmethod
    def of_conv(cls, conv: ConvWeight, block: BlockShape, blocks: int) -> PackedWeight:
        """The description of a convolution's weight."""
        rows, cols = conv.grid(block)
        return cls("weight", "", 1, (rows * block.rows, cols * block.cols), block, blocks, conv)

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the weight: `(N, K)`, of a convolution `(O, I / groups, *kernel)`; several matrices not told."""
        return self.shape if self.conv is None else self.conv.full_shape


class PackedModule(nn.Module):
    """Base of modules that hold packed weights. Not used alone.

    A packed weight `NAME` is a parameter `(Z, bi, bo)` with saved buffers `<prefix>crow_indices` `(count * R + 1,)`
    and `<prefix>col_indices` `(Z,)`, int32. `refresh` validates them and rebuilds what derives from them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[str, PackedWeight] = {}
        self._starts: dict[str, list[int]] = {}
        # Names of the buffers that make up each weight's `Topology`, in its order.
        self._index_names: dict[str, tuple[str, ...]] = {}

    def _register(self, packed: PackedWeight, masks: list[BlockMask] | None) -> None:
        """Adds the index buffers of one weight; without masks their contents are still to be loaded."""
        self.packed[packed.name] = packed
        derived_names = (f"_{packed.prefix}{field}" for field in _DERIVED[1:])
        col_name = f"{packed.prefix}col_indices"
        self._index_names[packed.name] = (f"_{packed.prefix}crow", col_name, *derived_names)
        rows, _ = packed.grid
        device = getattr(self, packed.name).device
        if masks is None:
            crow = torch.zeros(packed.count * rows + 1, dtype=torch.int32, device=device)
            col = torch.zeros(packed.blocks, dtype=torch.int32, device=device)
        else:
            crow, col = _join([mask.csr() for mask in masks])
        self.register_buffer(f"{packed.prefix}crow_indices", crow.to(device))
        self.register_buffer(f"{packed.prefix}col_indices", col.to(device))
        sizes = {
            "crow": packed.count * (rows + 1),
            "row": packed.blocks,
            "t_crow": packed.count * (self._lists(packed) + 1),
            "t_row": packed.blocks,
            "t_block": packed.blocks,
        }
        for field, size in sizes.items():
            empty = torch.zeros(size, dtype=torch.int32, device=device)
            self.register_buffer(f"_{packed.prefix}{field}", empty, persistent=False)
        if masks is not None:
            self._refresh(packed, packed.name)

    def refresh(self, name: str | None = None) -> None:
        """Validates the index buffers and rebuilds what is derived from them; call it after writing to them.

        Args:
            name: The module's name in its model, for the error message.

        Raises:
            CheckpointError: If indices are out of range, unsorted or of the wrong count.
        """
        for packed in self.packed.values():
            self._refresh(packed, packed.name if name is None else f"{name}.{packed.name}")

    def _refresh(self, packed: PackedWeight, name: str) -> None:
        crow, col = (getattr(self, f"{packed.prefix}{kind}_indices") for kind in ("crow", "col"))
        if crow.device.type == "meta":
            return
        rows, cols = packed.grid
        validate_indices(crow, col, (packed.count * rows, cols), packed.blocks, name)
        starts = crow[:: max(rows, 1)].tolist()
        parts = [
            self._derive(packed, crow[i * rows : (i + 1) * rows + 1] - start, col[start:end])
            for i, (start, end) in enumerate(pairwise(starts))
        ]
        for field in _DERIVED:
            setattr(self, f"_{packed.prefix}{field}", torch.cat([getattr(part, field) for part in parts]))
        self._starts[packed.name] = starts

    def _lists(self, packed: PackedWeight) -> int:
        """Lists of blocks in the transposed order of one matrix."""
        return packed.grid[1]

    def _derive(self, packed: PackedWeight, crow: Tensor, col: Tensor) -> Topology:
        """Everything that follows from the indices of one matrix."""
        return topology(crow, col, packed.grid[1])

    def topology(self, name: str, index: int = 0) -> Topology:
        """Index vectors of matrix `index` of the packed weight `name`."""
        packed, buffers = self.packed[name], self._buffers
        # On the path of every call: written out, this takes half the time.
        crow, col, row, t_crow, t_row, t_block = self._index_names[name]
        found = buffers[crow], buffers[col], buffers[row], buffers[t_crow], buffers[t_row], buffers[t_block]
        topo = Topology(*found)  # pyright: ignore[reportArgumentType]
        if packed.count == 1:
            return topo
        rows, cols = packed.grid
        own = self.block_range(name, index)
        return Topology(
            topo.crow[index * (rows + 1) : (index + 1) * (rows + 1)],
            topo.col[own],
            topo.row[own],
            topo.t_crow[index * (cols + 1) : (index + 1) * (cols + 1)],
            topo.t_row[own],
            topo.t_block[own],
        )

    def block_range(self, name: str, index: int = 0) -> slice:
        """Where the stored blocks of matrix `index` lie in the packed weight `name`."""
        starts = self._starts[name]
        return slice(starts[index], starts[index + 1])

    def mask_of(self, name: str, index: int = 0) -> BlockMask:
        """Which blocks of matrix `index` of the packed weight `name` are stored, on the module's device."""
        packed, topo = self.packed[name], self.topology(name, index)
        return BlockMask.from_csr(topo.crow, topo.col, packed.shape, packed.block)

    def named_masks(self, module_name: str) -> dict[str, BlockMask]:
        """The mask of each weight matrix by the name that its dense `PrunableLayer` has."""
        masks = {}
        for packed in self.packed.values():
            for index in range(packed.count):
                name = module_name if packed.name == "weight" else f"{module_name}.{packed.name}.{index}"
                masks[name] = self.mask_of(packed.name, index)
        return masks

    def dense_of(self, name: str, index: int = 0) -> Tensor:
        """Matrix `index` of the packed weight `name` as `(N, K)` with zeros; a detached copy.

        Where the weight is sharded (FSDP2), its parts are gathered: every process has to call it.
        """
        topo = self.topology(name, index)
        values = self.whole_values(name)[self.block_range(name, index)]
        return unpack(values, topo.crow, topo.col, self.packed[name].shape)

    def whole_values(self, name: str) -> Tensor:
        """All blocks `(Z, bi, bo)` of the packed weight `name`, detached; gathered where it is sharded (FSDP2)."""
        values = getattr(self, name).detach()
        return values.full_tensor() if hasattr(values, "full_tensor") else values

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        prefix, errors = args[1], args[6]
        try:
            self.refresh(prefix.rstrip(".") or None)
        except CheckpointError as error:
            errors.append(str(error))


def _join(indices: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """CSR indices of matrices stacked on top of each other."""
    crows, offset = [indices[0][0][:1]], 0
    for crow, col in indices:
        crows.append(crow[1:] + offset)
        offset += col.numel()
    return torch.cat(crows), torch.cat([col for _, col in indices])
