"""`sparsify bench`: a block-sparse checkpoint against dense, layer by layer and end to end."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import measure
from sparsify.bench import energy as energy_counters
from sparsify.bench import layers as bench_layers
from sparsify.bench import model as bench_model
from sparsify.bench import verdict
from sparsify.bench.limits import Limits, machine_limits
from sparsify.bench.workloads import Workload, given_workloads, positive, sample_inputs, workloads
from sparsify.checkpoint import plain, reader
from sparsify.checkpoint.densify import dense_skeleton
from sparsify.custom import find
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.swap import sparse_modules
from sparsify.plan import resolve_device, resolve_task
from sparsify.runtime.progress import Progress

GPU_TOKENS, CPU_TOKENS = (1, 16, 256, 2048), (1, 16, 128)
DTYPES = ("auto", "float32", "float16", "bfloat16")
# Both models must be of one architecture and size for their times to say anything.
SAME = (
    "architectures",
    "module_class",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
)


@dataclass(frozen=True)
class Plan:
    """What `bench` is asked to do, checked without loading weights.

    Attributes:
        path: A block-sparse checkpoint.
        info: What its files say of it.
        against: The dense checkpoint to set beside it end to end, or `None`.
        device: Where.
        tokens: Tokens of each sequence.
        batches: Sequences or samples at once.
        module: Of a plain module's checkpoint, what builds the dense module.
        inputs: What makes its inputs.
    """

    path: str | Path
    info: reader.CheckpointInfo
    against: str | Path | None
    device: torch.device
    tokens: list[int]
    batches: list[int]
    module: Callable[[], nn.Module] | None = None
    inputs: Callable[[int], Mapping[str, Tensor]] | None = None

    def load(self, path: str | Path, dtype: Any, trust_remote_code: bool) -> Any:
        """The model of a checkpoint, on the device."""
        if self.module is None:
            return reader.load(path, self.device, dtype, trust_remote_code=trust_remote_code)
        return plain.load(path, self.module(), self.device, dtype)


def plan(
    path: str | Path,
    *,
    against: str | Path | None = None,
    tokens: Sequence[int] | str | None = None,
    batches: Sequence[int] | str = (1,),
    repeats: int = 20,
    module: str | Callable[[], nn.Module] | None = None,
    inputs: str | Callable[[int], Mapping[str, Tensor]] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Plan:
    """Checks the arguments of `bench`; arguments and errors are those."""
    target = resolve_device(device)
    counts, sizes = token_counts(tokens, target), positive("batches", batches)
    if repeats < 1:
        raise ConfigError(f"repeats: got {repeats}, expected at least 1")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    info = _check_paths(path, against)
    build = plain.builder(path, info.config, module)
    if inputs is not None and module is None:
        raise ConfigError(
            "inputs are for the checkpoint of a plain module: give --module too, or leave them out"
        )
    make = find(inputs, "inputs", ConfigError) if isinstance(inputs, str) else inputs
    return Plan(path, info, against, target, counts, sizes, build, make)


def bench(
    path: str | Path,
    *,
    against: str | Path | None = None,
    tokens: Sequence[int] | str | None = None,
    batches: Sequence[int] | str = (1,),
    energy: bool = False,
    repeats: int = 20,
    module: str | Callable[[], nn.Module] | None = None,
    inputs: str | Callable[[int], Mapping[str, Tensor]] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures every distinct block-sparse layer and the whole model beside dense ones, in turns.

    Args:
        path: A block-sparse checkpoint.
        against: The dense checkpoint to set beside it end to end. By default the sparse model made dense, random
            values in place of the removed ones.
        tokens: Tokens of each sequence, or text such as `"1,256"`: of a prefill, and those before a decoding step.
            Default: 1, 16, 256 and 2048 on a GPU, 1, 16 and 128 else. Pictures and recordings have their own.
        batches: Sequences, pictures or recordings at once, or text such as `"1,16"`.
        energy: Measure the energy of each token or sample too, where the device counts it.
        repeats: Rounds of each measurement; long ones stop earlier.
        module: For the checkpoint of a plain module, its class or what else builds a dense one, or where that is, as
            `package.module:name`; called without arguments.
        inputs: What gives such a module's keyword arguments for a number of samples, or where that is. Without it
            only layers are timed.
        device: `auto` (a GPU if there is one) or any torch device.
        dtype: `auto` (the sparse checkpoint's own), `float32`, `float16` or `bfloat16`.
        trust_remote_code: Run the Python code that a checkpoint brings with it.
        progress: Told about every measurement.

    Returns:
        `path`, `against`, `device`, `gpu` (its name or `None`), `dtype`, `tokens`, `batches`, `limits` (operations and
        bytes a second that this machine reaches), `layers` (one entry a group of equal layers: see
        `layers.Group.describe`, with `times` and `skipped`), `end_to_end` (`dense`: what the dense model is; `times`:
        see `model.measure_models`; `bytes`, `bytes_dense`; or `None`), `energy` (`meter`, `idle_watts`; or `None`),
        `verdict`, `advice`, `notes` and `environment`.

    Raises:
        CheckpointError: If a checkpoint cannot be loaded, `path` is not block-sparse, or `against` is.
        ConfigError: If an option is wrong, or `against` is another architecture or size.
        SparsifyError: If an output differs from its dense equivalent's by more than the dtype allows.
    """
    options = {"tokens": tokens, "batches": batches, "repeats": repeats, "device": device, "dtype": dtype}
    wanted = plan(path, against=against, module=module, inputs=inputs, **options)
    progress = progress or Progress()
    with progress.task(f"loading {path}"):
        model = wanted.load(path, None if dtype == "auto" else dtype, trust_remote_code)
        reader.check_weights(model)
    torch.manual_seed(0)
    notes = busy(wanted.device)
    precision = _dtype(model)
    limits = machine_limits(wanted.device, precision)
    if wanted.module is None:
        task = resolve_task("auto", str(path), type(model).__name__)
        sample = sample_inputs(reader.load_processor(path, trust_remote_code), task)
        works, left_out = workloads(model, task, wanted.tokens, wanted.batches, sample)
    elif wanted.inputs is None:
        works, left_out = [], ["end to end is not timed: say what makes the module's inputs (--inputs)"]
    else:
        works, left_out = given_workloads(model, wanted.inputs, wanted.batches), []
    samples = [work for work in works if work.inputs is not None]
    rows = {work.rows for work in works if work.inputs is None}
    if tokens is not None or not samples:
        rows |= {batch * count for batch in wanted.batches for count in wanted.tokens}
    skeleton = dense_skeleton(model) if wanted.module is None else wanted.module().to("meta")
    groups = _bench_layers(model, skeleton, sorted(rows), samples, repeats, progress, limits)
    notes += left_out
    if works and (lack := _lack(wanted, precision)) is not None:
        works = []
        notes.append(f"end to end is not timed: {lack}")
    gauge, counter = None, None
    if energy and works:
        gauge, counter = _gauge(wanted.device, notes, progress)
    elif energy:
        notes.append("energy is not measured: nothing is timed end to end")
    end_to_end = None
    if works:
        end_to_end = _bench_model(
            model, skeleton, wanted, works, repeats, progress, limits, gauge, trust_remote_code
        )
    return {
        "path": str(path),
        "against": None if against is None else str(against),
        "device": str(wanted.device),
        "gpu": torch.cuda.get_device_name(wanted.device) if wanted.device.type == "cuda" else None,
        "dtype": str(precision).removeprefix("torch."),
        "tokens": wanted.tokens,
        "batches": wanted.batches,
        "limits": asdict(limits),
        "layers": groups,
        "end_to_end": end_to_end,
        "energy": counter,
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
    return positive("tokens", tokens)


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


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _lack(wanted: Plan, dtype: torch.dtype) -> str | None:
    """What memory the dense model lacks, in words."""
    info = wanted.info
    needed = sum(layer.bytes_dense for layer in info.layers)
    needed += 0 if wanted.against is None else info.dense_bytes
    needed = needed * dtype.itemsize // _stored_size(info)
    free = _free_bytes(wanted.device)
    if free is None or free >= needed:
        return None
    return f"the dense model needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"


def _gauge(
    device: torch.device, notes: list[str], progress: Progress
) -> tuple[bench_model.Gauge | None, dict[str, Any] | None]:
    """What measures energy, and what is said of it; adds a note where that is impossible."""
    try:
        meter = energy_counters.open_meter(device)
        with progress.task("measuring the power of the idle device"):
            idle = energy_counters.idle_power(meter)
    except energy_counters.NoCounter as error:
        notes.append(f"energy is not measured: {error}")
        return None, None

    def gauge(call: Any, wait: Any) -> energy_counters.Energy | None:
        try:
            return energy_counters.energy_of(call, meter, idle, wait)
        except energy_counters.NoCounter as error:
            note = f"energy is not measured everywhere: {error}"
            notes.extend([note] if note not in notes else [])
            return None

    return gauge, {"meter": meter.name, "idle_watts": idle.watts}


def _bench_layers(
    model: Any,
    skeleton: nn.Module,
    counts: Sequence[int],
    samples: Sequence[Workload],
    repeats: int,
    progress: Progress,
    limits: Limits,
) -> list[dict[str, Any]]:
    found = bench_layers.groups(model)
    seen = {work.batch: bench_layers.shapes_seen(found, work.on(model).output) for work in samples}
    entries = []
    with progress.task("timing layers", len(found) * (len(counts) + len(seen))) as advance:
        for group in found:
            advance(0, text=group.name)
            shapes = {batch: own[group.name] for batch, own in seen.items() if group.name in own}
            skipped = _why_skipped(group, skeleton)
            if skipped is None and not counts and not shapes:
                skipped = "not timed: the forward pass does not call it"
            times = []
            if skipped is None:
                times = bench_layers.measure_group(group, skeleton, counts, repeats, advance, limits, shapes)
            entries.append(group.describe() | {"times": times, "skipped": skipped})
    return entries


def _why_skipped(group: bench_layers.Group, skeleton: Any) -> str | None:
    if isinstance(group.module, BlockSparseExperts) and bench_layers.experts_per_token(skeleton) is None:
        return "not timed: the config does not say how many experts a token is sent to"
    return None


def _bench_model(
    model: Any,
    skeleton: nn.Module,
    wanted: Plan,
    works: Sequence[Workload],
    repeats: int,
    progress: Progress,
    limits: Limits,
    gauge: bench_model.Gauge | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    packed = {name: list(module.packed) for name, module in sparse_modules(model).items()}
    dense = bench_model.dense_twin(model, skeleton)
    with progress.task("checking the whole model"):
        errors = bench_model.check(model, dense, works)
    if wanted.against is None:
        bench_model.fill_zeros(dense, packed)
        described = "the sparse model made dense, random values in place of the removed ones"
    else:
        del dense  # its memory is the other one's
        with progress.task(f"loading {wanted.against}"):
            dense = wanted.load(wanted.against, _dtype(model), trust_remote_code)
        described = str(wanted.against)
    with progress.task("timing the whole model", len(works)) as advance:
        times = bench_model.measure_models(model, dense, works, errors, limits, repeats, advance, gauge)
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
