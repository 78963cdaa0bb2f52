"""A model's block-sparse layers, each distinct one timed against a dense layer of the same shape.

Inputs are as large as those that the layer has in the model's forward pass, or of a number of tokens. Convolutions see
channels-last images, the dense one too, with cuDNN free to try its algorithms; their tokens are output pixels, for a
mere number in images of 14 x 14. Recurrent layers then see sequences of 16 time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparsify.bench import agreement
from sparsify.bench.limits import Limits, experts_per_token, flops_of, weight_bytes
from sparsify.bench.timing import cudnn_chooses, race
from sparsify.checkpoint.densify import dense_equivalent
from sparsify.layers import kinds
from sparsify.layers.convolution import BlockSparseConv, BlockSparseConv2d
from sparsify.layers.embedding import BlockSparseEmbedding
from sparsify.layers.experts import BlockSparseExperts
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.packed import PackedModule
from sparsify.layers.recurrent import BlockSparseRecurrent
from sparsify.layers.swap import sparse_modules

# Layers whose densities differ by less than this are measured once.
DENSITY_STEP = 0.02
# On a GPU a graph holds calls of this many copies of a layer: what starting the graph costs is shared by them, and
# each reads its own weights, cold.
COPIES = 8
# Side of a convolution's output images.
IMAGE = 14
# Time steps of a recurrent layer's sequences.
STEPS = 16
# Two products and an activation follow each other in an expert, and more in a recurrent layer.
CHAIN_BUDGET = 4


@dataclass(frozen=True)
class Group:
    """Layers that differ in nothing that matters for speed.

    Attributes:
        names: Their names in the model.
        name: The one of median density, which is measured.
        module: That one.
        kind: `linear`, `conv1d`, `experts`, `convolution`, or a recurrent layer's, such as `lstm`.
        density: Its density, 0 to 1.
    """

    names: list[str]
    name: str
    module: PackedModule
    kind: str
    density: float

    def describe(self) -> dict[str, Any]:
        """Shape, block, density and bytes of one layer of the group, as JSON values."""
        module, packed = self.module, list(self.module.packed.values())
        values = [module.get_parameter(weight.name) for weight in packed]
        elements = [weight.count * math.prod(weight.full_shape) for weight in packed]
        indices = sum(
            buffer.nbytes for buffer in module.buffers(recurse=False) if buffer.dtype == torch.int32
        )
        experts = self.kind == "experts"
        return {
            "name": self.name,
            "names": self.names,
            "kind": self.kind,
            "shapes": [[w.count, *w.shape] if experts else list(w.full_shape) for w in packed],
            "block": str(packed[0].block),
            "density": self.density,
            "dtype": str(values[0].dtype).removeprefix("torch."),
            "bytes": sum(value.nbytes for value in values) + indices,
            "bytes_dense": sum(n * value.element_size() for n, value in zip(elements, values, strict=True)),
        }


def groups(model: nn.Module) -> list[Group]:
    """The distinct block-sparse layers of a model: by kind, shape, block shape, dtype, bias and rounded density."""
    found: dict[Any, list[tuple[float, str, PackedModule]]] = {}
    for name, module in sparse_modules(model).items():
        if isinstance(module, BlockSparseEmbedding):
            continue  # a lookup multiplies nothing
        weights = tuple((p.count, p.shape, p.block) for p in module.packed.values())
        geometry = getattr(module, "geometry", None)
        dtypes = tuple((key, value.dtype) for key, value in module.named_parameters(recurse=False))
        density = _density(module)
        key = (_kind(module), weights, geometry, dtypes, round(density / DENSITY_STEP))
        found.setdefault(key, []).append((density, name, module))
    result = []
    for (kind, *_), members in found.items():
        density, name, module = sorted(members, key=lambda member: member[0])[len(members) // 2]
        result.append(Group([member[1] for member in members], name, module, kind, density))
    return result


@torch.no_grad()
def shapes_seen(found: Sequence[Group], call: Callable[[], object]) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' first inputs in a forward pass.

    Args:
        found: The groups.
        call: The forward pass of their model.

    Returns:
        A shape for each layer that is measured, by its name; none for one that the pass does not reach.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def see(group: Group, values: tuple[Any, ...]) -> None:
        if group.name in shapes or not values:
            return
        x = values[0]
        if isinstance(x, PackedSequence):
            shape = len(x.batch_sizes), int(x.batch_sizes[0])
            first = getattr(group.module, "batch_first", False)
            shapes[group.name] = (*(shape[::-1] if first else shape), x.data.shape[1])
        elif isinstance(x, Tensor):
            shapes[group.name] = tuple(x.shape)

    handles = []
    for group in found:
        hook = partial(_hook, partial(see, group))
        handles.append(group.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _hook(see: Callable[[tuple[Any, ...]], None], module: nn.Module, args: Any, kwargs: Any) -> None:
    see((*args, *kwargs.values()))


def measure_group(
    group: Group,
    skeleton: nn.Module,
    tokens: Sequence[int],
    repeats: int,
    advance: Callable[[], None],
    limits: Limits,
    samples: Mapping[int, tuple[int, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Times one group's layer against a dense one with random weights.

    Args:
        group: The group.
        skeleton: The dense model on the meta device.
        tokens: Token counts.
        repeats: Rounds of each race.
        advance: Called after each size.
        limits: Of the machine.
        samples: Shapes of the layer's input in the model's forward pass, by the number of samples.

    Returns:
        For each size `tokens`, `samples` (`None` for a mere number of tokens), `dense_us`, `sparse_us`, `speedup`,
        `dense_limit_us`, `sparse_limit_us` (what the machine's limits allow), `dense_share`, `sparse_share` (how much
        of that speed is reached), `error` (relative, against higher precision), `timing` and `rounds`.

    Raises:
        SparsifyError: If the layer's output is wrong.
    """
    sparse = group.module
    device = next(sparse.parameters()).device
    sizes: list[tuple[dict[str, int | None], tuple[Tensor, ...]]] = []
    for count in sorted(set(tokens)):
        sizes.append(({"tokens": count, "samples": None}, _inputs(sparse, skeleton, count)))
    for count, shape in (samples or {}).items():
        inputs = _inputs(sparse, skeleton, 0, shape)
        sizes.append(({"tokens": _tokens(sparse, inputs), "samples": count}, inputs))
    exact = _exact_layer(sparse, skeleton.get_submodule(group.name))
    errors = [_check(group, exact, inputs) for _, inputs in sizes]
    del exact
    dense = dense_equivalent(sparse, skeleton.get_submodule(group.name))
    for name, packed in sparse.packed.items():
        # Zeros would draw less power on a GPU, and flatter the dense layer.
        nn.init.normal_(dense.get_parameter(name), std=1 / math.sqrt(packed.shape[1]))
    if isinstance(sparse, BlockSparseConv2d):
        weight = dense.get_parameter("weight")
        weight.data = weight.data.to(memory_format=torch.channels_last)
    copies = _copies(dense, device)
    contestants = {
        "dense": [dense, *(deepcopy(dense) for _ in range(copies - 1))],
        "sparse": [sparse, *(deepcopy(sparse) for _ in range(copies - 1))],
    }
    rows = []
    for (size, inputs), error in zip(sizes, errors, strict=True):
        calls = {name: _each(layers, inputs) for name, layers in contestants.items()}
        with cudnn_chooses(isinstance(sparse, BlockSparseConv)):
            times = race(calls, device, repeats)
        row: dict[str, Any] = dict(size)
        for name, layers in contestants.items():
            row[f"{name}_us"] = times.seconds[name] / copies * 1e6
            row[f"{name}_limit_us"] = _limit(layers[0], skeleton, inputs, limits) * 1e6
            row[f"{name}_share"] = row[f"{name}_limit_us"] / row[f"{name}_us"]
        row["speedup"] = times.seconds["dense"] / times.seconds["sparse"]
        rows.append(row | {"error": error, "timing": times.timing, "rounds": times.rounds})
        advance()
    return rows


