"""One product of one weight: every kernel that can run it, checked against dense and then timed against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify.bench import agreement
from sparsify.bench.timing import race
from sparsify.blocks import BlockMask
from sparsify.kernels import dispatch
from sparsify.kernels.storage import pack, topology
from sparsify.kernels.tuning_files import Candidate

# A kernel that is slower than the best by this factor is given up, also for the next weight. Each set of options may
# cost a compilation: a kernel that has many is tried with them only where it is close.
HOPELESS, CLOSE, MANY_OPTIONS = 2.0, 1.25, 4
# With few tokens, where reading the weight is what takes time, a call works on several copies of it, one after the
# other: each is cold, as in a model, and what starting a CUDA graph costs is shared by them. On a CPU the copies take
# this many bytes: one that stays in the caches made a dense 384x384 layer look four times as fast as in a model.
FEW_TOKENS, GPU_COPIES, CPU_COPIES, COLD_BYTES = 64, 4, 16, 32 << 20
# Rounds of the first, coarse race on a GPU.
COARSE = 3


class Weight:
    """A random weight under a mask, on a device, in all forms that a contest needs.

    Args:
        mask: Kept blocks.
        dtype: Of the values.
        device: Where they are.
    """

    def __init__(self, mask: BlockMask, dtype: torch.dtype, device: torch.device) -> None:
        self.mask, self.dtype, self.device = mask, dtype, device
        random = torch.randn(mask.shape, device=device, dtype=dtype)
        self.dense = [random / math.sqrt(mask.shape[1])]
        self.values = [pack(self.dense[0], mask)]
        crow, col = (index.to(device) for index in mask.csr())
        self.topo = topology(crow, col, mask.keep.shape[1])

    @property
    def block(self) -> tuple[int, int]:
        """`(bi, bo)`."""
        return self.mask.block.cols, self.mask.block.rows

    @cached_property
    def exact(self) -> Tensor:
        """The masked weight `(N, K)` in a precision in which products are as good as exact."""
        precision = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else torch.float64
        return self.dense[0].to(precision) * self.mask.elements().to(self.device)

    def copies(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Dense and packed values, `count` times, each time somewhere else in memory."""
        while len(self.dense) < count:
            self.dense.append(self.dense[0].clone())
            self.values.append(self.values[0].clone())
        return list(zip(self.dense[:count], self.values[:count], strict=True))


@dataclass
class Outcome:
    """What a contest found.

    Attributes:
        dense: Median microseconds of the dense product.
        times: Of each candidate that was timed to the end.
        wrong: Candidates that failed or gave wrong results, and how.
        ratios: Time over the best one's of each candidate that was timed to the end.
    """

    dense: float = math.nan
    times: dict[Candidate, float] = field(default_factory=dict)
    wrong: dict[Candidate, str] = field(default_factory=dict)
    ratios: dict[Candidate, float] = field(default_factory=dict)


class Product:
    """`dsd`, `dds` or `sdd` of a weight at one number of tokens.

    Args:
        op: Which.
        weight: The weight.
        tokens: `M`.
    """

    def __init__(self, op: str, weight: Weight, tokens: int) -> None:
        self.op, self.weight = op, weight
        place = {"device": weight.device, "dtype": weight.dtype}
        out_features, in_features = weight.mask.shape
        self.x = torch.randn(tokens, in_features, **place)
        self.dy = torch.randn(tokens, out_features, **place) if op != "dsd" else self.x
        few = tokens <= FEW_TOKENS and op != "sdd"
        self.copies = weight.copies(_copies(weight) if few else 1)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Every kernel that takes the product, each with every set of options."""
        blocks = self.weight.topo.col.numel()
        out_features, in_features = self.weight.mask.shape
        operands = {
            "dsd": (self.x, self.copies[0][1], self.weight.block, out_features),
            "dds": (self.dy, self.copies[0][1], self.weight.block, in_features),
            "sdd": (self.dy, self.x, self.weight.block, blocks),
        }
        return dispatch.candidates(self.op, *operands[self.op])

    def dense(self) -> None:
        """The dense product, with every copy of the weight."""
        for weight, _ in self.copies:
            if self.op == "dsd":
                F.linear(self.x, weight)
            elif self.op == "dds":
                torch.mm(self.dy, weight)
            else:
                torch.mm(self.dy.T, self.x)

    def sparse(self, candidate: Candidate) -> Callable[[], Tensor]:
        """The sparse product with every copy of the weight; the last one's result is returned."""
        run = dispatch.load(candidate, self.op)
        topo, (out_features, in_features) = self.weight.topo, self.weight.mask.shape

        def call() -> Tensor:
            result = self.x
            for _, values in self.copies:
                if self.op == "dsd":
                    result = run(self.x, values, None, topo, out_features)
                elif self.op == "dds":
                    result = run(self.dy, values, topo, in_features)
                else:
                    result = run(self.dy, self.x, topo, *self.weight.block)
            return result

        return call

    @cached_property
    def exact(self) -> Tensor:
        """The result, as good as exact."""
        weight = self.weight.exact
        if self.op == "dsd":
            return self.x.to(weight.dtype) @ weight.T
        if self.op == "dds":
            return self.dy.to(weight.dtype) @ weight
        return pack(self.dy.to(weight.dtype).T @ self.x.to(weight.dtype), self.weight.mask)

    def fault(self, candidate: Candidate) -> str | None:
        """Why a candidate is not to be used; `None` if its result is right."""
        try:
            # Its memory becomes the result's on a GPU: what a kernel forgets to write stays NaN.
            poison = torch.full_like(self.exact, math.nan, dtype=self.weight.dtype)
            del poison
            actual = self.sparse(candidate)()
            error, worst = agreement.off_by(actual, self.exact, self.exact.square().mean().sqrt())
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # nothing on this device would work after it
        except Exception as error:  # whatever a compiler or a driver stumbles over
            return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        budget = agreement.layer_budget(self.weight.dtype, self.weight.device)
        if error <= budget and worst <= agreement.ELEMENT * budget:
            return None
        return f"off by {error:.2g} (one element by {worst:.2g}), allowed are {budget:.2g}"


