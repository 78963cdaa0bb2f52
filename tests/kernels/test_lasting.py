"""Memory that outlives its call; what needs a GPU is in tests/gpu/test_compile_gpu.py."""

import threading

import pytest
import torch

from sparsify.errors import SparsifyError
from sparsify.kernels import lasting


class _Device:
    """Stands for a GPU; this process may have none."""

    type, index = "cuda", 0


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU whose memory is that of the CPU; the list says whether its stream is being recorded."""
    recording = [False]
    stream = type("Stream", (), {"synchronize": lambda self: None})()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: real(*args, **kwargs))
    for state in ("_own", "_spare"):
        monkeypatch.setattr(lasting, state, {})
    monkeypatch.setattr(lasting, "_kept", [])
    return recording


def test_it_is_made_in_another_thread_of_a_gpu_program(gpu):
    assert lasting.lasting(torch.device("cpu"), threading.current_thread) is threading.current_thread()
    assert lasting.lasting(_Device, threading.current_thread) is not threading.current_thread()


def test_faults_reach_the_caller(gpu):
    def fails():
        raise KeyError("from the thread")

    with pytest.raises(KeyError, match="from the thread"):
        lasting.lasting(_Device, fails)
    gpu[0] = True
    with pytest.raises(SparsifyError, match="run the model once"):
        lasting.lasting(_Device, fails)


def test_counters_are_shared_by_a_stream_and_grow(gpu):
    device = torch.device("cpu")
    first = lasting.counters(device, 10)
    assert first.numel() >= 10 and first.dtype == torch.int32 and not first.any()
    assert lasting.counters(device, first.numel()) is first
    grown = lasting.counters(device, first.numel() + 1)
    assert grown.numel() > first.numel() and any(kept is first for kept in lasting._kept)


def test_recorded_kernels_share_no_counters(gpu):
    own = lasting.counters(_Device, 10)
    gpu[0] = True
    taken = [lasting.counters(_Device, 10) for _ in range(3)] + [own]
    addresses = [range(t.data_ptr(), t.data_ptr() + 40) for t in taken]
    assert len({a for r in addresses for a in r}) == 4 * 40
    assert all(t.numel() >= 10 and t.data_ptr() % 16 == 0 for t in taken)
    kept = {t.untyped_storage().data_ptr() for t in lasting._kept}
    assert all(t.untyped_storage().data_ptr() in kept for t in taken)
    # Beyond what was set aside, the graph zeroes its own.
    assert lasting.counters(_Device, 2 * lasting.SPARE).untyped_storage().data_ptr() not in kept


def test_counters_set_aside_are_replenished_between_recordings(gpu):
    lasting.counters(_Device, 10)
    gpu[0] = True
    lasting.counters(_Device, lasting.SPARE - 4)
    gpu[0] = False
    lasting.counters(_Device, 10)
    gpu[0] = True
    kept = {t.untyped_storage().data_ptr() for t in lasting._kept}
    assert lasting.counters(_Device, 100).untyped_storage().data_ptr() in kept
