"""Which of several pruned models is the best trade of quality for speed.

A model is on the *front* if it is faster than dense and no other one is at least as fast and as good (Pareto). Of the
front one is chosen by one of two rules: the fastest that loses no more than is allowed; or, where nothing is said, the
*knee*, furthest above the straight line from dense to the fastest, both axes scaled to that line (the "maximum bulge"
of Das, "On characterizing the knee of the Pareto curve", 1999). A front that nowhere rises above that line has no knee,
and nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# A model is faster than dense if it is by more than this share: less is within the noise of a measurement.
TIE = 0.02


@dataclass(frozen=True)
class Trade:
    """What one pruned model gives for what it takes.

    Attributes:
        speedup: Over dense, measured.
        loss: Of quality against dense, as people are told it: points, or per cent more perplexity; below 0 for a gain.
        cost: The same on the scale that the knee is looked for on.
    """

    speedup: float
    loss: float
    cost: float


def trade(speedup: float, metric: str, quality: float, dense: float) -> Trade:
    """The trade of a model.

    Args:
        speedup: Over dense.
        metric: `perplexity` (lower is better), or a measure in per cent (higher is better).
        quality: Of the model.
        dense: Of the dense one.
    """
    if metric == "perplexity":
        # Perplexity grows without bounds; its logarithm is the loss in nats a token.
        return Trade(speedup, 100 * (quality / dense - 1), math.log(quality / dense))
    return Trade(speedup, dense - quality, dense - quality)


def front(trades: Sequence[Trade]) -> list[int]:
    """Positions of the models on the front, slowest first."""
    order = sorted(range(len(trades)), key=lambda index: (-trades[index].speedup, trades[index].cost))
    found: list[int] = []
    for index in order:
        better = not found or trades[index].cost < trades[found[-1]].cost
        if trades[index].speedup > 1 + TIE and better:
            found.append(index)
    return found[::-1]


def best(trades: Sequence[Trade], max_loss: float | None = None) -> int | None:
    """Position of the best choice; `None` if nothing is faster than dense, or loses as little, or if there is no knee.

    Args:
        trades: All models.
        max_loss: The most that may be lost, in the unit of `Trade.loss`; without it the knee is chosen.
    """
    candidates = front(trades)
    if max_loss is not None:
        allowed = [index for index in candidates if trades[index].loss <= max_loss]
        return allowed[-1] if allowed else None
    if not candidates:
        return None
    fastest, dearest = (max(getattr(trades[i], name) for i in candidates) for name in ("speedup", "cost"))
    if dearest <= 0:
        return candidates[-1]
    least = min(0.0, *(trades[index].cost for index in candidates))

    def bulge(index: int) -> float:
        found = trades[index]
        return (found.speedup - 1) / (fastest - 1) - (found.cost - least) / (dearest - least)

    chosen = max(candidates, key=bulge)
    return chosen if bulge(chosen) > 0 else None


def rule(max_loss: float | None, metric: str) -> str:
    """The rule of `best` in words."""
    if max_loss is None:
        return "the knee of the front: furthest above the straight line from dense to the fastest"
    unit = "per cent more perplexity" if metric == "perplexity" else "points"
    return f"the fastest that loses at most {max_loss:g} {unit}"
