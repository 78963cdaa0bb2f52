"""Lets programs that never import `sparsify` load its checkpoints.

`import torch` calls `install` through the `torch.backends` entry point, and so does `import sparsify`. It puts one
finder on `sys.meta_path`; when transformers or PEFT is imported later, the finder has our part of it registered right
after. Nothing is imported before that: this file uses the standard library alone, takes well under a millisecond, and
never raises, because an exception here would break every `import torch` on the machine.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Imported module -> our module whose `register()` runs after it. The second transformers entry covers an
# `import torch` that happens in the middle of importing the first.
_HOOKS = {
    "transformers.quantizers.auto": "sparsify.checkpoint.quantizer",
    "transformers.modeling_utils": "sparsify.checkpoint.quantizer",
    "peft.tuners.lora.model": "sparsify.training.lora",
}


def install() -> None:
    """Arranges that transformers and PEFT know block-sparse checkpoints and layers once they are imported.

    Safe to call any number of times; never raises.
    """
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())  # pyright: ignore[reportArgumentType]
            for name in _HOOKS:
                module = sys.modules.get(name)
                if module is not None and not getattr(module.__spec__, "_initializing", False):
                    _register(name)
    except Exception as error:
        warnings.warn(f"sparsify could not install its import hook: {error}", stacklevel=2)


def _register(name: str) -> None:
    """Runs the `register()` that belongs to module `name`, which has just been imported."""
    try:
        module = import_module(_HOOKS[name])
        # Where our module is what imported `name`, it is not complete yet; the next hook finds it so.
        if not getattr(module.__spec__, "_initializing", False):
            module.register()
    except Exception as error:
        warnings.warn(f"sparsify could not register itself with {name}: {error}", stacklevel=2)


class _Finder:
    """Finds the modules of `_HOOKS` as the other finders do, and has `_register` called once one has been executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _HOOKS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None and not isinstance(finder, _Finder) else None
            if spec is not None:
                _call_after(spec, name)
                return spec
        return None


def _call_after(spec: ModuleSpec, name: str) -> None:
    loader: Any = spec.loader
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:
            _register(name)

    loader.exec_module = exec_module
