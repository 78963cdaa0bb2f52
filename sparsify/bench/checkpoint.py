"""`sparsify bench`: a block-sparse checkpoint against dense, layer by layer and end to end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify import measure
from sparsify.bench import layers as bench_layers
from sparsify.bench import model as bench_model
from sparsify.bench import verdict
from sparsify.checkpoint import reader
from sparsify.checkpoint.densify import dense_skeleton
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.swap import sparse_modules
from sparsify.plan import resolve_device
from sparsify.progress import Progress

GPU_TOKENS, CPU_TOKENS = (1, 16, 256, 2048), (1, 16, 128)
DTYPES = ("auto", "float32", "float16", "bfloat16")
# Both models must be of one architecture and size for their times to say anything.
SAME = ("architectures", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    tokens: Sequence[int] | str | None = None,
    repeats: int = 20,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every distinct block-sparse layer and the whole model against dense ones, in turns.

    Args:
        path: A block-sparse checkpoint.
        against: The dense checkpoint to set beside it end to end. By default the sparse model made dense, random
            values in place of the removed ones.
        tokens: Token counts, or text such as `"1,256"`. Default: 1, 16, 256 and 2048 on a GPU, 1, 16 and 128 else.
        repeats: Rounds of each measurement; long ones stop earlier.
        device: `auto` (a GPU if there is one) or any torch device.
        dtype: `auto` (the sparse checkpoint's own), `float32`, `float16` or `bfloat16`.
        trust_remote_code: Run the Python code that a checkpoint brings with it.
        progress: Told about every measurement.

    Returns:
        `path`, `against`, `device`, `gpu` (its name or `None`), `dtype`, `tokens`, `layers` (one entry a group of
        equal layers: see `layers.Group.describe`, with `times` and `skipped`), `end_to_end` (`dense`: what the dense
        model is; `times`, `bytes`, `bytes_dense`; or `None`), `verdict`, `advice`, `notes` and `environment`.

    Raises:
        CheckpointError: If a checkpoint cannot be loaded, `path` is not block-sparse, or `against` is.
        ConfigError: If an option is wrong, or `against` is another architecture or size.
        SparsifyError: If an output differs from its dense equivalent's by more than the dtype allows.
    """
    progress = progress or Progress()
    target = resolve_device(device)
    counts = token_counts(tokens, target)
    if repeats < 1:
        raise ConfigError(f"repeats: got {repeats}, expected at least 1")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    info = _check_paths(path, against)
    with progress.task(f"loading {path}"):
        precision = None if dtype == "auto" else dtype
        model = reader.load(path, target, precision, trust_remote_code=trust_remote_code)
        reader.check_weights(model)
    torch.manual_seed(0)
    notes = busy(target)
    groups = _bench_layers(model, counts, repeats, progress)
    usable, left_out = bench_model.usable_counts(model, counts)
    notes += left_out
    needed = sum(layer.bytes_dense for layer in info.layers) + (0 if against is None else info.dense_bytes)
    needed = needed * model.dtype.itemsize // _stored_size(info)
    end_to_end = None
    if usable and (free := _free_bytes(target)) is not None and free < needed:
        notes.append(
            f"end to end is not timed: the dense model needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        )
    elif usable:
        options = {"trust_remote_code": trust_remote_code}
        end_to_end = _bench_model(model, against, target, usable, repeats, progress, options)
    return {
        "path": str(path),
        "against": None if against is None else str(against),
        "device": str(target),
        "gpu": torch.cuda.get_device_name(target) if target.type == "cuda" else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": counts,
        "layers": groups,
        "end_to_end": end_to_end,
        "verdict": verdict.closing(groups, end_to_end),
        "advice": verdict.advice(groups),
        "notes": notes,
        "environment": measure.environment(),
    }


def token_counts(tokens: Sequence[int] | str | None, device: torch.device) -> list[int]:
    """The token counts to measure, sorted.

    Raises:
        ConfigError: If they are not positive whole numbers.
    """
    if tokens is None:
        tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    parts = [part.strip() for part in tokens.split(",")] if isinstance(tokens, str) else list(tokens)
    if not parts or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"tokens: got {tokens!r}, expected positive whole numbers, such as 1,16,256")
    return sorted({int(part) for part in parts})


def busy(device: torch.device) -> list[str]:
    """Says so if other processes take the cores: threads that wait for each other then measure the others."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if device.type != "cpu" or load + threads <= cores + 0.5:
        return []
    remedy = "run it alone" if threads == 1 else "run it alone, or with OMP_NUM_THREADS=1"
    return [
        f"the machine was busy (load {load:.1f} on {cores} cores): these times are not reliable; {remedy}"
    ]


def _check_paths(path: str | Path, against: str | Path | None) -> reader.CheckpointInfo:
    """Everything about the checkpoints that can be said before weights are loaded."""
    info = reader.open_checkpoint(path)
    if not info.layers:
        raise CheckpointError(
            f"{path} is a dense checkpoint, expected a block-sparse one: make one with `sparsify prune {path} --out "
            f"path/to/sparse` and give its folder"
        )
    if against is not None:
        dense = reader.open_checkpoint(against)
        if dense.layers:
            raise CheckpointError(f"--against {against} is block-sparse itself: give the dense checkpoint")
        for key in SAME:
            ours, theirs = info.config.get(key), dense.config.get(key)
            if ours != theirs:
                raise ConfigError(
                    f"{against} has {key} {theirs}, {path} has {ours}: give the dense checkpoint that it was made from"
                )
    return info


def _bench_layers(
    model: Any, counts: Sequence[int], repeats: int, progress: Progress
) -> list[dict[str, Any]]:
    skeleton = dense_skeleton(model)
    found = bench_layers.groups(model)
    entries = []
    with progress.task("timing layers", len(found) * len(counts)) as advance:
        for group in found:
            advance(0, text=group.name)
            skipped = _why_skipped(group, skeleton)
            times = []
            if skipped is None:
                times = bench_layers.measure_group(group, skeleton, counts, repeats, advance)
            entries.append(group.describe() | {"times": times, "skipped": skipped})
    return entries


def _why_skipped(group: bench_layers.Group, skeleton: Any) -> str | None:
    if isinstance(group.module, BlockSparseExperts) and bench_layers.experts_per_token(skeleton) is None:
        return "not timed: the config does not say how many experts a token is sent to"
    return None


def _bench_model(
    model: Any,
    against: str | Path | None,
    device: torch.device,
    counts: Sequence[int],
    repeats: int,
    progress: Progress,
    options: dict[str, Any],
) -> dict[str, Any]:
    packed = {name: list(module.packed) for name, module in sparse_modules(model).items()}
    dense = bench_model.dense_twin(model)
    with progress.task("checking the whole model"):
        errors = bench_model.check(model, dense, counts)
    if against is None:
        bench_model.fill_zeros(dense, packed)
        described = "the sparse model made dense, random values in place of the removed ones"
    else:
        del dense  # its memory is the other one's
        with progress.task(f"loading {against}"):
            dense = reader.load(against, device, model.dtype, **options)
        described = str(against)
    with progress.task("timing the whole model", len(counts)) as advance:
        times = bench_model.measure_models(model, dense, errors, repeats, advance)
    return {
        "dense": described,
        "times": times,
        "bytes": measure.model_bytes(model),
        "bytes_dense": measure.model_bytes(dense),
    }


def _stored_size(info: reader.CheckpointInfo) -> int:
    """Bytes of one stored weight of the checkpoint."""
    layer = info.layers[0]
    elements = 1
    for side in layer.shape:
        elements *= side
    return max(1, layer.bytes_dense // elements)


def _free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
