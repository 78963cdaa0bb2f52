"""A walk through a model, one transformer block at a time, with calibration data.

The model's repeated blocks (the members of its outermost `nn.ModuleList`s) are taken in the order in which they run. Of
all activations only the inputs of the block in hand are kept. When the walk goes on, the block runs with the weights it
has by then, and its outputs take the place of its inputs: they are the inputs of the next block. The other arguments
of a block (masks, positions) are recorded when the model runs once at the start.

Where a block's input is not the output of the block before it (a second tower, a decoder behind its encoder, a block
that also reads what an earlier one computed), the model runs again up to there. What is outside the blocks, or in a
block that one forward pass uses twice, comes last, with the whole model in the role of the block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparsify.calibration.statistics import padding_masks, showing, valid_tokens
from sparsify.errors import PrunerError
from sparsify.pruner import PrunableLayer, Pruner

Batch: TypeAlias = dict[str, Any]


@dataclass
class _Call:
    """Arguments of one call of a block, and the batch's padding masks."""

    args: list[Any]
    kwargs: dict[str, Any]
    masks: list[Tensor]


@dataclass
class _Place:
    """A block's place in the walk.

    Attributes:
        name: Name of its module; empty for the whole model.
        layers: The layers to prune in it.
        slot: Which argument is the output of the block before it; `None` where there is no such argument.
    """

    name: str
    layers: list[PrunableLayer]
    slot: int | str | None = None


