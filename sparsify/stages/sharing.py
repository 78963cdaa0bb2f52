"""What a stage that one process ran alone has changed, taken over by the others."""

from __future__ import annotations

from typing import Any

from sparsify.runtime import processes
from sparsify.stages.convert import pack
from sparsify.stages.state import State

FIELDS = (
    "masks",
    "kept_dense",
    "slower",
    "columns",
    "history",
    "notes",
    "choices",
    "permuted",
    "report",
    "trained",
    "changed",
)


def share(state: State) -> None:
    """Gives all processes the first one's state and weights; they have gone the same way up to here."""
    if not processes.several():
        return
    statistics = {
        name: {key: tensor.cpu() for key, tensor in own.items()} for name, own in state.statistics.items()
    }
    first: dict[str, Any] = processes.from_first(
        {
            "fields": {name: getattr(state, name) for name in FIELDS},
            "statistics": statistics,
            "packed": state.packed,
        }
    )
    if not processes.is_first():
        for name, value in first["fields"].items():
            setattr(state, name, value)
        state.statistics = {
            name: {key: t.to(state.device) if t.dim() else t for key, t in own.items()}
            for name, own in first["statistics"].items()
        }
        if first["packed"] and not state.packed:
            pack(state)
    processes.share_model(state.model)
