"""MLPs whose first products go on in their kernels: the activation, and the product of a gated MLP's two halves.

A fused MLP is the same module with the same sub-modules; only its class is replaced, by a subclass with another
`forward`. That one looks at each call whether the short way does the same as the long one: without gradients, and with
block-sparse layers that nobody has wrapped, hooked or replaced since. Otherwise it runs the original `forward`. So
checkpoints, training, LoRA, hooks, copies and the way back to dense layers know nothing of it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sparsify.kernels.linear.ops import Operand, block_sparse_gated, block_sparse_linear
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.mlp_patterns import Mlp, activation_name, recognise


def fuse(model: nn.Module) -> list[str]:
    """Fuses every MLP of a model that can be, in place; none where the environment says `SPARSIFY_FUSE=0`.

    Args:
        model: A model with block-sparse layers.

    Returns:
        Names of all modules that are fused now.
    """
    if os.environ.get("SPARSIFY_FUSE") == "0":
        return []
    for module in model.modules():
        parts = None if isinstance(module, FusedMlp) else recognise(type(module))
        # What has been wrapped, for instance by accelerate, would go on calling the original.
        if parts is not None and "forward" not in vars(module) and _products(module, parts) is not None:
            module.__class__ = _fused_class(type(module))
    return [name for name, module in model.named_modules() if isinstance(module, FusedMlp)]


def unfuse(model: nn.Module) -> None:
    """Gives every fused MLP of a model its own class back, in place."""
    for module in model.modules():
        # Not where somebody has derived a class from ours, as FSDP does: it runs as well.
        if isinstance(module, FusedMlp) and "unfused" in vars(type(module)):
            module.__class__ = module.unfused  # pyright: ignore[reportAttributeAccessIssue]


class _Products(NamedTuple):
    """The sub-modules that are computed together: `activation(first(x))`, times `second(x)` if there is one."""

    first: BlockSparseLinear
    second: BlockSparseLinear | None
    activation: Any
    activation_name: str


class FusedMlp(nn.Module):
    """Base of the fused MLPs; each class of MLP has a subclass of its own, made when it is needed.

    Attributes:
        unfused: The class of MLP.
        parts: Names of its sub-modules.
    """

    unfused: ClassVar[type[nn.Module]]
    parts: ClassVar[Mlp]

    def forward(self, *inputs: Tensor, **named: Any) -> Tensor:
        """The MLP's own `forward`, in fewer kernels where nobody can tell the difference."""
        products = _products(self, self.parts)
        if products is None or named or len(inputs) != 1 or not _unwatched(inputs[0], products):
            return super().forward(*inputs, **named)
        (x,) = inputs
        first, second, _, activation = products
        if second is None:
            y = block_sparse_linear(x, *_operand(first), first.out_features, activation)
        else:
            y = block_sparse_gated(x, _operand(first), _operand(second), first.out_features, activation)
        for name in self.parts.tail:
            layer = getattr(self, name)
            if self.parts.casts and name == self.parts.tail[-1]:
                y = _cast(y, layer.weight)
            y = layer(y)
        return y

    def extra_repr(self) -> str:
        """What is fused, for `print(model)`."""
        said, products = super().extra_repr(), _products(self, self.parts)
        if products is None:
            return said
        factor = "" if products.second is None else f" * {self.parts.second}(x)"
        fused = f"fused: {products.activation_name}({self.parts.first}(x)){factor}"
        return f"{said}, {fused}" if said else fused

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle has to make the class again.
        return _new, (self.unfused,), *super().__reduce_ex__(protocol)[2:]


@cache
def _fused_class(cls: type[nn.Module]) -> type[FusedMlp]:
    own = {"unfused": cls, "parts": recognise(cls), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (FusedMlp, cls), own)


def _new(cls: type[nn.Module]) -> FusedMlp:
    fused = _fused_class(cls)
    return fused.__new__(fused)


def _products(module: nn.Module, parts: Mlp) -> _Products | None:
    """What can be computed together in an MLP; `None` if the layers are of other kinds or the activation is unknown."""
    children = module._modules
    first = children.get(parts.first)
    second = None if parts.second is None else children.get(parts.second)
    # Exactly: what somebody derives from it may compute something else.
    if type(first) is not BlockSparseLinear:
        return None
    if parts.second is not None and (type(second) is not BlockSparseLinear or second.shape != first.shape):
        return None
    activation = getattr(module, parts.activation, None)
    name = activation_name(activation)
    return None if name is None else _Products(first, second, activation, name)  # pyright: ignore[reportArgumentType]


def _unwatched(x: Tensor, products: _Products) -> bool:
    """Whether nobody misses the calls of the sub-modules: no hook, no wrapped `forward`, no gradient."""
    if _has_any_global_hook() or x.shape[-1] != products.first.in_features:
        return False
    for module in products[:3]:
        if isinstance(module, nn.Module) and (
            module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        ):
            return False
        if torch.is_grad_enabled() and isinstance(module, BlockSparseLinear):
            bias = module.bias
            if x.requires_grad or module.weight.requires_grad or (bias is not None and bias.requires_grad):
                return False
    return True


def _operand(layer: BlockSparseLinear) -> Operand:
    return Operand(layer.weight, layer.bias, layer.topology("weight"))


def _cast(y: Tensor, weight: Any) -> Tensor:
    """T5 keeps its last layer in float32."""
    castable = isinstance(weight, Tensor) and weight.dtype not in (y.dtype, torch.int8)
    return y.to(weight.dtype) if castable else y
