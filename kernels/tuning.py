"""What was measured of this machine: which kernel is the fastest for a product, and how it compares with dense.

Measurements come from `sparsify tune` and from tables that ship with the package; nothing is ever measured here, so the
first call of a layer costs no more than the second. Between two measured token counts times are interpolated, and a
speed-up also between two densities; a product that is not like any measured one has no answer, and the caller's rules
of thumb decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch

from sparsify.kernels.tuning_files import Candidate, Entry, device_name, read, shipped_file, user_file

# How far a measurement reaches: by this factor in each side of the weight, in density and in the number of tokens.
NEAR = 2.0
# Speed over dense reaches further in the number of tokens, up to this factor; which kernel is the fastest may change
# between two measured counts unless they are no further apart than that.
NEAR_TOKENS = 4.0
# Beyond this many tokens every time is proportional to them.
MANY_TOKENS = 4096
# A candidate that an entry does not list was slower than the entry's best by at least this factor.
UNLISTED = 1.5
# Of two 16-bit formats one measurement serves both.
SAME_SPEED = {"float16": "bfloat16", "bfloat16": "float16"}

Shape: TypeAlias = tuple[int, int]
# Times at one number of tokens: of dense and of each candidate, in microseconds.
Point: TypeAlias = tuple[float, dict[Candidate, float]]


class Table:
    """Measurements of one machine.

    Args:
        entries: The measurements; of two with the same key the later one counts.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = {entry.key: entry for entry in entries}
        # Token counts in ascending order, by what was multiplied and how.
        self._series: dict[tuple[str, str, Shape], dict[tuple[Shape, float], list[Entry]]] = {}
        for entry in sorted(self.entries.values(), key=lambda entry: entry.tokens):
            own = self._series.setdefault((entry.op, entry.dtype, entry.block), {})
            own.setdefault((entry.shape, entry.density), []).append(entry)

    def lookup(
        self, op: str, dtype: str, block: Shape, shape: Shape, density: float | None, tokens: int
    ) -> list[Candidate]:
        """Candidates for a product, fastest first; none where nothing like it was measured. See `lookup`."""
        best: tuple[float, Point] | None = None
        for (other_shape, other_density), series in self._of(op, dtype, block).items():
            ratios = [shape[0] / other_shape[0], shape[1] / other_shape[1]]
            ratios += [density / other_density] if density and other_density else []
            distances = [abs(math.log(ratio)) for ratio in ratios]
            if max(distances) > math.log(NEAR) * 1.001 or (best is not None and sum(distances) >= best[0]):
                continue
            point = _at(series, tokens, to_choose=True)
            if point is not None:
                best = sum(distances), point
        return sorted(best[1][1], key=best[1][1].__getitem__) if best is not None else []

    def speedup(
        self, op: str, dtype: str, block: Shape, shape: Shape, density: float, tokens: int
    ) -> float | None:
        """Predicted speed over dense; `None` where nothing like it was measured. See `speedup`."""
        by_shape: dict[Shape, dict[float, float]] = {}
        for (other_shape, other_density), series in self._of(op, dtype, block).items():
            point = _at(series, tokens)
            if point is not None and _distance(shape, other_shape) is not None:
                by_shape.setdefault(other_shape, {})[other_density] = min(point[1].values()) / point[0]
        by_distance = sorted(by_shape, key=lambda other: _distance(shape, other) or 0.0)
        times = (_relative_time(by_shape[other], density) for other in by_distance)
        return next((1 / time for time in times if time is not None), None)

    def _of(self, op: str, dtype: str, block: Shape) -> dict[tuple[Shape, float], list[Entry]]:
        own = self._series.get((op, dtype, block))
        return own or self._series.get((op, SAME_SPEED.get(dtype, dtype), block), {})


def _distance(shape: Shape, other: Shape) -> float | None:
    """How unlike two weights are in size; `None` if too unlike."""
    distances = [abs(math.log(side / known)) for side, known in zip(shape, other, strict=True)]
    return sum(distances) if max(distances) <= math.log(NEAR) * 1.001 else None


