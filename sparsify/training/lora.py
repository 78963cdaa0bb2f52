"""LoRA on block-sparse layers with PEFT, at stored blocks only.

A LoRA adapter adds `scaling * B A` to a weight. Added as it is, that update is dense: merging it would fill the blocks
that pruning removed. Here the update exists at stored blocks alone, in training and in use,

    W' = W + scaling * sdd(B, A)        (sdd: the product, computed at the stored blocks of W)

so that merging changes nothing but the values of stored blocks, and the merged layer is as sparse as before.

`get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` need nothing else than PEFT's usual calls.
LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel
from torch import Tensor

from sparsify.errors import ConfigError
from sparsify.kernels.linear.ops import block_sparse_linear
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.packed import PackedModule

if TYPE_CHECKING:
    from sparsify.recipe.training import Lora

# The other initialisations of PEFT rewrite the base weight or need it dense.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


class BlockSparseLora(lora_layer.Linear):
    """PEFT's wrapper of a `BlockSparseLinear`: plain LoRA whose update exists at stored blocks alone."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only; variants such as DoRA read the dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            ConfigError: If it asks for more than plain LoRA.
        """
        options = kwargs.get("config") or SimpleNamespace(**kwargs)
        asked = [name for name in ("use_dora", "lora_bias") if getattr(options, name, False)]
        initialisation = getattr(options, "init_lora_weights", True)
        if initialisation not in _INITIALISATIONS:
            asked.append(f"init_lora_weights={initialisation!r}")
        if asked:
            raise ConfigError(
                f"block-sparse layers support plain LoRA only, got {', '.join(asked)}: leave it out"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of an adapter as packed values `(Z, bi, bo)`, in the dtype of its matrices."""
        base: Any = self.get_base_layer()
        down, up = (matrix[adapter].get_parameter("weight") for matrix in (self.lora_A, self.lora_B))
        topology = list(base.topology("weight"))
        product = torch.ops.sparsify.sdd(up.t().contiguous(), down, topology, *base.weight.shape[1:])
        return product * self.scaling[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Applies the layer with its active adapters.

        Args:
            x: `(..., in_features)`.
            *args: Passed to the base layer.
            **kwargs: Passed to the base layer.

        Returns:
            `(..., out_features)`.

        Raises:
            ConfigError: If samples of the batch ask for different adapters.
        """
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError(
                "block-sparse layers cannot mix adapters in one batch: run one batch for each adapter"
            )
        for key in lora_layer.VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        dropping = self.training and any(
            not isinstance(self.lora_dropout[n], torch.nn.Identity) for n in adapters
        )
        if not dropping and base.weight.device.type != "meta":
            # One product over the updated values: what a merged layer computes, bit for bit.
            updates = sum(self.get_delta_weight(name) for name in adapters)
            values = (base.weight + updates).to(base.weight.dtype)
            return block_sparse_linear(x, values, base.bias, base.topology("weight"), base.out_features)
        result = self.base_layer(x, *args, **kwargs)
        for name in adapters:
            values, dropped = self.get_delta_weight(name).to(x.dtype), self.lora_dropout[name](x)
            update = block_sparse_linear(dropped, values, None, base.topology("weight"), base.out_features)
            result = result + update.to(result.dtype)
        return result


@contextmanager
def adapted(model: Any, settings: Lora) -> Iterator[Any]:
    """While it is open, the model has an adapter on its block-sparse layers, and nothing else is trained.

    At the end the updates are merged into the stored blocks: the model is what it was, with other values.

    Args:
        model: A transformers model with block-sparse layers.
        settings: Size and targets of the adapter.

    Yields:
        The model in PEFT's wrapper, which saves and loads the adapter alone.

    Raises:
        ConfigError: If a target means no block-sparse linear layer.
    """
    from peft import get_peft_model

    register()
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it, whole or not
        lora_dropout=settings.dropout,
        target_modules=adaptable(model, settings.targets),
    )
    wrapped: Any = get_peft_model(model, config)
    yield wrapped
    wrapped.merge_and_unload()
    # What PEFT leaves behind would make transformers look for an adapter.
    if hasattr(model, "peft_config"):
        del model.peft_config
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def adaptable(model: Any, targets: Sequence[str] | None) -> list[str]:
    """Names of the block-sparse linear layers that targets mean: exact names, `re:` patterns, or a name's last part.

    Raises:
        ConfigError: If there are none, or a target means none of them.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)]
    if not layers:
        raise ConfigError("lora trains packed blocks, and this model has no block-sparse linear layer")
    if targets is None:
        return layers
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in layers if _means(target, name)]
        if not found:
            parts = sorted({name.rpartition(".")[2] for name in layers})
            raise ConfigError(
                f"lora target {target!r} means no block-sparse layer; their names end in {', '.join(parts)}"
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _means(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.search(target.removeprefix("re:"), name) is not None
    return name == target or name.endswith(f".{target}")


def register() -> None:
    """Teaches PEFT's LoRA about block-sparse layers; runs when PEFT is imported, and is safe to call again."""
    if getattr(LoraModel._create_new_module, "_knows_block_sparse", False):
        return
    create_new_module = LoraModel._create_new_module
    include_all_linear = tuners_utils._maybe_include_all_linear_layers

    def create(lora_config: LoraConfig, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, PackedModule):
            if not isinstance(base, BlockSparseLinear) or kwargs.get("parameter_name") is not None:
                raise ConfigError(
                    f"LoRA is not available for {type(base).__name__} ({kwargs.get('target_name')}): take the layer "
                    f"out of target_modules and target_parameters; linear layers such as q_proj are supported"
                )
            lora_config._register_custom_module({BlockSparseLinear: BlockSparseLora})
        return create_new_module(lora_config, adapter_name, target, **kwargs)

    def include(peft_config: Any, model: Any) -> Any:
        shorthand = getattr(peft_config, "target_modules", None)
        peft_config = include_all_linear(peft_config, model)
        if (
            isinstance(peft_config, LoraConfig)
            and isinstance(shorthand, str)
            and shorthand.lower() == "all-linear"
        ):
            output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            sparse = {
                name.removesuffix(".base_layer")
                for name, module in model.named_modules()
                if isinstance(module, BlockSparseLinear) and module is not output
            }
            peft_config.target_modules = [*(peft_config.target_modules or ()), *sorted(sparse)]
        return peft_config

    create._knows_block_sparse = True  # pyright: ignore[reportFunctionMemberAccess]
    LoraModel._create_new_module = staticmethod(create)
    tuners_utils._maybe_include_all_linear_layers = include
