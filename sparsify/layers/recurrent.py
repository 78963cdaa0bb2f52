"""LSTM and GRU layers, and their cells, with block-sparse weights: drop-ins for those of `torch.nn`.

The weights keep torch's names and layout: `weight_ih_l0` `(4 H, I)` and `weight_hh_l0` `(4 H, P)` hold the gates one
after the other (three for a GRU), `weight_hr_l0` `(P, H)` is the projection, where there is one. Each of them is packed
or dense, whatever the masks say; a packed one has its indices beside it, `weight_hh_l0_crow_indices` and so on.

Of each layer and direction, the product with all time steps' inputs is one block-sparse product; see
`kernels.recurrence` for what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from sparsify.blocks import BlockMask, BlockShape
from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.kernels.recurrent.recurrence import Weight, forward, hidden_before, last_hidden, recurrence
from sparsify.kernels.storage import pack
from sparsify.layers.packed import PackedModule, PackedWeight

# Each kind's class in torch.
CLASSES: dict[str, type[nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
}
# What tells of a layer's sizes and options, as torch calls them.
_LAYER = (
    "input_size",
    "hidden_size",
    "proj_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
)
_CELL = ("input_size", "hidden_size", "bias")

# Told the name of a weight and the rows `(tokens, K)` that it is multiplied with.
Observer = Callable[[str, Tensor], None]


class BlockSparseRecurrent(PackedModule):
    """Base of the recurrent layers and cells. Not used alone.

    Attributes:
        kind: `lstm`, `gru`, `lstm_cell` or `gru_cell`.
        input_size: Input features, `I`.
        hidden_size: Hidden units, `H`.
    """

    kind: str
    input_size: int
    hidden_size: int
    bias: bool

    def __init__(self, dense: nn.Module, masks: Mapping[str, BlockMask] | None = None) -> None:
        """Takes over sizes, options, dense weights and biases, and packs the weights that have a mask.

        Args:
            dense: The layer of `torch.nn`.
            masks: Mask of each weight to pack, by its parameter's name.

        Raises:
            BlockShapeError: If a mask does not fit its weight.
        """
        super().__init__()
        cell = self.kind.endswith("_cell")
        for option in _CELL if cell else _LAYER:
            setattr(self, option, getattr(dense, option))
        self.gates = 4 if self.kind.startswith("lstm") else 3
        masks = masks or {}
        for name in dense._parameters:
            # By attribute: while a dense layer is masked, that is its effective weight.
            value = getattr(dense, name)
            if name in masks:
                self.pack_weight(name, value, masks[name])
            else:
                setattr(self, name, value)
        self.train(dense.training)

    def pack_weight(self, name: str, weight: Tensor, mask: BlockMask) -> None:
        """Packs the kept blocks of a weight `(N, K)` under its name.

        Raises:
            BlockShapeError: If the mask does not fit.
        """
        shape = (weight.shape[0], weight.shape[1])
        mask = BlockMask(mask.keep, shape, mask.block)
        values = pack(weight.detach(), mask)
        self.register_parameter(name, nn.Parameter(values, requires_grad=weight.requires_grad))
        self._register(PackedWeight(name, f"{name}_", 1, shape, mask.block, len(values)), [mask])

    def add_weight(
        self, name: str, shape: tuple[int, int], block: BlockShape, blocks: int, dtype: torch.dtype
    ) -> None:
        """Puts in place of a dense weight a packed one on the meta device, whose contents are loaded later."""
        empty = torch.empty(blocks, block.cols, block.rows, device="meta", dtype=dtype)
        self.register_parameter(name, nn.Parameter(empty))
        self._register(PackedWeight(name, f"{name}_", 1, shape, block, blocks), None)

    def named_masks(self, module_name: str) -> dict[str, BlockMask]:
        """The mask of each packed weight by the name that its dense `PrunableLayer` has."""
        return {f"{module_name}.{name}": self.mask_of(name) for name in self.packed}

    def flatten_parameters(self) -> None:
        """Nothing to do: there is no cuDNN here that wants the weights in one piece."""

    def to_dense(self) -> nn.Module:
        """The layer of `torch.nn` that this one stands for, zeros where no block is stored."""
        options = {name: getattr(self, name) for name in (_CELL if self.kind.endswith("_cell") else _LAYER)}
        if self.kind == "gru":
            del options["proj_size"]
        dense = CLASSES[self.kind](**options, device="meta")
        for name, parameter in self.named_parameters(recurse=False):
            tensor = self.dense_of(name) if name in self.packed else parameter.detach().clone()
            setattr(dense, name, nn.Parameter(tensor, parameter.requires_grad))
        return dense.train(self.training)

    def _weight(self, name: str) -> Weight:
        return Weight(getattr(self, name), self.topology(name) if name in self.packed else None)

    def _run(
        self,
        x: Tensor,
        h: Tensor,
        c: Tensor | None,
        sizes: list[int],
        suffix: str,
        see: Observer | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer and direction: outputs `(S, P)`, hidden and cell state at the end; see `recurrence`."""
        name, width = f"weight_ih{suffix}", self.gates * self.hidden_size
        weight, recurrent = self._weight(name), self._weight(f"weight_hh{suffix}")
        bias, hidden_bias = (getattr(self, f"bias_{part}{suffix}", None) for part in ("ih", "hh"))
        if weight.topo is None:
            gates = F.linear(x, weight.values, bias)
        else:
            gates = block_sparse_linear(x, weight.values, bias, weight.topo, width)
        projection = self._weight(f"weight_hr{suffix}") if getattr(self, "proj_size", 0) else None
        reverse = suffix.endswith("_reverse")
        if see is None:
            return recurrence(
                gates, h, c, recurrent, hidden_bias, sizes, projection=projection, reverse=reverse
            )
        see(name, x)
        y, h_end, c_end, saved, before = forward(
            gates, h, c, recurrent, hidden_bias, projection, sizes, reverse, True
        )
        see(f"weight_hh{suffix}", hidden_before(y, h, sizes, reverse))
        if projection is not None:
            see(f"weight_hr{suffix}", last_hidden(saved, before))
        return y, h_end, c_end

    def extra_repr(self) -> str:
        """Sizes, options that are not the default, and each packed weight, for `print(model)`."""
        said = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"proj_size": 0, "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        for name, default in (defaults | {"bidirectional": False}).items():
            value = getattr(self, name, default)
            said += [f"{name}={value}"] if value != default else []
        for packed in self.packed.values():
            said.append(f"{packed.name}={packed.blocks} blocks of {packed.block}")
        return ", ".join(said)