class Walk:
    """A way through a model that can be gone several times; a context manager that leaves the model's mode as it was.

    Args:
        model: The model; run in evaluation mode and without its cache of keys and values.
        layers: The layers of interest; blocks without any are only run.
        batches: Keyword arguments of the model's forward pass.
        device: Where to compute, and where a model that is elsewhere is brought block by block.

    Attributes:
        compares: Whether a second stream of activations goes along: those of the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunableLayer],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
    ) -> None:
        self.compares = False
        self.model, self.layers, self.batches = model, list(layers), batches
        home = next(model.parameters()).device
        self.device = torch.device(home if device is None else device)
        self.streams = self.device.type != home.type
        self._home, self._stack = home, ExitStack()
        self._held = ""
        self._places: list[_Place] = []

    def __enter__(self) -> Walk:
        self._stack.callback(self.model.train, self.model.training)
        self.model.eval()
        # A model that fills a cache of keys and values would find it full when a block runs again.
        for config in {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None))}.values():
            if getattr(config, "use_cache", None):
                self._stack.callback(setattr, config, "use_cache", config.use_cache)
                config.use_cache = False
        try:
            blocks = _blocks(self.model, self.layers)
            if self.streams:
                self._stream(blocks)
            self._places = self._discover(blocks)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """Names of the blocks in the order of the walk; the whole model's is empty."""
        return [place.name for place in self._places]

    def __iter__(self) -> Iterator[Block]:
        start = 0
        while start < len(self._places):
            end = start + 1
            while end < len(self._places) and self._places[end].slot is not None:
                end += 1
            chain = self._places[start:end]
            recorded = self._record([place.name for place in chain])
            outputs: list[Tensor] = []
            dense_outputs: list[Tensor] = []
            for place, calls in zip(chain, recorded, strict=True):
                dense_calls = [_Call(list(c.args), dict(c.kwargs), c.masks) for c in calls if self.compares]
                _feed(calls, place.slot, outputs)
                _feed(dense_calls, place.slot, dense_outputs)
                block = Block(place.name, self.model.get_submodule(place.name), place.layers, calls, self)
                del outputs, calls, dense_outputs
                self._hold(place.name)
                if self.compares and place.name:
                    block.keep_dense(dense_calls)
                del dense_calls
                yield block
                self._hold("")
                outputs, dense_outputs = block.outputs, block.dense_outputs
                block.calls, block.outputs, block.dense_calls, block.dense_outputs = [], [], [], []
            start = end

    def _discover(self, blocks: dict[str, list[PrunableLayer]]) -> list[_Place]:
        """The blocks in the order in which the first batch reaches them, and how they hang together."""
        order: list[str] = []
        slots: dict[str, int | str | None] = {}
        made: list[weakref.ref[Tensor]] = []
        last: list[weakref.ref[Tensor]] = []

        def before(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                order.append(name)
                given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
                previous = last[0]() if last else None
                slot = next((k for k, v in given.items() if v is previous and v is not None), None)
                earlier = [made_by() for made_by in made]
                known = [tensor for tensor in earlier if tensor is not None and tensor is not previous]
                reads_more = any(v is tensor for v in given.values() for tensor in known)
                slots[name] = None if reads_more else slot

            return hook

        def after(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [
                t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)
            ]
            last[:] = [weakref.ref(tensor) for tensor in tensors[:1]]
            made.extend(weakref.ref(tensor) for tensor in tensors)

        with ExitStack() as hooks:
            for name in blocks:
                module = self.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after).remove)
            self.model(**self._moved(self.batches[0]))
        once = [name for name in order if order.count(name) == 1]
        places = [_Place(name, blocks[name], slots[name]) for name in once]
        if any(order.count(name) != 1 for name in blocks):
            # A block between two others may be one of those; then they do not follow one another.
            for place in places:
                place.slot = None
        inside = {layer.name for place in places for layer in place.layers}
        outside = [layer for layer in self.layers if layer.name not in inside]
        while places and not places[-1].layers:
            places.pop()
        return [*places, _Place("", outside)] if outside else places

    def _record(self, names: list[str]) -> list[list[_Call]]:
        """Arguments of each block for each batch; inputs of the first one, without those that the walk brings."""
        masks = [padding_masks(self._moved(batch)) for batch in self.batches]
        if names == [""]:
            return [[_Call([], dict(batch), mask) for batch, mask in zip(self.batches, masks, strict=True)]]
        slots = {place.name: place.slot for place in self._places}
        calls: list[list[_Call]] = [[] for _ in names]
        for index, (batch, mask) in enumerate(zip(self.batches, masks, strict=True)):
            kept: dict[int, tuple[Any, Any]] = {}  # blocks share masks and positions: each is stored once
            with ExitStack() as hooks:
                for at, name in enumerate(names):
                    slot = slots[name] if at else None
                    note = _recorder(calls[at], mask, slot, kept, self.store, at == len(names) - 1)
                    module = self.model.get_submodule(name)
                    hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
                with suppress(_Enough):
                    self.model(**self._moved(batch))
            for name, own in zip(names, calls, strict=True):
                if len(own) != index + 1:
                    raise PrunerError(
                        f"block {name} ran {len(own) - index} times in calibration batch {index}, and once in the "
                        f"first: a model that chooses its blocks by the data cannot be walked through; leave the block "
                        f"out with ignore, or give data that takes one way"
                    )
        return calls

    @property
    def store(self) -> torch.device:
        """Where activations wait."""
        return torch.device("cpu") if self.streams else self.device

    def _moved(self, batch: Batch) -> Batch:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _stream(self, blocks: dict[str, list[PrunableLayer]]) -> None:
        """Brings what is outside the blocks to the device at once, and each block whenever it runs."""
        inner = tuple(f"{name}." for name in blocks)
        outside = [m for name, m in self.model.named_modules() if not f"{name}.".startswith(inner or ("\0",))]
        for module in outside:
            _move(module, self.device)
            self._stack.callback(_move, module, self._home)
        for name in blocks:
            module = self.model.get_submodule(name)

            def enter(module: nn.Module, args: Any, name: str = name) -> None:
                if name != self._held:
                    module.to(self.device)

            def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if name != self._held:
                    module.to(self._home)

            self._stack.callback(module.to, self._home)
            self._stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            self._stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _hold(self, name: str) -> None:
        """Keeps block `name` on the device until another one is held."""
        if self.streams:
            if self._held:
                self.model.get_submodule(self._held).to(self._home)
            if name:
                self.model.get_submodule(name).to(self.device)
        self._held = name


