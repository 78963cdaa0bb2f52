"""Launching Triton kernels with little time on the host, on the GPU that holds their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources

from sparsify.kernels.triton_common import INTERPRET

# Compiled kernels by all that Triton specialises on. Its own launch path works this out anew for every call, which
# takes twice as long as the rest of the launch (33 against 13 microseconds, H200 host).
_compiled: dict[tuple[Any, ...], Any] = {}


def _trait(argument: Any) -> Any:
    """What the compiled code may depend on, of one run-time argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if argument is None:
        return None
    return argument.base.dtype, *argument.block_shape  # a TMA descriptor


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    device: torch.device,
    **options: int,
) -> Any:
    """Runs `kernel[grid](*arguments, *constants, **options)` and returns the compiled kernel.

    Args:
        kernel: A `triton.jit` or `gluon.jit` function whose compile-time parameters come last.
        grid: Programs in each dimension, all three.
        arguments: Run-time arguments: tensors, integers, TMA descriptors or `None`.
        constants: Compile-time arguments, hashable.
        device: GPU that holds the tensors; need not be the current one.
        **options: `num_warps`, `num_stages` (fewer where they do not fit shared memory) and others of Triton's.
    """
    if INTERPRET:
        return kernel[grid](*arguments, *constants, **options)
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, device, **options)
    key = (kernel, device.index, constants, *options.values(), *[_trait(argument) for argument in arguments])
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = _first(kernel[grid], (*arguments, *constants), options)
    else:
        compiled[grid](*arguments, *constants)
    return compiled


def _first(run: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, int]) -> Any:
    """Compiles and runs a kernel with as many pipeline stages, up to those asked for, as shared memory holds.

    How much a stage takes is the compiler's affair, and GPUs have from 99 to 227 KB a multiprocessor.
    """
    while True:
        try:
            return run(*arguments, **options)
        except OutOfResources as error:
            if error.name != "shared memory" or options.get("num_stages", 1) <= 1:
                raise
            options = options | {"num_stages": options["num_stages"] - 1}


# Descriptors of one operand that are kept: an allocator hands out few addresses.
MOST_BOXES = 64


class Relaunch:
    """A kernel that is launched again and again with operands of the same shapes, strides, dtypes and alignment.

    The first launch goes through Triton. Later ones call its C entry directly and reuse TMA descriptors by address,
    which takes a third of the time; where this Triton's entry is not one that is known, they take the ordinary way.

    Args:
        kernel: See `launch`.
        grid: Programs in each dimension.
        constants: Compile-time arguments.
        device: GPU that holds the operands.
        **options: See `launch`.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        constants: tuple[Any, ...],
        device: torch.device,
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.constants, self.device, self.options = (
            kernel,
            grid,
            constants,
            device,
            options,
        )
        self._entry: Callable[..., None] | None = None
        self._bound: tuple[Any, ...] = ()
        self._described: list[Any] = []
        self._boxes: list[dict[int, tuple[Any, ...]]] = []

    def __call__(
        self, arguments: tuple[Any, ...], boxes: tuple[tuple[Any, Tensor], ...], early: bool = False
    ) -> None:
        """Launches the kernel.

        Args:
            arguments: Tensors and integers, those that follow the descriptors of the kernel's parameters.
            boxes: The descriptors that come first: for each a function that makes it, and its matrix.
            early: Whether the kernel may start before the one in front of it on the stream is over (programmatic
                dependent launch); it waits for that one itself. Taken up by direct launches only.
        """
        if self._entry is None or self.device.index != torch.cuda.current_device() or _hooked():
            made = tuple(make(matrix) for make, matrix in boxes)
            compiled = launch(
                self.kernel, self.grid, made + arguments, self.constants, self.device, **self.options
            )
            if self._entry is None:
                self._prepare(compiled)
            return
        flat: list[Any] = []
        for (make, matrix), known, meta in zip(boxes, self._boxes, self._described, strict=True):
            at = matrix.data_ptr()
            box = known.get(at)
            if box is None:
                if len(known) >= MOST_BOXES:
                    known.clear()
                box = known[at] = tuple(_describe(make(matrix), meta))
            flat += box
        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        function, cooperative, *rest = self._bound
        self._entry(
            *self.grid, stream, function, cooperative, early, *rest, *flat, *arguments, *self.constants
        )

    def _prepare(self, compiled: Any) -> None:
        run = getattr(compiled, "run", None)
        # Triton 3.6: a C function made for the kernel's signature, wrapped where that has descriptors.
        if run is None or hasattr(run, "arg_annotations") or not hasattr(run, "launch_pdl"):
            return
        entry = run.launch
        if getattr(entry, "__closure__", None):
            held = dict(zip(entry.__code__.co_freevars, entry.__closure__, strict=True))
            entry = held["launcher"].cell_contents if "launcher" in held else None
        if entry is None or run.global_scratch_size or run.profile_scratch_size:
            return
        self._described = list(compiled.metadata.tensordesc_meta or ())
        self._boxes = [{} for _ in self._described]
        self._bound = (
            compiled.function, run.launch_cooperative_grid, None, None, compiled.packed_metadata, None, None, None
        )  # fmt: skip
        self._entry = entry


def _describe(descriptor: Any, meta: Any) -> list[Any]:
    from triton.backends.nvidia.driver import make_tensordesc_arg

    return make_tensordesc_arg(descriptor, meta)  # pyright: ignore[reportCallIssue]


def _hooked() -> bool:
    """Whether a profiler wants to see launches."""
    runtime: Any = knobs.runtime
    return bool(runtime.launch_enter_hook.calls)
