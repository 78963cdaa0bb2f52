"""The whole model, end to end, against a dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import nn

from sparsify import measure
from sparsify.bench import agreement
from sparsify.bench.energy import Energy
from sparsify.bench.limits import Limits, flops_of, weight_bytes
from sparsify.bench.timing import LineUp, cudnn_chooses, line_up
from sparsify.bench.workloads import Task, Workload
from sparsify.checkpoint.densify import dense_skeleton, swap_out
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.swap import sparse_modules

# Energy of a call, if it can be measured, given the call and what waits until the device has done it.
Gauge: TypeAlias = Callable[[Callable[[], object], Callable[[], object]], Energy | None]


def dense_twin(model: Any, skeleton: nn.Module | None = None) -> Any:
    """A dense model with the sparse one's weights, zeros where no block is stored.

    It shares every tensor that is not packed, so that it needs the memory of the pruned weights alone.

    Args:
        model: The sparse one.
        skeleton: The dense model on the meta device; a transformers model has its own.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    for module in sparse_modules(model).values():
        shared[id(module)] = module
    twin = deepcopy(model, shared)
    swap_out(twin, dense_skeleton(model) if skeleton is None else skeleton)
    return twin


def check(model: nn.Module, twin: nn.Module, works: Sequence[Workload]) -> list[float]:
    """Relative error of the model's output in each workload, against its dense twin.

    Raises:
        SparsifyError: If it exceeds the dtype's budget.
    """
    routed = any(isinstance(module, BlockSparseExperts) for module in sparse_modules(model).values())
    errors = []
    for work in works:
        actual, expected = work.on(model).output(), work.on(twin).output()
        errors.append(agreement.check_model(actual, expected, routed, str(work)))
    return errors


def fill_zeros(twin: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    """Puts random values of the usual size where a twin's weights are zero.

    Zeros draw less power on a GPU, and would flatter the dense model.

    Args:
        twin: What `dense_twin` made.
        names: Names of the weights that were packed, by module.
    """
    with torch.no_grad():
        for name, weights in names.items():
            for weight in map(twin.get_submodule(name).get_parameter, weights):
                missing = weight == 0
                size = (
                    weight.float().square().sum().div((~missing).sum().clamp_min(1)).sqrt().to(weight.dtype)
                )
                weight.copy_(torch.where(missing, torch.randn_like(weight) * size, weight))


def measure_models(
    sparse: nn.Module,
    dense: nn.Module,
    works: Sequence[Workload],
    errors: Sequence[float],
    limits: Limits,
    repeats: int,
    advance: Callable[[], object],
    gauge: Gauge | None = None,
) -> list[dict[str, Any]]:
    """Measures both models in each workload, in turns.

    Args:
        sparse: The block-sparse model.
        dense: The dense one, on the same device.
        works: What to do with them.
        errors: What `check` found.
        limits: Of the machine.
        repeats: Rounds of each race.
        advance: Called after each workload.
        gauge: Measures the energy of a call, if that is wanted.

    Returns:
        Rows of `what`, `batch`, `tokens`, `unit` (as in `Workload`), `error`, `timing`, `rounds`, `speedup`, and for
        each model, as `dense_...` and `sparse_...`: `us` (microseconds of a forward pass), `rate` (units a second),
        `limit_us` and `share` (what the machine's limits allow, and how much of that speed is reached), `peak_bytes`
        (weights, activations, keys and values). `energy` has `Energy.of` of each; or it is `None`. On a GPU there are
        two rows for each workload, as CUDA graphs and eager; only the second if a model cannot be captured.
    """
    device = next(sparse.parameters()).device
    rows: list[dict[str, Any]] = []
    for work, error in zip(works, errors, strict=True):
        tasks = {name: work.on(model) for name, model in (("dense", dense), ("sparse", sparse))}
        row: dict[str, Any] = {
            "what": work.what,
            "batch": work.batch,
            "tokens": work.tokens,
            "unit": work.unit,
        }
        for name, model in (("dense", dense), ("sparse", sparse)):
            row |= {f"{name}_{key}": value for key, value in _needs(work, model, tasks[name], limits).items()}
        rows += timed(row | {"error": error}, tasks, device, repeats, gauge)
        advance()
    return rows


def timed(
    row: dict[str, Any],
    tasks: Mapping[str, Task],
    device: torch.device,
    repeats: int,
    gauge: Gauge | None = None,
    eager: bool = True,
) -> list[dict[str, Any]]:
    """Races `dense` against `sparse` and completes a row; see `measure_models`.

    Args:
        row: What is known already.
        tasks: Both contestants' tasks.
        device: Where they run.
        repeats: Rounds of each race.
        gauge: Measures energy; in the first way of timing alone.
        eager: Whether what can be replayed as CUDA graphs is timed eagerly as well.
    """
    calls = {name: task.call for name, task in tasks.items()}
    with cudnn_chooses():
        ways = [line_up(calls, device)]
        if eager and ways[0].timing == "graph":
            ways.append(line_up(calls, device, graphs=False))
        raced = [way.race(repeats) for way in ways]
    rows = []
    for way, times in zip(ways, raced, strict=True):
        entry = dict(row)
        for name, task in tasks.items():
            seconds = times.seconds[name]
            entry[f"{name}_us"] = seconds / task.passes * 1e6
            entry[f"{name}_rate"] = task.units / seconds
            if f"{name}_limit_us" in entry:
                entry[f"{name}_share"] = entry[f"{name}_limit_us"] / entry[f"{name}_us"]
        entry["speedup"] = times.seconds["dense"] / times.seconds["sparse"]
        entry |= {"timing": times.timing, "rounds": times.rounds}
        entry["energy"] = _energy(way, tasks, gauge) if gauge is not None and way is ways[0] else None
        rows.append(entry)
    return rows


def _needs(work: Workload, model: nn.Module, task: Task, limits: Limits) -> dict[str, float]:
    """Least time of a forward pass, and its peak memory."""
    moved = weight_bytes(model, work.rows) + task.state_bytes
    seconds = limits.seconds(flops_of(task.call) / task.passes, moved)
    return {"limit_us": seconds * 1e6, "peak_bytes": measure.peak_memory(model, task.call) + task.state_bytes}


@torch.no_grad()
def _energy(way: LineUp, tasks: Mapping[str, Task], gauge: Gauge) -> dict[str, dict[str, float]] | None:
    found = {}
    for name, task in tasks.items():
        energy = gauge(way.calls[name], way.wait)
        if energy is None:
            return None
        found[name] = energy.of(task.units)
    return found
