"""Energy of repeated work, read from counters of the hardware; never estimated from a data sheet.

NVIDIA GPUs count the energy of the whole board (NVML's total energy counter, millijoules; Volta and later). Processors
of Intel and AMD count that of each package, some also that of the memory (RAPL in `/sys/class/powercap`, microjoules).
Such a counter moves in steps, for a GPU some tens of milliseconds apart, so that a single call says nothing: a call is
repeated for seconds, and counted from one step of the counter to a later one.

What the device draws while nothing runs, models in memory, is measured first and subtracted: what is left is the
energy of the work. Both are reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sparsify.errors import SparsifyError

POWERCAP = Path("/sys/class/powercap")
INSTALL = "pip install 'block-sparsify[energy]'"
# Seconds: of the measurement of the idle device, of the work before it counts, of the work that counts.
IDLE, WARMUP, WINDOW = 3.0, 1.0, 4.0
# The counter must move so often while the work counts, and so often in this many seconds of the idle device.
UPDATES, IDLE_UPDATES, PATIENCE = 50, 20, 30.0
# Calls between two looks at the counter last about so long.
LOOK = 0.02


class NoCounter(SparsifyError):
    """There is no energy counter, or it cannot be read."""


class Meter(Protocol):
    """A counter of energy.

    Attributes:
        name: What it counts, for people.
    """

    name: str

    def joules(self) -> float:
        """What it shows, from an unknown start."""
        ...


@dataclass(frozen=True)
class Idle:
    """The device while nothing runs.

    Attributes:
        watts: Mean power.
        step: Seconds between two steps of the counter, at least those between two looks at it.
    """

    watts: float
    step: float


@dataclass(frozen=True)
class Energy:
    """Energy of one call.

    Attributes:
        joules: Of one call, what the idle device draws subtracted; 0 if no more than that was drawn.
        joules_total: Of one call, everything.
        watts: Mean power while the work ran.
        idle_watts: Mean power of the idle device.
        seconds: How long the work counted.
        calls: Calls in that time.
        updates: About how often the counter moved in that time.
    """

    joules: float
    joules_total: float
    watts: float
    idle_watts: float
    seconds: float
    calls: int
    updates: int

    def of(self, units: float) -> dict[str, float]:
        """As JSON values, with `joules_per_unit` for calls that work through so many tokens or samples each."""
        return asdict(self) | {"joules_per_unit": self.joules / units}


class Nvml:
    """The energy counter of one NVIDIA GPU.

    Args:
        device: The CUDA device.

    Raises:
        NoCounter: If NVML, its binding, or the counter is missing.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise NoCounter(f"NVML's Python binding is missing: {INSTALL}") from None
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            # Not by number: CUDA_VISIBLE_DEVICES renumbers CUDA's devices, but not NVML's.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(
                uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            )
            self.joules()
        except pynvml.NVMLError as error:
            raise NoCounter(f"NVML gives no energy of this GPU ({error})") from error
        self.name = f"{torch.cuda.get_device_name(device)}, whole board (NVML)"

    def joules(self) -> float:
        """Joules since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


class Rapl:
    """The energy counters of all processor packages together, and of their memory where it is counted.

    Args:
        root: Folder of the kernel's power capping.

    Raises:
        NoCounter: If there is none, or it may not be read.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        named = {path.parent: path.read_text().strip() for path in sorted(root.glob("intel-rapl:*/name"))}
        self._zones = [zone for zone, name in named.items() if name.startswith("package") or name == "dram"]
        if not self._zones:
            raise NoCounter(f"this processor shows no energy counter in {root}")
        try:
            self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._last = [self._read(zone) for zone in self._zones]
        except OSError as error:
            raise NoCounter(
                f"the energy counters in {root} cannot be read ({error.strerror}): as root, chmod a+r "
                f"{root}/intel-rapl:*/energy_uj"
            ) from error
        self._wraps = [0] * len(self._zones)
        kinds = sorted({named[zone].partition("-")[0] for zone in self._zones}, reverse=True)
        self.name = f"{' and '.join(kinds)} of the whole machine (RAPL)"

    def joules(self) -> float:
        """Joules; goes on where a zone's counter wraps around, if it is read once between two wraps."""
        total = 0
        for index, zone in enumerate(self._zones):
            value = self._read(zone)
            self._wraps[index] += value < self._last[index]
            self._last[index] = value
            total += value + self._wraps[index] * self._ranges[index]
        return total / 1e6

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())


