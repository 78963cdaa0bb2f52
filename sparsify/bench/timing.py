"""Timing contestants against each other, in turns, so that a disturbance of the machine is spread over all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A race ends before its last round once it has lasted this long, but never before the fewest rounds.
MOST_SECONDS = 3.0
FEWEST_ROUNDS = 5
WARMUP = 2

Call = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Outcome of a race.

    Attributes:
        seconds: Median time of one call by contestant.
        timing: `graph` (replayed CUDA graphs: the GPU's time alone), `eager` (until the GPU is done, the host's time
            to issue the work included) or `cpu`.
        rounds: Timed calls of each contestant.
    """

    seconds: dict[str, float]
    timing: str
    rounds: int


@dataclass(frozen=True)
class LineUp:
    """Calls made ready to be timed, all in the same way.

    Attributes:
        calls: What is called: replays of CUDA graphs where all could be captured.
        timing: As in `Times`.
        device: Where they run.
    """

    calls: dict[str, Call]
    timing: str
    device: torch.device

    def race(self, repeats: int) -> Times:
        """Median time of each call; see `race`."""
        with torch.no_grad():
            if self.device.type != "cuda":
                return _rounds(self.calls, repeats, _on_host, self.timing)
            with torch.cuda.device(self.device):
                flush = torch.empty(_flush_bytes(self.device), dtype=torch.uint8, device=self.device)
                clock = _on_gpu if self.timing == "graph" else _until_done
                return _rounds(self.calls, repeats, lambda call: clock(call, flush), self.timing)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def line_up(calls: Mapping[str, Call], device: torch.device, *, graphs: bool = True) -> LineUp:
    """Makes calls ready: on a GPU as CUDA graphs, unless one of them cannot be captured.

    Args:
        calls: Contestants; what they work on is on `device`. They run without gradients.
        device: Where they run.
        graphs: Whether to try CUDA graphs.
    """
    if device.type != "cuda":
        return LineUp(dict(calls), "cpu", device)
    with torch.no_grad(), torch.cuda.device(device):
        replays = {name: _captured(call) for name, call in calls.items()} if graphs else {}
    ready = {name: replay for name, replay in replays.items() if replay is not None}
    if graphs and len(ready) == len(calls):
        return LineUp(ready, "graph", device)
    return LineUp(dict(calls), "eager", device)


def race(calls: Mapping[str, Call], device: torch.device, repeats: int, *, graphs: bool = True) -> Times:
    """Median time of each call.

    On a GPU the L2 cache is emptied before every call, and calls are replayed as CUDA graphs unless one of them cannot
    be captured: then all are timed eagerly, so that no contestant has an advantage.

    Args:
        calls: Contestants; what they work on is on `device`. They run without gradients.
        device: Where they run.
        repeats: Rounds, fewer (but at least five, or `repeats`) where they last longer than three seconds.
        graphs: Whether to try CUDA graphs.
    """
    return line_up(calls, device, graphs=graphs).race(repeats)


@contextmanager
def cudnn_chooses(wanted: bool = True) -> Iterator[None]:
    """Lets cuDNN choose its fastest algorithm by trying them, which it does when a convolution first sees a size."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _rounds(calls: Mapping[str, Call], repeats: int, clock: Callable[[Call], float], timing: str) -> Times:
    for call in calls.values():
        for _ in range(WARMUP):
            clock(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    while done < repeats and (done < FEWEST_ROUNDS or time.perf_counter() - begin < MOST_SECONDS):
        for name, call in calls.items():
            times[name].append(clock(call))
        done += 1
    return Times({name: statistics.median(own) for name, own in times.items()}, timing, done)


def _on_host(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _on_gpu(call: Call, flush: torch.Tensor) -> float:
    # Nothing waits between flush and call: the GPU is still busy with the flush while the host issues the call.
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _until_done(call: Call, flush: torch.Tensor) -> float:
    flush.zero_()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _captured(call: Call) -> Call | None:
    """The call as a CUDA graph; `None` if it cannot be captured, for instance because the host waits for a result."""
    call()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        # Found out before the capture: one that fails half-way leaves the allocator less tidy.
        _run_without_waiting(call)
        with torch.cuda.graph(graph):
            call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.set_stream(stream)  # a failed capture stays on its own
        return None
    return graph.replay


def _run_without_waiting(call: Call) -> None:
    """Runs a call; a RuntimeError if it makes the host wait for the GPU."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _flush_bytes(device: torch.device) -> int:
    """Bytes to write so that nothing else is left in the L2 cache, and so that the host has time to issue a call."""
    return max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
