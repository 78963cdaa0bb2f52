"""Several processes of one run, as `accelerate launch` or `torchrun` starts them.

Training is shared by all. Everything else is done by the first process alone, which also writes and prints; the others
wait, and then take over its model and state. They meet over gloo, whatever carries the gradients: a wait may take
hours, which NCCL takes for a fault.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from sparsify.errors import ConfigError
from sparsify.runtime.launch import OtherProcessError, count, is_first, is_sharding, several

T = TypeVar("T")
PATIENCE = timedelta(days=7)
_meeting: Any = None


def join(device: str) -> str:
    """Meets the other processes, if there are any.

    Args:
        device: A recipe's `device`.

    Returns:
        The device of this process.

    Raises:
        ConfigError: If the launch does not fit: FSDP1, weights from the first process alone, too few GPUs for the
            processes, or a GPU by number.
    """
    global _meeting
    if not several():
        return device
    if is_sharding() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP 1 is not supported: set fsdp_version: 2 in the launch's configuration (sparsify recipe show "
            "accelerate/fsdp2)"
        )
    if is_sharding() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("true", "1"):
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading shards buffers too, which cannot be done to the indices of packed blocks: "
            "set it to false in the launch's configuration; every process has loaded the model already"
        )
    from accelerate import PartialState

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cuda", "cpu"):
        raise ConfigError(
            f"device {device} is one device, but {count()} processes were launched: leave `device` out, or take cpu"
        )
    cpu = device == "cpu" or not torch.cuda.is_available()
    if not cpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"{local + 1} processes were launched on this machine, which has {torch.cuda.device_count()} GPUs: lower "
            f"num_processes of the launch"
        )
    PartialState(cpu=cpu)
    if _meeting is None:
        _meeting = distributed.new_group(backend="gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return "cpu" if cpu else f"cuda:{local}"


def _leave() -> None:
    """Parts from the other processes; torch complains about a process that ends without that."""
    with suppress(Exception):
        distributed.destroy_process_group()


def from_first(value: T) -> T:
    """The first process's value, on all of them."""
    if not several():
        return value
    found = [value]
    distributed.broadcast_object_list(found, 0, group=_meeting)
    return found[0]


def meet() -> None:
    """Waits until all processes are here."""
    if several():
        distributed.barrier(group=_meeting)


def first_alone(work: Callable[[], T]) -> T | None:
    """Lets the first process work while the others wait for it.

    Returns:
        What the work returned, on the first process; `None` on the others.

    Raises:
        OtherProcessError: On the others, if it failed there.
    """
    if not several():
        return work()
    if not is_first():
        if not from_first(True):
            raise OtherProcessError("the first process has failed")
        return None
    try:
        done = work()
    except Exception:
        from_first(False)
        raise
    from_first(True)
    return done


def decided(work: Callable[[], T]) -> T:
    """What the first process comes to, on all of them.

    Raises:
        OtherProcessError: On the others, if it failed there.
    """
    return from_first(first_alone(work))  # pyright: ignore[reportReturnType]


@torch.no_grad()
def share_model(model: nn.Module) -> None:
    """Gives all processes the weights and buffers of the first one's model, which is built alike."""
    if several():
        for tensor in model.state_dict(keep_vars=True).values():
            group = _meeting if tensor.device.type == "cpu" else None  # NCCL knows GPUs alone
            distributed.broadcast(tensor.data, 0, group=group)