@dataclass
class Block:
    """The block in hand.

    Attributes:
        name: Name of its module; empty for the whole model.
        module: The module.
        layers: The layers of interest in it.
        calls: Its inputs, one call for each batch.
        walk: The walk.
        outputs: Its outputs once it has been run for the last time.
        dense_calls: Its inputs in the dense model, where the walk compares.
        dense_outputs: Its outputs there.
        dense_weights: Its parameters there.
    """

    name: str
    module: nn.Module
    layers: list[PrunableLayer]
    calls: list[_Call]
    walk: Walk
    outputs: list[Tensor] = field(default_factory=list)
    dense_calls: list[_Call] = field(default_factory=list)
    dense_outputs: list[Tensor] = field(default_factory=list)
    dense_weights: dict[str, Tensor] = field(default_factory=dict)

    def keep_dense(self, calls: list[_Call]) -> None:
        """Keeps what the block is before it is pruned, and its inputs in the dense model."""
        self.dense_calls = calls
        self.dense_weights = {n: p.detach().clone() for n, p in self.module.named_parameters()}

    def groups(self) -> list[list[PrunableLayer]]:
        """Its layers in the order in which they run; those that are called with the same tensor together.

        Raises:
            PrunerError: If the first batch does not reach a layer.
        """
        modules: dict[str, list[PrunableLayer]] = {}
        for layer in self.layers:
            modules.setdefault(layer.module_name, []).append(layer)
        groups: list[list[PrunableLayer]] = []
        seen: dict[str, None] = {}
        last: list[Any] = [None]

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = [*args, *kwargs.values()][0]
                if name in seen:
                    return
                seen[name] = None
                # The projections of experts come one after the other, each with the inputs that the last one left.
                parameters = {id(layer.parameter): None for layer in modules[name]}
                parts = [[x for x in modules[name] if id(x.parameter) == key] for key in parameters]
                if groups and given is last[0]:
                    groups[-1].extend(parts.pop(0))
                groups.extend(parts)
                last[0] = given

            return hook

        with ExitStack() as hooks:
            for name in modules:
                module = self.walk.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(note(name), with_kwargs=True).remove)
            for call in self.calls:
                self._run(call)
                if len(seen) == len(modules):
                    break
        missed = [name for name in modules if name not in seen]
        if missed:
            raise PrunerError(f"layer {missed[0]} saw no calibration input: give data that reaches it")
        return groups

    def show(self, pruner: Pruner, layers: Sequence[PrunableLayer]) -> None:
        """Runs the block and calls `pruner.calibrate` with the inputs of `layers`.

        If the pruner `compares`, and the walk does, layers also get the statistic `cross`.
        """
        self._pass(pruner, layers, keep=False)

    def output(self, index: int, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the block puts out for batch `index`, with its own parameters or with `weights` in their place."""
        return self._run(self.calls[index], weights)

    def dense_output(self, index: int) -> Tensor:
        """What the block puts out for batch `index` in the dense model."""
        return self._run(self.dense_calls[index], self.dense_weights).to(self.walk.store)

    def valid(self, index: int, output: Tensor) -> Tensor:
        """Which tokens of an output `(..., K)` of batch `index` are no padding, bool in the shape of `...`."""
        found = valid_tokens(output, self.calls[index].masks)
        return output.new_ones(output.shape[:-1], dtype=torch.bool) if found is None else found

    def advance(self, pruner: Pruner | None = None) -> None:
        """Runs the block for the last time, so that its outputs take the place of its inputs.

        Args:
            pruner: Is shown the inputs of all layers at the same time.
        """
        self._pass(pruner, self.layers, keep=True)

    def _pass(self, pruner: Pruner | None, layers: Sequence[PrunableLayer], keep: bool) -> None:
        whole = not self.name
        if whole and pruner is None:
            return
        outputs: list[Tensor] = []
        dense_outputs: list[Tensor] = []
        with ExitStack() as stack:
            masks: list[Tensor] = []
            both = pruner is not None and pruner.compares and bool(self.dense_calls)
            shown = _Both(pruner) if both and pruner is not None else pruner
            if pruner is not None and shown is not None and layers:
                share = type(pruner).calibrate is Pruner.calibrate
                masks = stack.enter_context(showing(self.walk.model, layers, shown, share))
            for index, call in enumerate(self.calls):
                masks[:] = call.masks
                if self.dense_calls and (keep or both):
                    with shown.looking_at_dense() if isinstance(shown, _Both) else nullcontext():
                        output = self._run(self.dense_calls[index], self.dense_weights)
                    if keep:
                        dense_outputs.append(output.to(self.walk.store))
                        self.dense_calls[index] = _Call([], {}, [])
                output = self._run(call)
                if keep and not whole:
                    outputs.append(output.to(self.walk.store))
                    self.calls[index] = _Call([], {}, [])  # its memory is free for the next output
        if keep:
            self.outputs, self.dense_outputs = outputs, dense_outputs

    def _run(self, call: _Call, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(self.walk.device)
            return type(value)(map(moved, value)) if type(value) in (tuple, list) else value

        args, kwargs = tuple(map(moved, call.args)), {k: moved(v) for k, v in call.kwargs.items()}
        if weights is None:
            output = self.module(*args, **kwargs)
        else:
            output = torch.func.functional_call(self.module, dict(weights), args, kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Both(Pruner):
    """Shows a pruner each layer's inputs, and adds the statistic `cross` of them and those in the dense model."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner, self.dense = pruner, False
        self.seen: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}

    @contextmanager
    def looking_at_dense(self) -> Iterator[None]:
        """While it is open, what comes in is of the dense model, and is only remembered."""
        self.dense = True
        try:
            yield
        finally:
            self.dense = False

    def score(self, layer: PrunableLayer) -> Tensor:
        return self.pruner.score(layer)

    def calibrate(self, layer: PrunableLayer, inputs: Tensor) -> None:
        if self.dense:
            self.seen.setdefault(layer.name, []).append(inputs)
            return
        dense = self.seen[layer.name].pop(0)
        self.tokens[layer.name] = seen = self.tokens.get(layer.name, 0) + len(inputs)
        self.pruner.calibrate(layer, inputs)
        # Experts see other tokens in one model than in the other.
        if layer.index is None:
            size = inputs.shape[1]
            cross = layer.statistics.setdefault("cross", inputs.new_zeros(size, size, dtype=torch.float32))
            total = dense.float().t() @ inputs.float()
            cross.add_((total - len(inputs) * cross) / max(1, seen))


