"""`sparsify tune`: every kernel of every distinct layer, checked and timed, into a file of this machine.

From that file `sparsify.kernels.dispatch` chooses kernels, and `sparsify.prediction` says what is better left dense.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify import measure
from sparsify.bench.checkpoint import DTYPES, busy, token_counts
from sparsify.bench.products import Product, Weight, contest
from sparsify.errors import ConfigError
from sparsify.kernels import dispatch
from sparsify.kernels.tuning import UNLISTED
from sparsify.kernels.tuning_files import Candidate, Entry, device_name, read, user_file, write
from sparsify.plan import resolve_device
from sparsify.runtime.progress import Progress
from sparsify.tune import cases as tune_cases
from sparsify.tune.cases import Case

GPU_TOKENS, CPU_TOKENS = (1, 16, 256, 4096), (1, 16, 256)
GPU_REPEATS, CPU_REPEATS = 7, 25
# Gradients are wanted for many tokens alone.
TRAINING_TOKENS = 256
SPARSITIES = (0.5, 0.75, 0.9)


def tune(
    model: str | Path | None = None,
    *,
    shapes: str | Sequence[tuple[int, int]] | None = None,
    blocks: Sequence[str] | None = None,
    sparsities: Sequence[float] | None = None,
    tokens: Sequence[int] | str | None = None,
    training: bool = False,
    repeats: int | None = None,
    minutes: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    out: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times every kernel that can run a layer against dense, each after a check of its result.

    Args:
        model: A block-sparse checkpoint, whose own masks are used, or a dense one with `blocks` and `sparsities`.
        shapes: Instead of a model: weights as text, such as `"4096x4096,4096x14336"`, or as `(N, K)`; or
            `"standard"`, those of some well-known models.
        blocks: Block shapes of random masks. Default for `shapes`: the usual six.
        sparsities: Sparsities of random masks. Default for `shapes`: 0.5, 0.75 and 0.9.
        tokens: Token counts, or text such as `"1,256"`. Default: 1, 16, 256, and 4096 on a GPU.
        training: Measure the products of both gradients too, at 256 tokens and more.
        repeats: Rounds of each race. Default: 7 on a GPU, 25 on a CPU, whose times vary more.
        minutes: Begin nothing new after this time; the next run goes on.
        device: `auto` (a GPU if there is one) or any torch device.
        dtype: `auto` (the checkpoint's; for `shapes` bfloat16 on a GPU, else float32), `float32`, `float16` or
            `bfloat16`.
        out: File to add to. Default: the user's own for this machine.
        force: Measure anew what the file holds already.
        trust_remote_code: Run the Python code that a dense checkpoint brings with it.
        progress: Told about every measurement.

    Returns:
        `device` (its name), `file`, `rows` (one for each measurement, also of earlier runs), `measured` (how many
        are new), `left` (how many are still to be made), `dropped` (candidates that gave wrong results, and why),
        `notes` and `environment`.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged.
        ConfigError: If an option is wrong.
        OutputError: If the file cannot be written.
        KeyboardInterrupt: On Ctrl-C; what was measured before is kept, and the text says so.
    """
    target = resolve_device(device)
    if (model is None) == (shapes is None):
        raise ConfigError("give a checkpoint or --shapes, one of the two")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if repeats is None:
        repeats = GPU_REPEATS if target.type == "cuda" else CPU_REPEATS
    if repeats < 1:
        raise ConfigError(f"repeats: got {repeats}, expected at least 1")
    usual = GPU_TOKENS if target.type == "cuda" else CPU_TOKENS
    counts = token_counts(tokens or (tune_cases.STANDARD_TOKENS if shapes == "standard" else usual), target)
    precision = None if dtype == "auto" else getattr(torch, dtype)
    if model is not None:
        cases = tune_cases.of_model(model, precision, blocks, sparsities, trust_remote_code)
    else:
        precision = precision or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        named = [((f"{rows}x{cols}",), (rows, cols)) for rows, cols in read_shapes(shapes)]
        all_blocks, all_sparsities = blocks or tune_cases.STANDARD_BLOCKS, sparsities or SPARSITIES
        cases = tune_cases.with_random_masks(named, precision, all_blocks, all_sparsities)
    file = Path(out).expanduser() if out is not None else user_file(device_name(target))
    run = Run(cases, counts, training, target, file, repeats, force, progress or Progress())
    try:
        run.run(minutes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted: what was measured is kept in {file}; run it again to go on"
        ) from None
    finally:
        dispatch.forget()
    return run.report()


