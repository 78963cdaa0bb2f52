"""What joins the parts of a layer: each of these is one collective in the forward or in the backward pass.

With the `f` and `g` of Shoeybi et al., "Megatron-LM" (2019, section 3): `replicated` is the identity whose gradient is
summed, `summed` is the sum whose gradient is passed on as it is. All work on whole activations that are the same on
every rank outside of the split layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


def replicated(x: Tensor, group: Any) -> Tensor:
    """`x` as it is, on its way into layers of which each rank has a part; its gradient is the sum over the ranks."""
    return _Replicated.apply(x, group) if torch.is_grad_enabled() and x.requires_grad else x


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum of `x` over the ranks; the gradient, the same on all of them, goes to each. May write into `x`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Summed.apply(x, group)
    distributed.all_reduce(x, group=group)
    return x


def joined(x: Tensor, widths: list[int], group: Any) -> Tensor:
    """`x` `(..., widths[rank])` of all ranks beside each other; each gets back its own gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Joined.apply(x, widths, group)
    return _join(x, widths, group)


def _join(x: Tensor, widths: list[int], group: Any) -> Tensor:
    # Collectives are fastest with parts of one size.
    part = torch.nn.functional.pad(x, (0, max(widths) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(part) for _ in widths]
    distributed.all_gather(parts, part, group=group)
    return torch.cat([own[..., :width] for own, width in zip(parts, widths, strict=True)], dim=-1)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int], group: Any) -> Tensor:
        rank = distributed.get_rank(group)
        ctx.own = slice(sum(widths[:rank]), sum(widths[: rank + 1]))
        return _join(x, widths, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient[..., ctx.own].contiguous(), None, None
