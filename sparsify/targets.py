"""Which layers a recipe means: patterns, and what stays dense and why.

A pattern names modules in one of three ways, and means every layer inside the modules it names:

- `model.layers.0.mlp`: the exact name of a module, of one expert's matrix (`...experts.down_proj.3`) or of one weight
  of a recurrent layer (`lstm.weight_hh_l0`);
- `re:layers\\.[02]\\.`: a regular expression, searched for anywhere in the name (anchor it with `^` and `$`);
- `Linear`, `LlamaMLP`: the name of a module's class or of one of its base classes.

Without patterns, every layer of the model's repeated blocks is meant: all that live inside an `nn.ModuleList`.
The output embedding is only ever pruned when a name or a regular expression reaches it, an embedding only by its own
name or as `Embedding`, and a weight that two modules share never is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparsify.blocks import BlockShape
from sparsify.errors import TargetError
from sparsify.layers import kinds
from sparsify.pruner import PrunableLayer

UNNAMED = "an embedding; name it to prune it"
# Classes by which an embedding can be named.
EMBEDDINGS = ("Embedding", "TiedEmbedding")


@dataclass(frozen=True)
class KeptDense:
    """A layer that stays dense.

    Attributes:
        name: Name of the module or of one expert's matrix.
        shape: `(N, K)`, or the parameter's shape where it is not a matrix; empty if unknown.
        reason: Why, in a few words.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """What will be pruned, in the model's order, and what stays dense.

    Attributes:
        layers: The layers to prune.
        dense: The other layers of a kind that could be pruned.
    """

    layers: list[PrunableLayer]
    dense: list[KeptDense]

    @property
    def elements(self) -> int:
        """Number of elements in all selected layers."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)


def select(
    model: nn.Module,
    block: BlockShape,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    per_position: bool = False,
) -> Selection:
    """Finds the layers to prune.

    Args:
        model: A dense model.
        block: Block shape `(bo, bi)`; layers smaller than one block stay dense.
        targets: Patterns of what to prune (see the module's docstring); `None` for the model's repeated blocks.
        ignore: Patterns of what to leave dense all the same.
        per_position: Whether each kernel position of a convolution is pruned by itself, instead of all together.

    Raises:
        TargetError: If a pattern matches nothing, names a weight that cannot be pruned, or nothing is left to prune.
    """
    request = _Request(model, block, targets, ignore, per_position)
    layers: list[PrunableLayer] = []
    dense: list[KeptDense] = []
    for candidate in request.candidates:
        reasons = {layer.name: request.why_dense(candidate, layer) for layer in candidate.layers}
        layers += [layer for layer in candidate.layers if reasons[layer.name] is None]
        dense += candidate.kept_dense(reasons)
    if not layers:
        raise TargetError(_nothing_left(model, dense))
    return Selection(layers, dense)


class _Request:
    """What was asked for, resolved against the model."""

    def __init__(
        self,
        model: nn.Module,
        block: BlockShape,
        targets: Sequence[str] | None,
        ignore: Sequence[str] | None,
        per_position: bool,
    ) -> None:
        self.block = block
        self.candidates = list(_candidates(model, block, per_position))
        self.wanted = None
        if targets is not None:
            self.wanted = [_Pattern(model, text, self.candidates) for text in targets]
        self.unwanted = [_Pattern(model, text, self.candidates, "ignore") for text in ignore or ()]
        self.shared = shared_weights(model)
        self.output = _output_embedding(model)
        self.repeated = _inside_module_lists(model)
        matrices = [c for c in self.candidates if c.layers and not c.is_embedding]
        if not any(candidate.module_name in self.repeated for candidate in matrices):
            self.repeated = {candidate.module_name for candidate in self.candidates}

    def why_dense(self, candidate: _Candidate, layer: PrunableLayer) -> str | None:
        """Why a layer stays dense; `None` if it is to be pruned."""
        if candidate.is_embedding and not any(p.names_embedding(layer) for p in self.wanted or ()):
            return UNNAMED
        if any(pattern.matches(layer) for pattern in self.unwanted):
            return "ignored"
        owners = self.shared.get(address(layer.parameter))
        if owners is not None:
            other = next((name for name in owners if name != layer.module_name), layer.module_name)
            if any(pattern.text == layer.name for pattern in self.wanted or ()):
                raise TargetError(
                    f"target {layer.name!r} cannot be pruned: it shares its weight with {other}, and a shared weight "
                    f"has to stay dense; drop the target, or untie the two (tie_word_embeddings: false) first"
                )
            return f"shares its weight with {other}"
        if self.wanted is None and layer.module_name not in self.repeated:
            return "outside the repeated blocks"
        if self.wanted is not None and not any(pattern.matches(layer) for pattern in self.wanted):
            return "not among the targets"
        if candidate.module is self.output and not any(pattern.names(layer) for pattern in self.wanted or ()):
            return "output embedding; name it to prune it"
        return f"smaller than one block of {self.block}" if candidate.too_small(layer) else None


class _Candidate:
    """A module that holds weight matrices of a kind that can be pruned, or nearly so."""

    def __init__(self, module_name: str, module: nn.Module, block: BlockShape, per_position: bool) -> None:
        self.module_name, self.module = module_name, module
        self.layers = kinds.matrices(module_name, module, block, per_position)
        self.why = kinds.why_unsupported(module)
        self.is_embedding = isinstance(module, nn.Embedding)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        shapeless = isinstance(weight, nn.UninitializedParameter)
        self.shape = () if weight is None or shapeless else tuple(weight.shape)

    def too_small(self, layer: PrunableLayer) -> bool:
        """Whether a layer is smaller than one block."""
        # The weights of fused experts are swapped together, so one that is too small keeps all of them dense.
        together = [layer] if layer.index is None else self.layers
        return any(x.shape[0] < x.block.rows or x.shape[1] < x.block.cols for x in together)

    def kept_dense(self, reasons: dict[str, str | None]) -> list[KeptDense]:
        """What stays dense here; all matrices of one parameter as one entry where they share the reason."""
        if self.is_embedding and (self.why or UNNAMED in reasons.values()):
            return []  # every model has one, and nobody asked
        if self.why:
            return [KeptDense(self.module_name, self.shape, self.why)]
        entries: dict[str, KeptDense] = {}
        for layer in self.layers:
            reason, name, shape = reasons[layer.name], layer.name, layer.shape
            if reason is None:
                continue
            siblings = [other for other in self.layers if other.parameter is layer.parameter]
            together = all(reasons[other.name] == reason for other in siblings)
            if layer.conv is not None and together:
                name, shape = layer.module_name, self.shape
            elif layer.index is not None and together:
                name, shape = name.rpartition(".")[0], (len(siblings), *shape)
            entries[name] = KeptDense(name, shape, reason)
        return list(entries.values())


def _candidates(model: nn.Module, block: BlockShape, per_position: bool) -> Iterator[_Candidate]:
    compiled: list[str] = []  # what is inside of a torch.jit module is told of as one
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in compiled):
            continue
        candidate = _Candidate(name, module, block, per_position)
        if isinstance(module, torch.jit.ScriptModule):
            compiled.append(f"{name}." if name else "")
        if candidate.layers or candidate.why:
            yield candidate


class _Pattern:
    """One pattern, checked to match something, and the names of all it stands for."""

    def __init__(
        self, model: nn.Module, text: str, candidates: list[_Candidate], role: str = "target"
    ) -> None:
        self.text = text
        self.regex = None
        if text.startswith("re:"):
            try:
                self.regex = re.compile(text.removeprefix("re:"))
            except re.error as error:
                raise TargetError(f"{role} {text!r} is not a regular expression: {error}") from error
        self.roots = {name for name, module in model.named_modules() if self._means(name, module)}
        layers = ((candidate, layer) for candidate in candidates for layer in candidate.layers)
        if any((self.names_embedding if c.is_embedding else self.matches)(layer) for c, layer in layers):
            return
        if not self.roots:
            raise TargetError(f"{role} {text!r} matches nothing: {_nearest(model, text)}")
        root = min(self.roots)
        why = next((candidate.why for candidate in candidates if candidate.module_name == root), None)
        raise TargetError(
            f"{role} {text!r} holds no layer that can be pruned: {root or 'the model'} is of class "
            f"{type(model.get_submodule(root)).__name__}{f' ({why})' if why else ''}; what can be pruned are "
            f"linear layers, convolutions, Conv1D, fused experts, LSTM and GRU, and embeddings by their own name"
        )

    def _means(self, name: str, module: nn.Module) -> bool:
        if self.regex is not None:
            return bool(name and self.regex.search(name))
        bases = (cls.__name__ for cls in type(module).mro() if cls not in (nn.Module, object))
        return (bool(name) and name == self.text) or self.text in bases

    def names(self, layer: PrunableLayer) -> bool:
        """Whether the pattern reaches the layer by a name rather than by a class."""
        if self.regex is not None:
            return self.matches(layer)
        return layer.name == self.text or layer.module_name == self.text

    def names_embedding(self, layer: PrunableLayer) -> bool:
        """Whether the pattern means an embedding and no more than that: by its name, or its class."""
        return layer.module_name == self.text or (self.text in EMBEDDINGS and self.matches(layer))

    def matches(self, layer: PrunableLayer) -> bool:
        """Whether the pattern means the layer or a module around it."""
        if layer.name == self.text or (self.regex is not None and self.regex.search(layer.name)):
            return True
        parts = layer.module_name.split(".")
        return any(".".join(parts[:end]) in self.roots for end in range(len(parts) + 1))


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter, for each parameter (by its address) that has more than one."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(address(parameter), []).append(name.rpartition(".")[0])
    return {key: names for key, names in owners.items() if len(names) > 1}


def address(parameter: nn.Parameter) -> int:
    """Where a parameter begins in memory, for two may share it; of one that is in no memory, which object it is."""
    if isinstance(parameter, nn.UninitializedParameter) or parameter.device.type == "meta":
        return id(parameter)
    return parameter.data_ptr() or id(parameter)


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _inside_module_lists(model: nn.Module) -> set[str]:
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {name for name, _ in model.named_modules() if name.startswith(tuple(lists))}


def _nearest(model: nn.Module, text: str) -> str:
    wanted = text.removeprefix("re:")
    names = [name for name, _ in model.named_modules() if name]
    leaves = {name.rpartition(".")[2] for name in names}
    if wanted in leaves:
        return f"names are whole, such as {next(n for n in names if n.endswith(wanted))!r}; for all write 're:{wanted}'"
    classes = {type(module).__name__ for module in model.modules()}
    known = list(dict.fromkeys([*sorted(classes), *sorted(leaves), *names]))
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    shown = close or [name for name in names if "." in name][:3] or names[:3]
    return f"the nearest names are {', '.join(shown)}"


def _nothing_left(model: nn.Module, dense: list[KeptDense]) -> str:
    if any(kinds.is_sparse(module) for module in model.modules()):
        return (
            f"nothing is left to prune in {type(model).__name__}: its layers are block-sparse already; to prune them "
            f"anew, take the dense model, or turn this one back with `sparsify densify`"
        )
    if not dense:
        kinds_known = "linear layer, convolution, Conv1D, fused experts, LSTM or GRU"
        return f"nothing in {type(model).__name__} can be pruned: it has no {kinds_known}"
    first = dense[0]
    more = f", and {len(dense) - 1} more" if len(dense) > 1 else ""
    name = first.name or "it"
    return f"nothing is left to prune in {type(model).__name__}: {name} stays dense ({first.reason}){more}"