def read_shapes(shapes: str | Sequence[tuple[int, int]] | None) -> Sequence[tuple[int, int]]:
    """Weights `(N, K)` from text.

    Raises:
        ConfigError: If it is neither `standard` nor a list such as `4096x4096,4096x14336`.
    """
    if shapes == "standard":
        return tune_cases.STANDARD_SHAPES
    if not isinstance(shapes, str):
        return shapes or ()
    found = []
    for part in shapes.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ConfigError(
                f"shapes: got {part.strip()!r}, expected OUTxIN, such as 4096x14336, or standard"
            )
        found.append((int(sides[0]), int(sides[1])))
    return found


class Run:
    """One tuning: what is to be measured, and what has been.

    Args:
        cases: The weights.
        tokens: Token counts.
        training: Whether gradients are measured too.
        device: Where.
        file: Where measurements are kept.
        repeats: Rounds of each race.
        force: Measure anew what the file holds already.
        progress: Told about every measurement.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        tokens: Sequence[int],
        training: bool,
        device: torch.device,
        file: Path,
        repeats: int,
        force: bool,
        progress: Progress,
    ) -> None:
        self.cases, self.device, self.file, self.repeats = cases, device, file, repeats
        self.progress = progress
        many = [count for count in tokens if count >= TRAINING_TOKENS]
        self.settings = [("dsd", count) for count in tokens]
        self.settings += [(op, count) for op in ("dds", "sdd") for count in many if training]
        self.known = {} if force else {entry.key: entry for entry in read(file)}
        self.measured = 0
        self.notes: list[str] = []
        self.dropped: dict[tuple[str, str], str] = {}
        # How far behind the best each candidate was, by what weights of different density have in common.
        self.ratios: dict[tuple[Any, ...], dict[Candidate, float]] = {}

    def left(self, case: Case) -> list[tuple[str, int]]:
        """Products of a weight that are not measured yet."""
        return [setting for setting in self.settings if case.entry(*setting).key not in self.known]

    def run(self, minutes: float | None = None) -> None:
        """Measures all that is left, and writes it down weight by weight."""
        until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        write(self.file, [], self._about())  # a place that cannot be written to is told before the work
        total = sum(len(self.left(case)) for case in self.cases)
        self.notes = busy(self.device) if total else []
        with self.progress.task("tuning", total) as advance:
            for case in self.cases:
                left = self.left(case)
                if not left or time.monotonic() >= until:
                    continue
                advance(0, text=f"{case.names[0]} in {case.mask.block}, density {case.mask.density:.2f}")
                weight = Weight(case.mask, case.dtype, self.device)
                entries: list[Entry] = []
                try:
                    for op, tokens in left:
                        if time.monotonic() < until:
                            entries += self._measure(case, weight, op, tokens)
                            advance()
                finally:
                    write(self.file, entries, self._about())

    def _measure(self, case: Case, weight: Weight, op: str, tokens: int) -> list[Entry]:
        """One product: its entry, or nothing if no kernel gave the right result."""
        neighbour = op, case.dtype, case.mask.block, case.mask.shape, tokens
        outcome = contest(Product(op, weight, tokens), self.repeats, self.ratios.get(neighbour))
        self.ratios[neighbour] = outcome.ratios
        sides = "x".join(map(str, case.mask.shape))
        for candidate, fault in outcome.wrong.items():
            where = f"{op} of {sides} in {case.mask.block} at {tokens} tokens"
            if (str(candidate), fault) not in self.dropped:
                self.dropped[str(candidate), fault] = where
                self.progress.note(f"{candidate} is left out, first for {where}: {fault}")
        if not outcome.times:
            return []
        best = min(outcome.times.values())
        times = {candidate: time for candidate, time in outcome.times.items() if time <= UNLISTED * best}
        entry = case.entry(op, tokens, outcome.dense, times)
        self.known[entry.key] = entry
        self.measured += 1
        return [entry]

    def _about(self) -> dict[str, Any]:
        return {"device": device_name(self.device), "versions": measure.environment()["versions"]}

    def report(self) -> dict[str, Any]:
        """What `tune` returns."""
        return {
            "device": device_name(self.device),
            "file": str(self.file),
            "rows": list(self._rows()),
            "measured": self.measured,
            "left": sum(len(self.left(case)) for case in self.cases),
            "dropped": [
                {"candidate": candidate, "fault": fault, "first": where}
                for (candidate, fault), where in self.dropped.items()
            ],
            "notes": self.notes,
            "environment": measure.environment(),
        }

    def _rows(self) -> Iterator[dict[str, Any]]:
        for case in self.cases:
            for op, tokens in self.settings:
                entry = self.known.get(case.entry(op, tokens).key)
                if entry is not None:
                    yield {
                        "name": case.names[0],
                        "layers": len(case.names),
                        "op": op,
                        "shape": list(entry.shape),
                        "block": str(case.mask.block),
                        "density": entry.density,
                        "dtype": entry.dtype,
                        "tokens": tokens,
                        "dense_us": entry.dense,
                        "sparse_us": entry.times[entry.best],
                        "kernel": str(entry.best),
                        "speedup": entry.speedup,
                    }
