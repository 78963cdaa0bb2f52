"""`BlockSparseExperts`: transformers' fused mixture-of-experts weights, stored and multiplied block-sparse.

The dense module keeps the weights of all experts in two 3-D parameters, `gate_up_proj` `(E, 2I, H)` (or `up_proj`
`(E, I, H)`) and `down_proj` `(E, H, I)`; some models keep them transposed or with biases. Here each becomes one packed
parameter of the same name, the blocks of expert 0 first, then those of expert 1, and so on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsify.blocks import BlockMask, BlockShape
from sparsify.kernels.ops import block_sparse_linear
from sparsify.kernels.storage import pack
from sparsify.layers.packed import PackedModule, PackedWeight


def projections(module: nn.Module) -> tuple[str, str] | None:
    """Names of the first and second projection of a fused experts module; `None` if it is not one."""
    for first in ("gate_up_proj", "up_proj"):
        weights = [module._parameters.get(name) for name in (first, "down_proj")]
        if hasattr(module, "_apply_gate") and all(w is not None and w.dim() == 3 for w in weights):
            return first, "down_proj"
    return None


class BlockSparseExperts(PackedModule):
    """Drop-in for a fused experts module of transformers.

    Attributes:
        gate_up_proj: (or `up_proj`) packed values `(Z, bi, bo)` of all experts' first projections.
        down_proj: Packed values `(Z', bi, bo)` of all experts' second projections.
        num_experts: Number of experts, `E`.
    """

    num_experts: int

    def __init__(self, dense: nn.Module) -> None:
        """Takes over everything of the dense module but the two fused weights; `add_weight` brings those."""
        super().__init__()
        names = projections(dense)
        assert names is not None
        self.first, self.second = names
        # Biases, activation and the numbers that the model's own gating function reads come along unchanged.
        for name, parameter in dense._parameters.items():
            if name not in names:
                self.register_parameter(name, parameter)
        for name, child in dense._modules.items():
            self.register_module(name, child)
        own = set(vars(nn.Module()))
        self.__dict__.update({k: v for k, v in vars(dense).items() if k not in own})
        self.num_experts = dense._parameters[names[0]].shape[0]  # pyright: ignore[reportOptionalMemberAccess]
        self.is_transposed = bool(getattr(dense, "is_transposed", False))
        self.gated = bool(getattr(dense, "has_gate", True)) and self.first == "gate_up_proj"
        self._gate = type(dense)._apply_gate  # pyright: ignore[reportAttributeAccessIssue]
        self.train(dense.training)

    def add_weight(
        self, name: str, shape: tuple[int, int], block: BlockShape, blocks: int, dtype: torch.dtype
    ) -> None:
        """Adds a packed weight on the meta device whose values and indices are loaded later.

        Args:
            name: `gate_up_proj`, `up_proj` or `down_proj`.
            shape: `(N, K)` of one expert's matrix.
            block: Block shape.
            blocks: Stored blocks of all experts together.
            dtype: Dtype of the values.
        """
        empty = torch.empty(blocks, block.cols, block.rows, device="meta", dtype=dtype)
        self.register_parameter(name, nn.Parameter(empty))
        self._register(PackedWeight(name, f"{name}_", self.num_experts, shape, block, blocks), None)

    def pack_weight(self, name: str, weight: Tensor, masks: list[BlockMask]) -> None:
        """Packs the kept blocks of a fused weight.

        Args:
            name: `gate_up_proj`, `up_proj` or `down_proj`.
            weight: `(E, N, K)`; `(E, K, N)` where the model keeps it transposed.
            masks: One mask an expert.
        """
        matrices = weight.detach().transpose(1, 2) if self.is_transposed else weight.detach()
        values = torch.cat([pack(matrix, mask) for matrix, mask in zip(matrices, masks, strict=True)])
        self.register_parameter(name, nn.Parameter(values, requires_grad=weight.requires_grad))
        shape = (matrices.shape[1], matrices.shape[2])
        packed = PackedWeight(name, f"{name}_", self.num_experts, shape, masks[0].block, len(values))
        self._register(packed, masks)

    def dense_parameter(self, name: str) -> Tensor:
        """A fused weight as the dense module keeps it, `(E, N, K)` or transposed; a detached copy."""
        dense = torch.stack([self.dense_of(name, expert) for expert in range(self.num_experts)])
        return dense.transpose(1, 2).contiguous() if self.is_transposed else dense

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        values = getattr(self, name)[self.block_range(name, expert)]
        bias = self._parameters.get(f"{name}_bias")
        return block_sparse_linear(
            x,
            values,
            None if bias is None else bias[expert],
            self.topology(name, expert),
            self.packed[name].shape[0],
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any) -> Tensor:
        """Sends every token through its experts.

        Args:
            hidden_states: `(tokens, H)`.
            top_k_index: `(tokens, k)` int64, the experts of each token; `E` or more means none.
            top_k_weights: `(tokens, k)`, their routing weights.

        Returns:
            `(tokens, H)`.
        """
        chosen = top_k_index.flatten()
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts].tolist()
        output = torch.zeros_like(hidden_states)
        weights = top_k_weights.flatten()
        begin = 0
        for expert, count in enumerate(counts):
            slots = order[begin : begin + count]
            begin += count
            if not count:
                continue
            token = slots // top_k_index.shape[1]
            hidden = self._project(self.first, expert, hidden_states[token])
            hidden = self._gate(self, hidden) if self.gated else self.act_fn(hidden)  # pyright: ignore[reportCallIssue]
            hidden = self._project(self.second, expert, hidden) * weights[slots, None]
            output.index_add_(0, token, hidden.to(output.dtype))
        return output

    def extra_repr(self) -> str:
        """Shape, block shape and stored blocks of both weights, for `print(model)`."""
        parts = (f"{p.name}={p.shape} in {p.blocks} blocks of {p.block}" for p in self.packed.values())
        return f"experts={self.num_experts}, " + ", ".join(parts)