class _Layer(BlockSparseRecurrent):
    """What `BlockSparseLSTM` and `BlockSparseGRU` share."""

    proj_size: int
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Runs the layers through time, with the arguments and results of the layer of `torch.nn`.

        Args:
            input: `(T, B, I)`, with `batch_first` `(B, T, I)`, without a batch `(T, I)`, or a `PackedSequence`; the
                dtype of the weights (any under autocast).
            hx: States at the start, zeros if left out: of a GRU `(D L, B, H)`, of an LSTM also the cell state, where
                `D` is 2 if it is bidirectional and `L` the number of layers. No `B` without a batch.

        Returns:
            Outputs, in the form of `input` with `D P` features, and the states at the end, in the form of `hx`.

        Raises:
            ValueError: If a shape does not fit.
        """
        return self._through(input, hx, None)

    def observe(self, see: Observer, input: Tensor | PackedSequence, hx: Any = None) -> None:
        """Runs the layers, and shows what each weight is multiplied with; without gradients, without dropout."""
        with torch.no_grad():
            self._through(input, hx, see)

    def _through(self, input: Tensor | PackedSequence, hx: Any, see: Observer | None) -> tuple[Any, Any]:
        order = unsorted = None
        batched = True
        if isinstance(input, PackedSequence):
            x, lengths, order, unsorted = input
            sizes = lengths.tolist()
            self._check_features(x)
        else:
            self._check_features(input)
            batched = input.dim() == 3
            x = input if batched else input.unsqueeze(1)
            x = x.transpose(0, 1) if self.batch_first and batched else x
            sizes = [x.shape[1]] * x.shape[0]
            if not sizes:
                raise ValueError(
                    "recurrent layer: got a sequence of length 0, expected at least one time step"
                )
            x = x.reshape(-1, x.shape[2])
        hidden, cell = self._states(hx, x, sizes[0], batched, order)
        ends: list[tuple[Tensor, Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in self._suffixes(layer):
                at = len(ends)
                y, h, c = self._run(x, hidden[at], None if cell is None else cell[at], sizes, suffix, see)
                outputs.append(y)
                ends.append((h, c))
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if self.dropout and self.training and see is None and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        states = tuple(torch.stack(part) for part in zip(*ends, strict=True))[: 1 if cell is None else 2]
        if not batched:
            states = tuple(state.squeeze(1) for state in states)
        elif unsorted is not None:
            states = tuple(state.index_select(1, unsorted) for state in states)
        end = states if cell is not None else states[0]
        if isinstance(input, PackedSequence):
            return PackedSequence(x, input.batch_sizes, order, unsorted), end
        x = x.unflatten(0, (len(sizes), sizes[0]))
        if not batched:
            return x.squeeze(1), end
        return (x.transpose(0, 1) if self.batch_first else x), end

    def _suffixes(self, layer: int) -> Iterator[str]:
        yield f"_l{layer}"
        if self.bidirectional:
            yield f"_l{layer}_reverse"

    def _check_features(self, x: Tensor) -> None:
        if x.shape[-1] != self.input_size or x.dim() not in (2, 3):
            raise ValueError(
                f"recurrent layer: got an input of shape {tuple(x.shape)}, expected 2 or 3 dimensions and "
                f"{self.input_size} features"
            )

    def _states(
        self, hx: Any, x: Tensor, batch: int, batched: bool, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden and cell states at the start, `(D L, B, ...)`, in the order of the batch."""
        count, lstm = self.num_layers * (2 if self.bidirectional else 1), self.gates == 4
        widths = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if lstm else 1]
        if hx is None:
            made = [x.new_zeros(count, batch, width) for width in widths]
            return made[0], made[1] if lstm else None
        given = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        expected = [(count, batch, width) if batched else (count, width) for width in widths]
        if [tuple(state.shape) for state in given] != expected:
            raise ValueError(
                f"recurrent layer: got states of shape {', '.join(str(tuple(s.shape)) for s in given)}, expected "
                f"{', '.join(map(str, expected))}"
            )
        if not batched:
            given = [state.unsqueeze(1) for state in given]
        if order is not None:
            given = [state.index_select(1, order) for state in given]
        return given[0], given[1] if lstm else None


