"""What a model costs: parameters, bytes on disk, peak memory of a forward pass, latency; and on which machine.

Quality is measured in `sparsify.quality`.
"""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import __version__
from sparsify.errors import ConfigError
from sparsify.kernels.tuning_files import cpu_name

Inputs = Mapping[str, Tensor]
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def parameter_count(model: nn.Module) -> int:
    """Number of stored parameters; a shared one counts once, and of a block-sparse layer only what it stores."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers occupy in memory; storage that several of them share counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages: dict[int, int] = {}
    for storage in (tensor.untyped_storage() for tensor in tensors):
        # In a mapped file an empty tensor has the address of the one after it.
        storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
    return sum(storages.values())


def bytes_on_disk(path: str | Path) -> int:
    """Bytes of the weight files in a checkpoint folder."""
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.suffix in WEIGHT_SUFFIXES)


def peak_memory_forward(model: nn.Module, inputs: Inputs) -> int:
    """Largest memory that one forward pass needs: parameters, buffers and the activations alive at the same time.

    The activations are counted by PyTorch's allocators, so that they are exact and other tenants of the process or
    of the GPU do not enter: on a GPU by the caching allocator's peak, on a CPU by the profiler's record of every
    allocation and release. Scratch memory that a math library takes behind the allocator is not seen.

    Args:
        model: Any module; runs in evaluation mode without gradients.
        inputs: Keyword arguments of its forward pass, on the model's device.

    Returns:
        Bytes.
    """
    with _evaluation(model):
        return peak_memory(model, lambda: model(**inputs))


def peak_memory(model: nn.Module, call: Callable[[], object]) -> int:
    """Largest memory that a call of a model needs, as `peak_memory_forward` counts it.

    Args:
        model: Whose parameters and buffers count.
        call: What is done with it; made twice, the first time unseen.

    Returns:
        Bytes.
    """
    device = _device(model)
    call()  # caches, workspaces and compiled kernels are not part of a forward pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        activations = torch.cuda.max_memory_allocated(device) - before
    else:
        activations = _peak_of_cpu_allocations(call)
    return model_bytes(model) + activations


def latency(model: nn.Module, inputs: Inputs, *, repeats: int = 20, warmup: int = 3) -> float:
    """Median wall-clock time of one forward pass, in seconds; see `compare_latency`."""
    return compare_latency({"model": model}, inputs, repeats=repeats, warmup=warmup)["model"]


def compare_latency(
    models: Mapping[str, nn.Module], inputs: Inputs, *, repeats: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Median wall-clock time of one forward pass of each model, measured in turns.

    Taking turns spreads a disturbance of the machine over all models. On a GPU the L2 cache is emptied before each
    pass, and the time lasts until the device is done.

    Args:
        models: Models by name, all on one device; run in evaluation mode without gradients.
        inputs: Keyword arguments of their forward passes, on that device.
        repeats: Timed passes of each model.
        warmup: Passes of each model before the first timed one.

    Returns:
        Seconds by name.

    Raises:
        ConfigError: If the models are on different devices or `repeats` is not positive.
    """
    devices = {_device(model) for model in models.values()}
    if len(devices) != 1 or repeats < 1:
        raise ConfigError(
            f"latency needs models on one device and a pass to time, got {devices} and {repeats}"
        )
    device = devices.pop()
    flush = _l2_flusher(device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(warmup + repeats):
        for name, model in models.items():
            with _evaluation(model):
                flush()
                start = time.perf_counter()
                model(**inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - start
            if step >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def token_inputs(model: nn.Module, tokens: int, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids for a latency or memory measurement.

    Args:
        model: A transformers model with `config.vocab_size`.
        tokens: Tokens in each sequence.
        batch: Sequences.
        seed: Seed of the ids; the same on every device.

    Returns:
        `input_ids` and `attention_mask`, each `(batch, tokens)` int64 on the model's device; for an encoder-decoder
        model also `decoder_input_ids`.

    Raises:
        ConfigError: If the model has no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ConfigError(
            f"{type(model).__name__} has no vocabulary: give its inputs instead of a token count"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator).to(_device(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def like_inputs(model: nn.Module, sample: Inputs, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for a latency or memory measurement, in the shape of a sample's.

    Args:
        model: Whose device and dtype they get.
        sample: Inputs of one sample, `(1, ...)`; integers, such as masks, are repeated as they are.
        batch: Samples.
        seed: Seed of the numbers; the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    inputs = {}
    for key, value in sample.items():
        shape = (batch, *value.shape[1:])
        if value.is_floating_point():
            inputs[key] = torch.randn(shape, generator=generator).to(_device(model), dtype)
        else:
            inputs[key] = value.expand(shape).to(_device(model))
    return inputs


def positions(model: nn.Module, inputs: Inputs) -> int:
    """Tokens that a transformers model makes of one sample: positions of its hidden states."""
    with _evaluation(model):
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    # Feature maps are (B, C, H, W).
    return states.shape[1] if states.dim() == 3 else states[0, 0].numel()


def environment() -> dict[str, Any]:
    """Machine, versions and command: what a reader needs to place or repeat a measurement."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = ("torch", "triton", "transformers")
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpus,
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"sparsify": __version__} | {package: _version(package) for package in packages},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _device(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _l2_flusher(device: torch.device):
    """A function that empties the GPU's L2 cache and waits; on a CPU it does nothing."""
    if device.type != "cuda":
        return lambda: None
    size = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(2 * size, 1 << 20), dtype=torch.uint8, device=device)

    def flush() -> None:
        buffer.zero_()
        torch.cuda.synchronize(device)

    return flush


def _peak_of_cpu_allocations(call: Callable[[], object]) -> int:
    """Largest sum of live bytes above the start, over all allocations and releases of a call."""
    # The profiler's library writes a line per start and stop to stderr unless told not to, before its first use.
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "99"
    profile = torch.autograd.profiler.profile(profile_memory=True)
    try:
        with profile:
            call()
    finally:
        if level is None:
            del os.environ["KINETO_LOG_LEVEL"]
    recorded: Any = profile.kineto_results
    events = [event for event in recorded.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