def _feed(calls: list[_Call], slot: int | str | None, outputs: list[Tensor]) -> None:
    """Puts the outputs of the block before into the calls."""
    for call, output in zip(calls, outputs, strict=False):
        if isinstance(slot, int):
            call.args[slot] = output
        elif slot is not None:
            call.kwargs[slot] = output


def _recorder(
    calls: list[_Call],
    masks: list[Tensor],
    slot: int | str | None,
    kept: dict[int, tuple[Any, Any]],
    store: torch.device,
    last: bool,
) -> Callable[..., None]:
    """A hook that records a block's call, without the argument `slot`; after the last block it ends the pass."""

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)(map(keep, value)) if type(value) in (tuple, list) else value
        return kept.setdefault(id(value), (value, value.to(store)))[1]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [None if slot == i else keep(arg) for i, arg in enumerate(args)]
        named = {key: None if slot == key else keep(arg) for key, arg in kwargs.items()}
        calls.append(_Call(given, named, masks))
        if last:
            raise _Enough

    return hook


class _Enough(Exception):
    """Ends a forward pass from which nothing more is wanted."""


def _blocks(model: nn.Module, layers: Sequence[PrunableLayer]) -> dict[str, list[PrunableLayer]]:
    """The layers in each member of the outermost module lists that hold any, by the member's name."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    holding = [n for n in outer if any(layer.module_name.startswith(f"{n}.") for layer in layers)]
    blocks: dict[str, list[PrunableLayer]] = {
        f"{name}.{child}": [] for name in holding for child, _ in model.get_submodule(name).named_children()
    }
    for layer in layers:
        home = next((n for n in blocks if f"{layer.module_name}.".startswith(f"{n}.")), None)
        # A list of bare layers is no list of blocks.
        if home is not None:
            blocks[home].append(layer)
    return blocks


def _move(module: nn.Module, device: torch.device) -> None:
    """Moves a module's own parameters and buffers, not those of the modules inside it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)
