"""Which kernel runs a product: the one place where that is decided.

`KERNELS` lists them in the order of the rules of thumb: the first one that takes a product runs it, unless measurements
of this GPU (`tuning`) know a faster one. To add a kernel, add a line there. On other devices, and in float64, the torch
reference runs everything.

The Hopper kernels need compute capability 9, Gluon (triton 3.6 or newer) and rows that start at 16-byte addresses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from itertools import product as combinations
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparsify.kernels import tuning
from sparsify.kernels.grouped import reference as grouped_reference
from sparsify.kernels.grouped.reference import Groups
from sparsify.kernels.linear import reference
from sparsify.kernels.tuning_files import Candidate

log = logging.getLogger("sparsify.kernels")

Options: TypeAlias = tuple[tuple[str, int], ...]
# Tiles of 128 tokens are numbered in 15 bits by the Hopper kernels' work lists.
MOST_TOKENS = 1 << 22
# Token counts up to this one are told apart; beyond it four in each power of two stand for all.
FEW_TOKENS = 64


class Product(NamedTuple):
    """All that the choice of a kernel depends on.

    Attributes:
        op: `dsd`, `dds`, `sdd` or `gated`.
        device: Index of the GPU.
        dtype: Of all operands.
        tokens: `M`, rounded up above 64.
        out_features: `N`.
        in_features: `K`.
        block_out: `bo`.
        block_in: `bi`.
        blocks: Stored blocks, `Z`; 0 where unknown.
        aligned: Whether rows of operands and result begin at 16-byte addresses and have no gaps.
        rows: Whether the first operand's rows have no gaps.
    """

    op: str
    device: int
    dtype: torch.dtype
    tokens: int
    out_features: int
    in_features: int
    block_out: int
    block_in: int
    blocks: int
    aligned: bool
    rows: bool

    @property
    def fast(self) -> bool:
        """Whether the copy engine and the tensor cores of a Hopper GPU take the operands."""
        suits = self.aligned and self.few(MOST_TOKENS) and self.dtype in (torch.float16, torch.bfloat16)
        return suits and (self.blocks > 0 or self.op == "sdd") and _hopper(self.device)

    @property
    def square(self) -> bool:
        """Whether both sides of a block are multiples of 64."""
        return self.block_out % 64 == 0 and self.block_in % 64 == 0

    @property
    def narrow(self) -> bool:
        """Whether a side of a block is one or two steps of the tensor cores, and none is less."""
        return min(self.block_out, self.block_in) in (16, 32)

    @property
    def tall(self) -> bool:
        """Whether blocks are narrow, and high enough to need no stacking."""
        return self.narrow and self.block_out >= 128

    @property
    def high(self) -> bool:
        """Whether blocks are high and wide enough for the tensor cores to take them as operand A."""
        return self.block_out % 64 == 0 and self.block_in >= 16

    def few(self, most: int) -> bool:
        """Whether there are tokens, and at most that many."""
        return 0 < self.tokens <= most

    @property
    def density(self) -> float | None:
        """Share of the weight that is stored, 0 to 1; `None` if unknown."""
        elements = self.blocks * self.block_out * self.block_in
        return min(1.0, elements / (self.out_features * self.in_features)) if elements else None


@cache
def _hopper(device: int) -> bool:
    """Whether the warp-specialised kernels run on this GPU; says once why not where one would expect them."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import_module("sparsify.kernels.hopper_common")
    except (ImportError, AttributeError) as error:
        log.warning("this Triton has no Gluon for Hopper (%s): the slower portable kernels are used", error)
        return False
    return True


class Kernel(NamedTuple):
    """A module in `linear/` that has one function for each of its products.

    Attributes:
        name: The module.
        takes: Whether it runs a product.
        options: Keyword arguments to choose from by measurement, its own choice among them; none if it has none.
    """

    name: str
    takes: Callable[[Product], bool]
    options: tuple[Options, ...] = ()


def _each(**values: tuple[int, ...]) -> tuple[Options, ...]:
    """Every combination of the options' values."""
    return tuple(tuple(zip(values, chosen, strict=True)) for chosen in combinations(*values.values()))


TILES = _each(tile=(256, 128))
# One step away from the portable kernels' own choice in each direction; `stages` holds that choice.
PORTABLE = (*_each(stages=(2, 3, 4)), *_each(tile=(32, 64)), *_each(step=(64, 128)), *_each(warps=(4, 8)))

# Below this many tokens stacking narrow blocks takes longer than it saves.
STACKED = 512

KERNELS = (
    Kernel("hopper_decode", lambda p: p.op in ("dsd", "gated") and p.few(64) and p.high and p.fast),
    Kernel("triton_decode", lambda p: p.op == "dsd" and p.few(32) and p.rows),
    Kernel("hopper_linear", lambda p: p.op in ("dsd", "dds") and p.square and p.fast, TILES),
    Kernel("hopper_narrow", lambda p: p.op == "dsd" and p.tall and p.fast, TILES),
    Kernel(
        "hopper_narrow",
        lambda p: p.op in ("dsd", "dds") and p.narrow and p.tokens >= STACKED and p.fast,
        TILES,
    ),
    Kernel("hopper_sdd", lambda p: p.op == "sdd" and p.square and p.fast),
    Kernel("hopper_narrow_sdd", lambda p: p.op == "sdd" and p.narrow and p.fast),
    Kernel("triton_dsd", lambda p: p.op == "dsd", PORTABLE),
    Kernel("triton_dds", lambda p: p.op == "dds", PORTABLE),
    Kernel("triton_sdd", lambda p: p.op == "sdd", PORTABLE),
    # Never the first choice, but worth measuring.
    Kernel("hopper_decode", lambda p: p.op == "dsd" and 64 < p.tokens <= 256 and p.high and p.fast),
    Kernel(
        "hopper_narrow",
        lambda p: p.op in ("dsd", "dds") and p.narrow and p.tokens < STACKED and p.fast,
        TILES,
    ),
)


