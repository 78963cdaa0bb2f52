"""What the forward pass of an MLP may look like for its first products to go on in their kernels.

There are some hundred MLP classes in transformers and some ten ways to write one. So a class is recognised by what its
`forward` does, not by its name: compiled by the same interpreter, it must be the same code as one of the functions
below, whatever its sub-modules are called. A class that does anything else, or does it in another order, is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(NamedTuple):
    """Names of an MLP's sub-modules: `tail(activation(first(x)))`, or `tail(activation(first(x)) * second(x))`.

    Attributes:
        first: The layer before the activation.
        activation: The activation.
        second: The layer whose output is multiplied in, of a gated MLP.
        tail: What follows, one after the other.
        casts: Whether the input of the last layer is cast to the dtype of its weight.
    """

    first: str
    activation: str
    second: str | None
    tail: tuple[str, ...]
    casts: bool


class _Pattern(NamedTuple):
    code: CodeType
    tail: tuple[str, ...]
    casts: bool


_PATTERNS: list[_Pattern] = []
_ROLES = ("first", "second", "activation", "dropout", "dropout_2", "last")


def _pattern(*tail: str, casts: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Any) -> Callable[..., Any]:
        _PATTERNS.append(_Pattern(function.__code__, tail, casts))
        return function

    return register


@_pattern("last")
def _llama(self, x):
    y = self.last(self.activation(self.first(x)) * self.second(x))
    return y


@_pattern("last")
def _idefics(self, x):
    return self.last(self.activation(self.first(x)) * self.second(x))


@_pattern("dropout", "last")
def _t5_gemma(self, x):
    y = self.activation(self.first(x)) * self.second(x)
    y = self.dropout(y)
    z = self.last(y)
    return z


@_pattern("dropout", "last", casts=True)
def _t5_gated(self, x):
    gate = self.activation(self.first(x))
    up = self.second(x)
    x = gate * up
    x = self.dropout(x)
    if (
        isinstance(self.last.weight, torch.Tensor)
        and x.dtype != self.last.weight.dtype
        and self.last.weight.dtype != torch.int8
    ):
        x = x.to(self.last.weight.dtype)
    x = self.last(x)
    return x


@_pattern("dropout", "last", casts=True)
def _t5(self, x):
    x = self.first(x)
    x = self.activation(x)
    x = self.dropout(x)
    if (
        isinstance(self.last.weight, torch.Tensor)
        and x.dtype != self.last.weight.dtype
        and self.last.weight.dtype != torch.int8
    ):
        x = x.to(self.last.weight.dtype)
    x = self.last(x)
    return x


@_pattern()
def _bert(self, x):
    x = self.first(x)
    x = self.activation(x)
    return x


@_pattern("last")
def _clip(self, x):
    x = self.first(x)
    x = self.activation(x)
    x = self.last(x)
    return x


@_pattern("last")
def _nemotron(self, x):
    return self.last(self.activation(self.first(x)))


@_pattern("last", "dropout")
def _gpt2(self, x):
    x = self.first(x)
    x = self.activation(x)
    x = self.last(x)
    x = self.dropout(x)
    return x


@_pattern("dropout", "last", "dropout")
def _vit_det(self, x):
    x = self.first(x)
    x = self.activation(x)
    x = self.dropout(x)
    x = self.last(x)
    x = self.dropout(x)
    return x


@_pattern("dropout", "last", "dropout_2")
def _wav2vec2(self, x):
    x = self.first(x)
    x = self.activation(x)
    x = self.dropout(x)
    x = self.last(x)
    x = self.dropout_2(x)
    return x


@cache
def recognise(cls: type[nn.Module]) -> Mlp | None:
    """The names of the sub-modules of an MLP class; `None` if it is not one of those above."""
    # Looked up this way because a torch.jit class cannot even be asked for its `forward`.
    code = getattr(inspect.getattr_static(cls, "forward"), "__code__", None)
    for pattern in _PATTERNS:
        names = None if code is None else _roles(code, pattern.code)
        if names is not None:
            tail = tuple(names[role] for role in pattern.tail)
            return Mlp(names["first"], names["activation"], names.get("second"), tail, pattern.casts)
    return None


def _roles(code: CodeType, pattern: CodeType) -> dict[str, str] | None:
    """The name that `code` has for each role in `pattern`; `None` unless they do the same."""
    if _essence(code) != _essence(pattern):
        return None
    pairs = list(zip(pattern.co_names, code.co_names, strict=True))
    if any(own != other for own, other in pairs if own not in _ROLES):
        return None
    return {own: other for own, other in pairs if own in _ROLES}


def _essence(code: CodeType) -> tuple[Any, ...]:
    """All of a function but its names, its docstring (the first constant) and where it stands."""
    arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    kind = code.co_flags & (
        inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    )
    return code.co_code, code.co_consts[1:], len(code.co_names), code.co_freevars, arguments, kind


_FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", F.gelu: "gelu"}
_CLASSES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
}
_MODULES = ("torch.nn.modules.activation", "transformers.activations")


def activation_name(activation: Any) -> str | None:
    """Which of `kernels.reference.ACTIVATIONS` a module or function computes; `None` if none of them."""
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)
    cls = type(activation)
    if cls is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _CLASSES.get(cls.__name__) if cls.__module__ in _MODULES else None
