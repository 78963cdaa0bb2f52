"""Energy from counters that move in steps: a fake counter whose every joule is known."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsify.bench import energy
from sparsify.bench.energy import NoCounter, Rapl, energy_of, idle_power, open_meter

IDLE_WATTS = 80.0


class Machine:
    """A device with a clock: work and sleep let time pass, and the counter shows whole steps of the energy drawn."""

    name = "a fake"

    def __init__(self, step: float = 0.1, idle: float = IDLE_WATTS, read: float = 0.0005) -> None:
        self.now, self.drawn, self.shown, self.step, self.idle, self.read = (
            5.0,
            1000.0,
            1000.0,
            step,
            idle,
            read,
        )
        self.looks = 0

    def spend(self, seconds: float, watts: float) -> None:
        while seconds > 1e-12:
            edge = (math.floor(self.now / self.step + 1e-9) + 1) * self.step
            part = min(seconds, edge - self.now)
            self.now, self.drawn, seconds = self.now + part, self.drawn + part * watts, seconds - part
            if self.now >= edge - 1e-9:
                self.shown = self.drawn

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.spend(seconds, self.idle)

    def joules(self) -> float:
        self.looks += 1
        self.spend(self.read, self.idle)  # the device idles while the host asks
        return self.shown


def measured(machine: Machine, seconds: float, watts: float) -> energy.Energy:
    idle = idle_power(machine, machine.clock, machine.sleep)
    return energy_of(lambda: machine.spend(seconds, watts), machine, idle, clock=machine.clock)


@pytest.mark.parametrize("step", [0.001, 0.02, 0.1, 0.25], ids="step {}".format)
@pytest.mark.parametrize(
    ("seconds", "watts"), [(1e-4, 500.0), (0.013, 300.0), (0.3, 650.0), (2.5, 90.0)],
    ids=["short", "middle", "long", "very long, little"],
)  # fmt: skip
def test_energy_of_a_call_without_what_the_idle_device_draws(step, seconds, watts):
    found = measured(Machine(step), seconds, watts)
    assert found.idle_watts == pytest.approx(IDLE_WATTS, rel=0.02)
    # Two looks may each be late by a round of work, and the counter by a step: of four seconds and of fifty steps.
    assert found.joules == pytest.approx((watts - IDLE_WATTS) * seconds, rel=0.06, abs=0.03 * watts * seconds)
    assert found.joules_total == pytest.approx(watts * seconds, rel=0.08)
    assert found.seconds >= max(energy.WINDOW, 0.95 * energy.UPDATES * step)
    assert found.updates >= 0.9 * energy.UPDATES


def test_two_calls_compare_as_their_energies_do():
    dense, sparse = measured(Machine(), 0.010, 480.0), measured(Machine(), 0.004, 380.0)
    assert dense.joules / sparse.joules == pytest.approx(4.0 / 1.2, rel=0.05)
    values = dense.of(8)
    assert values["joules_per_unit"] == dense.joules / 8 and values["idle_watts"] == dense.idle_watts


def test_less_than_idle_is_nothing_never_negative():
    assert measured(Machine(), 0.01, IDLE_WATTS - 5).joules == 0.0


def test_work_that_is_not_done_when_the_call_returns_is_waited_for():
    machine, queue = Machine(), []

    def wait() -> None:
        while queue:
            machine.spend(queue.pop(), 400.0)

    idle = idle_power(machine, machine.clock, machine.sleep)
    found = energy_of(lambda: queue.append(0.01), machine, idle, wait, machine.clock)
    assert found.joules == pytest.approx(3.2, rel=0.05)


def test_a_counter_that_hardly_moves_gives_no_number():
    machine = Machine(step=10.0)
    with pytest.raises(NoCounter, match=r"moved \d times in 3\d s, expected at least 20"):
        idle_power(machine, machine.clock, machine.sleep)
    still = Machine(step=1e9)
    with pytest.raises(NoCounter, match="stood still for"):
        energy_of(lambda: still.spend(0.1, 300.0), still, energy.Idle(80.0, 0.1), clock=still.clock)


def zone(root, number: str, name: str, microjoules: int, most: int = 10_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_and_wrap_around(tmp_path):
    first, second = zone(tmp_path, "0", "package-0", 9_000_000), zone(tmp_path, "1", "package-1", 1_000_000)
    memory = zone(tmp_path, "0:1", "dram", 500_000)
    zone(tmp_path, "0:0", "core", 7_000_000)  # a part of the package
    meter = Rapl(tmp_path)
    before = meter.joules()
    first.write_text("2000000\n")  # wrapped: 3 J more
    second.write_text("1500000\n")
    memory.write_text("600000\n")
    assert meter.joules() - before == pytest.approx(3.0 + 0.5 + 0.1)
    assert meter.joules() - before == pytest.approx(3.6)
    assert meter.name == "package and dram of the whole machine (RAPL)"


def test_processors_without_a_counter_say_so(tmp_path, monkeypatch):
    with pytest.raises(NoCounter, match="this processor shows no energy counter in"):
        Rapl(tmp_path)
    monkeypatch.setattr(energy.Rapl.__init__, "__defaults__", (tmp_path,))
    with pytest.raises(NoCounter, match="shows no energy counter"):
        open_meter(torch.device("cpu"))
    with pytest.raises(NoCounter, match="no energy counter is known for meta"):
        open_meter(torch.device("meta"))


def test_a_counter_for_root_alone_says_how_to_open_it(tmp_path, monkeypatch):
    zone(tmp_path, "0", "package-0", 1)
    monkeypatch.setattr(Rapl, "_read", staticmethod(lambda zone: (zone / "gone").read_text()))
    with pytest.raises(NoCounter, match=r"cannot be read .*: as root, chmod a\+r"):
        Rapl(tmp_path)


class NvmlError(Exception):
    pass


def test_nvml_is_asked_for_the_gpu_of_that_uuid(monkeypatch):
    asked = []
    fake = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 12_345 if handle == "handle" else None,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-ab"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    meter = open_meter(torch.device("cuda"))
    assert (meter.joules(), asked, meter.name) == (12.345, ["GPU-1234-ab"], "H200, whole board (NVML)")

    def fails(handle):
        raise NvmlError("Not Supported")

    fake.nvmlDeviceGetTotalEnergyConsumption = fails
    with pytest.raises(NoCounter, match=r"NVML gives no energy of this GPU \(Not Supported\)"):
        open_meter(torch.device("cuda"))


def test_without_its_binding_nvml_is_to_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoCounter, match=r"binding is missing: pip install 'block-sparsify\[energy\]'"):
        open_meter(torch.device("cuda"))


@pytest.mark.gpu
def test_a_gpu_takes_more_energy_for_more_work():
    gpu = torch.device("cuda")
    meter = open_meter(gpu)
    x = torch.randn(4096, 4096, device=gpu, dtype=torch.bfloat16)
    idle = idle_power(meter)
    once = energy_of(lambda: x @ x, meter, idle, torch.cuda.synchronize)
    four = energy_of(lambda: [x @ x for _ in range(4)], meter, idle, torch.cuda.synchronize)
    assert 0 < idle.watts < once.watts and once.updates >= 0.9 * energy.UPDATES
    assert four.joules == pytest.approx(4 * once.joules, rel=0.15)