def candidates(
    op: str, operand: Tensor, other: Tensor, block: tuple[int, int], width: int
) -> list[Candidate]:
    """Everything that can run a product here, the choice of the rules of thumb first; see `choose`.

    Of each kernel comes first the candidate without options, which chooses them for itself.
    """
    if not operand.is_cuda or operand.dtype == torch.float64:
        return [Candidate("reference")]
    return _candidates(_product(op, operand, other, block, width))


def choose(op: str, operand: Tensor, other: Tensor, block: tuple[int, int], width: int) -> Any:
    """The function that runs one product.

    Args:
        op: `dsd`, `dds`, `sdd` or `gated`.
        operand: `x`; `dy` of `dds` and `sdd`.
        other: `values` (of `gated` those of the gate); `x` of `sdd`.
        block: `(bi, bo)`.
        width: Columns of the result; of `sdd` the number of stored blocks.

    Returns:
        The function of `reference` of this name, or a kernel's with the same arguments. `None` if no kernel of this
        GPU runs it, which happens to `gated` alone.
    """
    if not operand.is_cuda or operand.dtype == torch.float64:
        return getattr(reference, op)
    product = _product(op, operand, other, block, width)
    if product not in _chosen:
        candidate = _decide(product)
        _chosen[product] = None if candidate is None else load(candidate, op)
    return _chosen[product]


# Slots of an expert from which copying them into its order, for the copy engine's sake, pays.
MANY_SLOTS = 512


def choose_grouped(
    op: str, operand: Tensor, values: Tensor | None, bias: Tensor | None, groups: Groups, width: int
) -> Callable[..., Any]:
    """The function that runs one product with the matrices of all experts.

    Args:
        op: `grouped`, `grouped_dx` or `grouped_dw`.
        operand: `x` or `dy`.
        values: `(Z, bi, bo)`; `None` for `grouped_dw`.
        bias: Of `grouped`, if it has one.
        groups: Slots by expert.
        width: Columns of the result; anything for `grouped_dw`.
    """
    if not operand.is_cuda or operand.dtype == torch.float64:
        return getattr(grouped_reference, op)
    name = "triton_grouped"
    if values is not None and bias is None and _fast_grouped(operand, values, groups, width):
        name = "hopper_grouped"
    return getattr(import_module(f"sparsify.kernels.grouped.{name}"), op)


def _fast_grouped(operand: Tensor, values: Tensor, groups: Groups, width: int) -> bool:
    """Whether the copy engine and the tensor cores of a Hopper GPU take the operands, and there are slots enough."""
    blocks, block_in, block_out = values.shape
    slots, features = groups.order.numel(), operand.shape[1]
    if operand.dtype not in (torch.float16, torch.bfloat16) or blocks == 0 or block_in % 64 or block_out % 64:
        return False
    # Tiles are numbered in 15 bits, the row pairs of all experts in 16.
    few = (
        groups.count * (width // 128 + 1 + max(block_in, block_out) // 64) < 1 << 16
        and slots <= MOST_TOKENS // 2
    )
    even = features % 8 == 0 and width % 8 == 0 and values.data_ptr() % 16 == 0
    return slots >= MANY_SLOTS * groups.count and few and even and _hopper(operand.get_device())


def load(candidate: Candidate, op: str) -> Callable[..., Any]:
    """The function of a candidate."""
    function = getattr(import_module(f"sparsify.kernels.linear.{candidate.kernel}"), op)
    return partial(function, **dict(candidate.options)) if candidate.options else function


def forget() -> None:
    """Makes the next calls decide anew, after measurements have been added."""
    _chosen.clear()
    tuning.forget()


_chosen: dict[Product, Callable[..., Any] | None] = {}


def _product(op: str, operand: Tensor, other: Tensor, block: tuple[int, int], width: int) -> Product:
    # On the path of every call: nothing here may take long.
    tokens, features = operand.shape
    size, (stride, step) = operand.element_size(), operand.stride()
    if op == "sdd":
        others = other.stride()
        gaps = step != 1 or others[1] != 1
        addresses = stride * size | others[0] * size | operand.data_ptr() | other.data_ptr()
        shape, blocks = (features, other.shape[1]), width
    else:
        gaps = step != 1
        addresses = stride * size | width * size | operand.data_ptr() | other.data_ptr()
        shape, blocks = (features, width) if op == "dds" else (width, features), other.shape[0]
    if tokens > FEW_TOKENS:
        grain = 1 << (tokens - 1).bit_length() - 3
        tokens = -(-tokens // grain) * grain
    return Product(
        op, operand.get_device(), operand.dtype, tokens, *shape, block[1], block[0], blocks,
        not gaps and addresses % 16 == 0, step == 1,
    )  # fmt: skip


def _candidates(product: Product) -> list[Candidate]:
    able = [kernel for kernel in KERNELS if kernel.takes(product)]
    return [Candidate(kernel.name, options) for kernel in able for options in ((), *kernel.options)]


def _decide(product: Product) -> Candidate | None:
    usable = _candidates(product)
    measured = tuning.lookup(
        product.op, torch.device("cuda", product.device), product.dtype,
        (product.block_out, product.block_in), (product.out_features, product.in_features),
        product.density, product.tokens,
    )  # fmt: skip
    return next((candidate for candidate in [*measured, *usable] if candidate in usable), None)