def _each(layers: Sequence[nn.Module], inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def call() -> None:
        for layer in layers:
            layer(*inputs)

    return call


def _copies(dense: nn.Module, device: torch.device) -> int:
    """How many copies of a layer a graph calls: fewer where a quarter of the free memory does not hold them."""
    if device.type != "cuda":
        return 1
    size = sum(parameter.nbytes for parameter in dense.parameters())
    return max(1, min(COPIES, torch.cuda.mem_get_info(device)[0] // 4 // max(1, 2 * size)))


@torch.no_grad()
def _tokens(sparse: PackedModule, inputs: tuple[Tensor, ...]) -> int:
    """Rows of the product: of a convolution output pixels."""
    if isinstance(sparse, BlockSparseConv):
        return _output(sparse(*inputs)).numel() // sparse.out_channels
    return inputs[0].numel() // inputs[0].shape[-1]


def _inputs(
    sparse: PackedModule, skeleton: nn.Module, tokens: int, shape: tuple[int, ...] | None = None
) -> tuple[Tensor, ...]:
    """Random activations of so many tokens or of a shape; for experts also a routing that loads all of them alike."""
    parameter = next(sparse.parameters())
    place: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    first = next(iter(sparse.packed.values()))
    if isinstance(sparse, BlockSparseConv):
        return (_images(sparse, tokens, place) if shape is None else _image(shape, sparse, place),)
    if isinstance(sparse, BlockSparseRecurrent) and shape is None:
        return (_sequences(sparse, tokens, place),)
    hidden = torch.randn((tokens, first.shape[1]) if shape is None else shape, **place)
    if not isinstance(sparse, BlockSparseExperts):
        return (hidden,)
    tokens = len(hidden)
    chosen = min(experts_per_token(skeleton) or 1, sparse.num_experts)
    slots = torch.arange(tokens * chosen, device=parameter.device).view(tokens, chosen)
    return hidden, slots % sparse.num_experts, torch.full((tokens, chosen), 1 / chosen, **place)


def _images(sparse: BlockSparseConv, pixels: int, place: dict[str, Any]) -> Tensor:
    """Channels-last images with so many output pixels, or some more."""
    side = min(IMAGE, math.ceil(pixels ** (1 / sparse.dimensions)))
    windows = zip(sparse.kernel_size, sparse.stride, sparse.dilation, strict=True)
    # Large enough for the kernel whatever the padding is.
    sizes = [max(stride * side, dilation * (kernel - 1) + 1) for kernel, stride, dilation in windows]
    images = torch.randn(math.ceil(pixels / side**sparse.dimensions), *sizes, sparse.in_channels, **place)
    return images.movedim(-1, 1)


def _image(shape: tuple[int, ...], sparse: BlockSparseConv, place: dict[str, Any]) -> Tensor:
    """Channels-last images of a shape `(B, I, *size)`, or of one image without `B`."""
    channels = len(shape) - sparse.dimensions - 1
    return torch.randn(*shape[:channels], *shape[channels + 1 :], shape[channels], **place).movedim(
        -1, channels
    )


def _sequences(sparse: BlockSparseRecurrent, tokens: int, place: dict[str, Any]) -> Tensor:
    """Sequences of `STEPS` time steps, or fewer, with so many tokens together, or some more; for a cell its batch."""
    if sparse.kind.endswith("_cell"):
        return torch.randn(tokens, sparse.input_size, **place)
    steps = min(STEPS, tokens)
    sizes = (steps, math.ceil(tokens / steps))
    sizes = sizes[::-1] if getattr(sparse, "batch_first", False) else sizes
    return torch.randn(*sizes, sparse.input_size, **place)


def _output(result: Any) -> Tensor:
    """What a layer puts out; recurrent ones also return states."""
    return result if isinstance(result, Tensor) else result[0]


@torch.no_grad()
def _limit(layer: nn.Module, skeleton: nn.Module, inputs: tuple[Tensor, ...], limits: Limits) -> float:
    """The least seconds of a layer: its arithmetic, or its weights, inputs and outputs, once each."""
    outputs: list[Tensor] = []
    flops = flops_of(lambda: outputs.append(_output(layer(*inputs))))
    moved = weight_bytes(layer, len(inputs[0]), experts_per_token(skeleton))
    return limits.seconds(flops, moved + sum(tensor.nbytes for tensor in [*inputs, *outputs]))


def _exact_layer(sparse: PackedModule, dense: nn.Module) -> nn.Module:
    """The layer with its own weights and zeros, dense: in float64, experts in float32 at least.

    transformers' fused experts have no float64 kernel on every device.
    """
    exact = (BlockSparseLinear, BlockSparseConv, BlockSparseRecurrent)
    double = isinstance(sparse, exact) or next(sparse.parameters()).dtype == torch.float64
    # A copy: `.to` works in place, and the biases are the sparse layer's own.
    return deepcopy(dense_equivalent(sparse, dense)).to(torch.float64 if double else torch.float32)


def _check(group: Group, exact: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    sparse, hidden = group.module, inputs[0]
    budget = agreement.layer_budget(hidden.dtype, hidden.device)
    precision = next(exact.parameters()).dtype
    with torch.no_grad():
        given = (part.to(precision) if part.is_floating_point() else part for part in inputs)
        wanted = _output(exact(*given))
        # Its memory becomes the output's on a GPU: what a kernel forgets to write stays NaN.
        poison = torch.full_like(wanted, float("nan"), dtype=hidden.dtype)
        del poison
        actual = _output(sparse(*inputs))
        if isinstance(sparse, BlockSparseConv):
            wanted, actual = wanted.movedim(1, -1).flatten(0, -2), actual.movedim(1, -1).flatten(0, -2)
        if isinstance(sparse, (BlockSparseLinear, BlockSparseConv)):
            weight = sparse.dense_weight().to(precision).flatten(1)
            scale = weight.norm(dim=1) + (0 if sparse.bias is None else sparse.bias.to(precision).abs())
        else:
            scale, budget = wanted.square().mean().sqrt(), CHAIN_BUDGET * budget
    return agreement.check_layer(group.name, actual, wanted, scale, budget)


def _kind(module: PackedModule) -> str:
    return kinds.entry(module)["kind"]


def _density(module: PackedModule) -> float:
    masks = module.named_masks("").values()
    return sum(mask.elements_kept for mask in masks) / sum(math.prod(mask.shape) for mask in masks)
