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
from sparsify.kernels.grouped.ops import (
    block_sparse_grouped,
    block_sparse_grouped_activated,
    group_by_expert,
)
from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.storage import Topology, pack
from sparsify.layers.mlp_patterns import activation_name
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
        # What the products' kernels can do themselves: transformers' own `act(gate) * up`, and plain activations.
        usual = not self.gated or self._gate.__name__ == "_default_apply_gate"
        self._activation = activation_name(getattr(self, "act_fn", None)) if usual else None
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

    def stacked_topology(self, name: str) -> Topology:
        """Index vectors of all experts' matrices of one weight, as `kernels.grouped_reference` describes them."""
        _, *derived = self._index_names[name]
        indices = (self._buffers[own] for own in (f"{self.packed[name].prefix}crow_indices", *derived))
        return Topology(*indices)  # pyright: ignore[reportArgumentType]

    def _project(self, name: str, x: Tensor, groups: Groups) -> Tensor:
        values, bias = getattr(self, name), self._parameters.get(f"{name}_bias")
        return block_sparse_grouped(
            x, values, bias, self.stacked_topology(name), groups, self.packed[name].shape[0]
        )

    def _project_activated(
        self, name: str, x: Tensor, groups: Groups, activation: str = "", scale: Tensor | None = None
    ) -> Tensor:
        values, bias = getattr(self, name), self._parameters.get(f"{name}_bias")
        gated = self.gated and name == self.first
        topo, features = self.stacked_topology(name), self.packed[name].shape[0]
        return block_sparse_grouped_activated(
            x, values, bias, topo, groups, features, activation, scale, gated
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any) -> Tensor:
        """Sends every token through its experts: one product for the first projections of all, one for the second.

        Without gradients activation and routing weights are part of the products' kernels.

        Args:
            hidden_states: `(tokens, H)`.
            top_k_index: `(tokens, k)` integers, the experts of each token; `E` or more means none.
            top_k_weights: `(tokens, k)`, their routing weights.

        Returns:
            `(tokens, H)`.
        """
        groups = group_by_expert(top_k_index.flatten(), self.num_experts)
        if torch.is_grad_enabled():
            hidden = self._project(self.first, hidden_states, groups)
            outputs = self._project(self.second, self._activate(hidden), groups)
            outputs = outputs.unflatten(0, top_k_index.shape) * top_k_weights.unsqueeze(-1)
        else:
            if self._activation is None:
                hidden = self._activate(self._project(self.first, hidden_states, groups))
            else:
                hidden = self._project_activated(self.first, hidden_states, groups, self._activation)
            scale = top_k_weights.flatten()
            outputs = self._project_activated(self.second, hidden, groups, scale=scale)
            outputs = outputs.unflatten(0, top_k_index.shape)
        return outputs.sum(1).to(hidden_states.dtype)

    def _activate(self, hidden: Tensor) -> Tensor:
        return self._gate(self, hidden) if self.gated else self.act_fn(hidden)  # pyright: ignore[reportCallIssue]

    def extra_repr(self) -> str:
        """Shape, block shape and stored blocks of both weights, for `print(model)`."""
        parts = (f"{p.name}={p.shape} in {p.blocks} blocks of {p.block}" for p in self.packed.values())
        return f"experts={self.num_experts}, " + ", ".join(parts)