@torch.no_grad()
def contest(product: Product, repeats: int, ratios: dict[Candidate, float] | None = None) -> Outcome:
    """Times every candidate of a product against dense.

    A first, coarse race compares the kernels as they choose their own options; those that are not far behind then run
    against dense with each of their options.

    Args:
        product: The product.
        repeats: Rounds of the race.
        ratios: What a similar product's `Outcome.ratios` said: only candidates that were not far behind there are
            timed, without a coarse race.
    """
    outcome = Outcome()
    final = [c for c in product.candidates if (ratios or {}).get(c, math.inf) < HOPELESS]
    final = _sound(product, final, outcome) or _finalists(product, outcome)
    times = _race(product, final, repeats, dense=True)
    outcome.dense = times.pop("dense")
    outcome.times = {candidate: times[str(candidate)] for candidate in final}
    best = min(outcome.times.values(), default=math.nan)
    outcome.ratios = {candidate: time / best for candidate, time in outcome.times.items()}
    return outcome


def _finalists(product: Product, outcome: Outcome) -> list[Candidate]:
    """Kernels that are not far behind the best as they choose their own options, and these kernels with others."""
    bare = [candidate for candidate in product.candidates if not candidate.options]
    bare = _sound(product, bare, outcome)
    ratios = dict.fromkeys(bare, 1.0)
    if len(bare) > 1:
        times = _race(product, bare, COARSE, dense=False)
        ratios = {candidate: times[str(candidate)] / min(times.values()) for candidate in bare}
    finalists = []
    for kernel in (candidate for candidate in bare if ratios[candidate] < HOPELESS):
        options = [c for c in product.candidates if c.kernel == kernel.kernel and c.options]
        if len(options) > MANY_OPTIONS and ratios[kernel] > CLOSE:
            options = []
        # A kernel's own choice is among its options: timed once is enough.
        finalists += _sound(product, options, outcome) or [kernel]
    return finalists


def _sound(product: Product, candidates: Sequence[Candidate], outcome: Outcome) -> list[Candidate]:
    """The candidates whose results are right; what is wrong with the others is kept."""
    found = {candidate: product.fault(candidate) for candidate in candidates}
    outcome.wrong |= {candidate: fault for candidate, fault in found.items() if fault is not None}
    return [candidate for candidate, fault in found.items() if fault is None]


def _race(product: Product, candidates: Sequence[Candidate], repeats: int, dense: bool) -> dict[str, float]:
    """Microseconds of one product, by the candidate's text and `dense`."""
    calls: dict[str, Callable[[], object]] = {"dense": product.dense} if dense else {}
    calls |= {str(candidate): product.sparse(candidate) for candidate in candidates}
    seconds = race(calls, product.weight.device, repeats).seconds
    return {name: time / len(product.copies) * 1e6 for name, time in seconds.items()}


def _copies(weight: Weight) -> int:
    """How many copies make a weight cold; on a GPU no more than a quarter of the free memory holds."""
    size = weight.dense[0].nbytes
    if weight.device.type != "cuda":
        return max(1, min(CPU_COPIES, COLD_BYTES // size))
    return max(1, min(GPU_COPIES, torch.cuda.mem_get_info(weight.device)[0] // 4 // (2 * size)))