class BlockSparseLSTM(_Layer):
    """`nn.LSTM` with block-sparse weights; see `BlockSparseRecurrent`."""

    kind = "lstm"


class BlockSparseGRU(_Layer):
    """`nn.GRU` with block-sparse weights; see `BlockSparseRecurrent`."""

    kind = "gru"


class _Cell(BlockSparseRecurrent):
    """What `BlockSparseLSTMCell` and `BlockSparseGRUCell` share: one time step."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One time step, with the arguments and results of the cell of `torch.nn`.

        Args:
            input: `(B, I)` or `(I,)`.
            hx: Hidden state `(B, H)` or `(H,)`, of an LSTM with the cell state; zeros if left out.

        Returns:
            The next states, in the form of `hx`.

        Raises:
            ValueError: If a shape does not fit.
        """
        return self._step(input, hx, None)

    def observe(self, see: Observer, input: Tensor, hx: Any = None) -> None:
        """Runs the cell, and shows what each weight is multiplied with; without gradients."""
        with torch.no_grad():
            self._step(input, hx, see)

    def _step(self, input: Tensor, hx: Any, see: Observer | None) -> Any:
        batched, lstm = input.dim() == 2, self.gates == 4
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            given = [x.new_zeros(x.shape[0], self.hidden_size)] * (2 if lstm else 1)
        else:
            given = list(hx) if isinstance(hx, (tuple, list)) else [hx]
            given = given if batched else [state.unsqueeze(0) for state in given]
        shapes = [tuple(tensor.shape) for tensor in (x, *given)]
        states = [(x.shape[0], self.hidden_size)] * (2 if lstm else 1)
        if x.dim() != 2 or shapes != [(x.shape[0], self.input_size), *states]:
            raise ValueError(
                f"recurrent cell: got input and states of shape {', '.join(map(str, shapes))}, expected "
                f"{self.input_size} features and states of shape {states[0]}"
            )
        _, h, c = self._run(x, given[0], given[1] if lstm else None, [x.shape[0]], "", see)
        h, c = (h, c) if batched else (h.squeeze(0), c.squeeze(0))
        return (h, c) if lstm else h


class BlockSparseLSTMCell(_Cell):
    """`nn.LSTMCell` with block-sparse weights; see `BlockSparseRecurrent`."""

    kind = "lstm_cell"


class BlockSparseGRUCell(_Cell):
    """`nn.GRUCell` with block-sparse weights; see `BlockSparseRecurrent`."""

    kind = "gru_cell"


SPARSE_CLASSES: dict[str, type[_Layer] | type[_Cell]] = {
    "lstm": BlockSparseLSTM,
    "gru": BlockSparseGRU,
    "lstm_cell": BlockSparseLSTMCell,
    "gru_cell": BlockSparseGRUCell,
}


def recurrent_kind(module: nn.Module) -> str | None:
    """The kind of a dense recurrent layer or cell of `torch.nn`; `None` for any other module."""
    return next((kind for kind, cls in CLASSES.items() if isinstance(module, cls)), None)


def observed(module: nn.Module) -> _Layer | _Cell:
    """A view of a dense recurrent module that can `observe`; it shares all weights."""
    kind = recurrent_kind(module)
    assert kind is not None
    return SPARSE_CLASSES[kind](module)