def _at(series: Sequence[Entry], tokens: int, to_choose: bool = False) -> Point | None:
    """Times at a token count, between its two measured neighbours or at the only near one."""
    tokens = min(tokens, max(MANY_TOKENS, series[-1].tokens))
    below = next((entry for entry in reversed(series) if entry.tokens <= tokens), None)
    above = next((entry for entry in series if entry.tokens >= tokens), None)
    reach = NEAR_TOKENS
    if to_choose and not (below and above and above.tokens <= NEAR_TOKENS * below.tokens):
        reach = NEAR
    near = [
        entry
        for entry in (below, above)
        if entry is not None and max(tokens / entry.tokens, entry.tokens / tokens) <= reach
    ]
    if to_choose and reach == NEAR:
        near = near[:1]
    if not near:
        return None
    first, last = near[0], near[-1]
    if first.tokens == last.tokens:
        return first.dense, dict(first.times)
    share = math.log(tokens / first.tokens) / math.log(last.tokens / first.tokens)
    return _between(first.dense, last.dense, share), {
        candidate: _between(_time(first, candidate), _time(last, candidate), share)
        for candidate in {**first.times, **last.times}
    }


def _between(first: float, last: float, share: float) -> float:
    return math.exp((1 - share) * math.log(first) + share * math.log(last))


def _time(entry: Entry, candidate: Candidate) -> float:
    return entry.times.get(candidate) or UNLISTED * min(entry.times.values())


def _relative_time(measured: dict[float, float], density: float) -> float | None:
    """Sparse time over dense time at a density, from the measured ones; `None` if none of them tells."""
    known = sorted(measured)
    low, high = known[0], known[-1]
    if density < low:
        # Fewer blocks take no more time; how much less is known only nearby.
        return measured[low] if measured[low] < 1 or low <= NEAR * density else None
    if density > high:
        if density > NEAR * high:
            return None
        far = [other for other in known if high - other >= 0.1]
        if not far:
            return measured[high] * density / high  # without a second point: as if nothing were constant
        slope = (measured[high] - measured[far[-1]]) / (high - far[-1])
        return measured[high] + max(0.0, slope) * (density - high)
    above = next(other for other in known if other >= density)
    below = next(other for other in reversed(known) if other <= density)
    if above == below:
        return measured[above]
    share = (density - below) / (above - below)
    return (1 - share) * measured[below] + share * measured[above]


_tables: dict[str, Table] = {}


def table(device: torch.device) -> Table:
    """All that is known of a device: the shipped table, and over it the user's own measurements."""
    name = device_name(device)
    if name not in _tables:
        _tables[name] = Table([*read(shipped_file(name)), *read(user_file(name))])
    return _tables[name]


def forget() -> None:
    """Makes the next look-up read the files anew."""
    _tables.clear()


def lookup(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    block: Shape,
    shape: Shape,
    density: float | None,
    tokens: int,
) -> list[Candidate]:
    """Kernels for a product by measured time, fastest first.

    Args:
        op: `dsd`, `dds` or `sdd`.
        device: Where it runs.
        dtype: Of its operands.
        block: `(bo, bi)`.
        shape: `(N, K)` of the weight.
        density: Share of the weight that is stored, 0 to 1; `None` if unknown.
        tokens: `M`.

    Returns:
        Candidates at the nearest measured weight of the same block shape and dtype; empty if none is near.
    """
    return table(device).lookup(op, str(dtype)[6:], block, shape, density, tokens)


def speedup(
    device: torch.device,
    dtype: torch.dtype,
    block: Shape,
    shape: Shape,
    density: float,
    tokens: int,
    op: str = "dsd",
) -> float | None:
    """Predicted speed of a block-sparse product over the dense one, from measurements of this machine.

    Args:
        device: Where it runs.
        dtype: Of its operands.
        block: `(bo, bi)`.
        shape: `(N, K)` of the weight.
        density: Share of the weight that is stored, 0 to 1.
        tokens: `M`.
        op: `dsd`, `dds` or `sdd`.

    Returns:
        Dense time over sparse time, above 1 where sparse is faster; `None` where nothing like it was measured.
    """
    return table(device).speedup(op, str(dtype)[6:], block, shape, density, tokens)