def open_meter(device: torch.device) -> Meter:
    """The counter that shows what work on a device takes.

    Raises:
        NoCounter: If there is none; the text says why, and what to do if something can be done.
    """
    if device.type == "cuda":
        return Nvml(device)
    if device.type == "cpu":
        return Rapl()
    raise NoCounter(f"no energy counter is known for {device.type}")


def idle_power(
    meter: Meter,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Idle:
    """Power of the idle device: nothing must run meanwhile.

    Raises:
        NoCounter: If the counter hardly moves.
    """
    sleep(WARMUP)  # what ran before has to end, and clocks to come down
    watch = _Watch(meter, clock)
    while watch.steps < IDLE_UPDATES or watch.seconds < IDLE:
        sleep(LOOK)
        watch.look()
        if watch.elapsed > PATIENCE:
            raise NoCounter(
                f"the energy counter moved {max(0, watch.steps)} times in {watch.elapsed:.0f} s, expected at least "
                f"{IDLE_UPDATES}"
            )
    return Idle(watch.watts, watch.seconds / watch.steps)


def energy_of(
    call: Callable[[], object],
    meter: Meter,
    idle: Idle,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Energy of one call of many, one after the other.

    Args:
        call: The work.
        meter: The counter of the device that it runs on.
        idle: What `idle_power` found.
        wait: Returns when the device has done all calls.
        clock: Seconds.

    Raises:
        NoCounter: If the counter stands still.
    """
    call()
    wait()
    begin = clock()
    call()
    wait()
    at_once = max(1, round(LOOK / max(clock() - begin, 1e-9)))

    def work() -> None:
        for _ in range(at_once):
            call()
        wait()

    begin = clock()
    while clock() - begin < WARMUP:
        work()
    watch, window = _Watch(meter, clock), max(WINDOW, UPDATES * idle.step)
    while watch.seconds < window:
        work()
        watch.look()
        if watch.steps < 1 and watch.elapsed > PATIENCE + window:
            raise NoCounter(f"the energy counter stood still for {watch.elapsed:.0f} s of work")
    seconds, calls = watch.seconds, watch.rounds * at_once
    return Energy(
        joules=max(0.0, watch.watts - idle.watts) * seconds / calls,
        joules_total=watch.watts * seconds / calls,
        watts=watch.watts,
        idle_watts=idle.watts,
        seconds=seconds,
        calls=calls,
        updates=max(watch.steps, round(seconds / idle.step)),
    )


class _Watch:
    """A counter looked at again and again: what it did from its first step seen to its last one."""

    def __init__(self, meter: Meter, clock: Callable[[], float]) -> None:
        self._meter, self._clock = meter, clock
        self._begin = self._now = clock()
        self._shown = meter.joules()
        self._looks = 0
        self._first = self._last = (self._begin, self._shown, 0)
        self.steps = -1

    def look(self) -> None:
        """Reads the counter; once after every round of work."""
        self._looks += 1
        joules, self._now = self._meter.joules(), self._clock()
        if joules != self._shown:
            self._shown, self._last = joules, (self._now, joules, self._looks)
            self.steps += 1
            if self.steps == 0:
                self._first = self._last

    @property
    def elapsed(self) -> float:
        """Seconds since the watch began."""
        return self._now - self._begin

    @property
    def seconds(self) -> float:
        """Seconds between the two steps."""
        return self._last[0] - self._first[0]

    @property
    def rounds(self) -> int:
        """Rounds of work between them."""
        return self._last[2] - self._first[2]

    @property
    def watts(self) -> float:
        """Mean power between them."""
        return (self._last[1] - self._first[1]) / self.seconds
