"""GPU memory that outlives the call that makes it: work lists, and the counters of kernels that finish in order.

While a CUDA graph is recorded, and while `torch.compile` warms one up, whatever a call allocates comes from the graph's
own pool and belongs to the graph: keeping it is an error there, or its contents are written anew with each replay. A
pool serves the thread that opened it, so lasting memory is made in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from sparsify.errors import SparsifyError

T = TypeVar("T")

# Counters that are set aside for graphs, in int32: a layer takes one for each 64 or 128 output features.
SPARE = 1 << 18


def lasting(device: torch.device, build: Callable[[], T]) -> T:
    """What `build` returns; the tensors that it makes may be kept, and are ready on every stream.

    Args:
        device: Where it makes them.
        build: Called in a thread of its own, after everything that the current stream was given before is done.

    Raises:
        SparsifyError: If the current stream is being recorded into a CUDA graph.
    """
    if device.type != "cuda":
        return build()
    if torch.cuda.is_current_stream_capturing():
        raise SparsifyError(
            "a block-sparse layer was recorded into a CUDA graph for a number of tokens it has not run with: "
            "run the model once with these inputs before recording"
        )
    torch.cuda.current_stream(device).synchronize()

    def run() -> T:
        with torch.cuda.device(device):
            made = build()
            torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(1) as worker:
        return worker.submit(run).result()


# Counters by device and stream: kernels on one stream run one after the other and leave them zero. All are kept alive,
# since a recorded graph may hold their address.
_own: dict[tuple[torch.device, int], Tensor] = {}
_kept: list[Tensor] = []
# What is left of the counters set aside for graphs, by device.
_spare: dict[torch.device, Tensor] = {}


def _zeros(device: torch.device, count: int) -> Tensor:
    zeros = lasting(device, lambda: torch.zeros(count, dtype=torch.int32, device=device))
    _kept.append(zeros)
    return zeros


def counters(device: torch.device, count: int) -> Tensor:
    """`(count,)` or more int32 zeros for a kernel that leaves zeros behind.

    Those of a recorded kernel are its own: graphs recorded on one stream may be replayed on several at once.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        count = -(-count // 4) * 4  # 16 bytes: compiled kernels depend on the alignment
        spare = _spare.get(device)
        if spare is None or spare.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)  # set to zero by each replay
        _spare[device] = spare[count:]
        return spare[:count]
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    own = _own.get((device, stream))
    if own is None or own.numel() < count:
        own = _own[device, stream] = _zeros(device, max(count, 1024))
    spare = _spare.get(device)
    if device.type == "cuda" and (spare is None or spare.numel() < SPARE // 2):
        _spare[device] = _zeros(device, SPARE)
    return own
