"""Measurements of kernels as files: one JSON document for each machine, with an entry a line.

`sparsify tune` writes to `$XDG_CACHE_HOME/sparsify/tuning/` (`~/.cache` by default); tables that ship with the package
lie in `tables/` beside this file. A file that cannot be used is as good as none, and one logged line says so.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsify.errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows, where two tunings at once may lose each other's last layer
    fcntl = None

log = logging.getLogger("sparsify.kernels")

# Raised whenever older measurements say nothing about the kernels as they are now.
VERSION = 1


class Candidate(NamedTuple):
    """One way to run a product.

    Attributes:
        kernel: Module in this folder.
        options: Keyword arguments of its function, in the order in which they are named.
    """

    kernel: str
    options: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return " ".join([self.kernel, *(f"{name}={value}" for name, value in self.options)])

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Reads what `str` wrote, such as `hopper_linear tile=256`."""
        kernel, *options = text.split()
        return cls(kernel, tuple((name, int(value)) for name, value in (o.split("=") for o in options)))


class Entry(NamedTuple):
    """One measurement.

    Attributes:
        op: `dsd`, `dds` or `sdd`.
        dtype: Such as `bfloat16`.
        block: `(bo, bi)`.
        shape: `(N, K)` of the weight.
        density: Share of the weight that is stored, 0 to 1.
        tokens: `M`.
        dense: Median microseconds of the dense product.
        times: Median microseconds of the fastest candidates, at least of the best one.
    """

    op: str
    dtype: str
    block: tuple[int, int]
    shape: tuple[int, int]
    density: float
    tokens: int
    dense: float
    times: Mapping[Candidate, float]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two measurements of the same thing have in common."""
        return self[:6]

    @property
    def best(self) -> Candidate:
        """The fastest candidate."""
        return min(self.times, key=self.times.__getitem__)

    @property
    def speedup(self) -> float:
        """Speed of the fastest candidate over dense."""
        return self.dense / self.times[self.best]


def device_name(device: torch.device) -> str:
    """Name of a device as part of a file's name: the GPU's, or the CPU's and its number of threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{cpu_name() if device.type == 'cpu' else device.type} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def cpu_name() -> str:
    """The processor's model, as the system names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def user_file(name: str) -> Path:
    """Where `sparsify tune` keeps what it measured of a device."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    return folder / "sparsify" / "tuning" / f"{name}.json"


def shipped_file(name: str) -> Path:
    """The table of a device that comes with the package, if there is one."""
    return Path(__file__).parent / "tables" / f"{name}.json"


def read(path: Path) -> list[Entry]:
    """The measurements in a file; none if it does not exist or cannot be used, which is logged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            raise ValueError(f"it has version {document['version']!r}, this is {VERSION}")
        return [_entry(row) for row in document["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("measurements in %s are not used (%s): `sparsify tune` makes new ones", path, error)
        return []


def write(path: Path, entries: Iterable[Entry], about: Mapping[str, Any]) -> None:
    """Adds measurements to a file; those that it holds already stay, unless they are of the same thing.

    Args:
        path: The file; it appears, or changes, all at once.
        entries: New measurements.
        about: Where they were made, JSON values.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            merged = {entry.key: entry for entry in [*read(path), *entries]}
            rows = [json.dumps(_row(merged[key])) for key in sorted(merged)]
            head = json.dumps({"version": VERSION, **about})[:-1]
            _replace(path, f'{head}, "entries": [\n' + ",\n".join(rows) + "\n]}\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from writing to the file's folder."""
    if fcntl is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)  # temporary files are their maker's alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "op": entry.op,
        "dtype": entry.dtype,
        "block": "x".join(map(str, entry.block)),
        "shape": "x".join(map(str, entry.shape)),
        "density": entry.density,
        "tokens": entry.tokens,
        "dense_us": round(entry.dense, 2),
        "sparse_us": {str(candidate): round(time, 2) for candidate, time in entry.times.items()},
    }


def _entry(row: Mapping[str, Any]) -> Entry:
    times = {Candidate.parse(text): float(time) for text, time in row["sparse_us"].items()}
    entry = Entry(
        str(row["op"]), str(row["dtype"]), _sides(row["block"]), _sides(row["shape"]), float(row["density"]),
        int(row["tokens"]), float(row["dense_us"]), times,
    )  # fmt: skip
    numbers = [*entry.block, *entry.shape, entry.tokens, entry.dense, *times.values()]
    if not times or not all(0 < number < math.inf for number in numbers) or not 0 <= entry.density <= 1:
        raise ValueError(f"a measurement is out of range: {dict(row)}")
    return entry


def _sides(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)
