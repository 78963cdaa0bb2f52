"""Block-sparse models: prune a pretrained network in blocks, store and run only what is kept, recover accuracy.

    import sparsify
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/to/model")
    sparsify.prune(model, method="magnitude", block="64x64", sparsity=0.5)
    sparsify.save(model, "path/to/sparse")
    model = AutoModelForCausalLM.from_pretrained("path/to/sparse")

Importing this package is cheap: transformers and triton are loaded by the functions that need them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify._autoload import install as _install


def _check_links() -> None:
    """Says what to do about a checkout without symbolic links, before its folders are missed one by one."""
    for name in ("pruners", "kernels", "recipes"):
        link = Path(__file__).with_name(name)
        if not link.is_dir():
            raise ImportError(
                f"sparsify/{name} is a {'text file' if link.is_file() else 'missing link'}, not a folder: git checked "
                f"the repository out without symbolic links. Run `git config core.symlinks true && git checkout -- "
                f"sparsify`"
            )


# `import torch` imports this package by way of `_autoload`; an exception would then break torch for every program.
if not getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
    _check_links()
_install()

__version__ = "0.1.0"

# Public name -> module that defines it; resolved on first use so that `import sparsify` stays light.
_EXPORTS = {
    "BlockMask": "sparsify.blocks",
    "BlockShape": "sparsify.blocks",
    "BlockSparseConv1d": "sparsify.layers.convolution",
    "BlockSparseConv2d": "sparsify.layers.convolution",
    "BlockSparseGRU": "sparsify.layers.recurrent",
    "BlockSparseLSTM": "sparsify.layers.recurrent",
    "BlockSparseEmbedding": "sparsify.layers.embedding",
    "BlockSparseLinear": "sparsify.layers.linear",
    "BlockSparseExperts": "sparsify.layers.experts",
    "DataSpec": "sparsify.data.spec",
    "Pruner": "sparsify.pruner",
    "Recipe": "sparsify.recipe.schema",
    "TiedEmbedding": "sparsify.layers.embedding",
    "SparsifyCallback": "sparsify.training.pruning_callback",
    "SparsifyError": "sparsify.errors",
    "SparsifyLoop": "sparsify.training.sparsify_loop",
    "apply": "sparsify.api",
    "densify": "sparsify.api",
    "fuse": "sparsify.layers.fusion",
    "load": "sparsify.api",
    "masks_of": "sparsify.layers.swap",
    "parallelize": "sparsify.parallel.model",
    "permute": "sparsify.permutation",
    "prune": "sparsify.api",
    "run": "sparsify.api",
    "save": "sparsify.api",
    "score": "sparsify.api",
    "unfuse": "sparsify.layers.fusion",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from sparsify.api import apply, densify, load, prune, run, save, score
    from sparsify.blocks import BlockMask, BlockShape
    from sparsify.data.spec import DataSpec
    from sparsify.errors import SparsifyError
    from sparsify.layers.convolution import BlockSparseConv1d, BlockSparseConv2d
    from sparsify.layers.embedding import BlockSparseEmbedding, TiedEmbedding
    from sparsify.layers.experts import BlockSparseExperts
    from sparsify.layers.fusion import fuse, unfuse
    from sparsify.layers.linear import BlockSparseLinear
    from sparsify.layers.recurrent import BlockSparseGRU, BlockSparseLSTM
    from sparsify.layers.swap import masks_of
    from sparsify.parallel.model import parallelize
    from sparsify.permutation import permute
    from sparsify.pruner import Pruner
    from sparsify.recipe.schema import Recipe
    from sparsify.training.pruning_callback import SparsifyCallback
    from sparsify.training.sparsify_loop import SparsifyLoop


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        _check_links()
        value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
        return value
    raise AttributeError(f"module 'sparsify' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
