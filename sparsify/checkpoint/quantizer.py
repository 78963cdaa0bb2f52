"""The integration with transformers: `from_pretrained`, `save_pretrained`, `push_to_hub` and `Trainer` just work.

transformers calls a *quantizer*, chosen by `config.json`'s `quantization_config`, at fixed points of loading and
saving. Ours swaps dense layers for block-sparse ones while the model is still on the meta device, so that no dense
weight ever exists; checks files and indices; and keeps `config.json` true to the model on every save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsify.checkpoint.format import FORMAT_VERSION, QUANT_METHOD, check_format, packed_names
from sparsify.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsify.layers.packed import PackedModule


class BlockSparseConfig(QuantizationConfigMixin):
    """The `quantization_config` of a block-sparse checkpoint.

    Args:
        layers: Module name -> entry with kind, logical shape, block shape and number of blocks.
        format_version: Version of the format; 1.
        quant_method: `"block_sparse"`.
        **extra: Further keys, kept as they are and otherwise ignored.

    Raises:
        CheckpointError: If the version is unknown or an entry is malformed.
    """

    def __init__(
        self,
        layers: Mapping[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **extra: Any,
    ) -> None:
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.layers = check_format(format_version, layers)
        self.extra = extra

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in `config.json`."""
        own = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "layers": self.layers,
        }
        return {**self.extra, **own}

    def __iter__(self):
        yield from self.to_dict().items()


class BlockSparseQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a block-sparse model."""

    requires_calibration = False
    quantization_config: BlockSparseConfig

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed_keys: list[str] = []
        self._dtypes: dict[str, torch.dtype] = {}
        self.plan: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses to sparsify on load.

        Raises:
            ConfigError: If the checkpoint is dense and the config was passed as an argument.
        """
        if not self.pre_quantized:
            raise ConfigError(
                "BlockSparseConfig describes a checkpoint that is block-sparse already: load the dense model without "
                "it and call sparsify.prune(model, ...)"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from sparsify.checkpoint import dtypes, parallel_loading
        from sparsify.checkpoint.check import check_files
        from sparsify.checkpoint.skeleton import swap_in
        from sparsify.layers.swap import sparse_modules

        swap_in(model, self.quantization_config.layers)
        self._packed_keys = _packed_keys(sparse_modules(model))
        self._dtypes = dtypes.wanted(model)
        self.plan = parallel_loading.take_over(model)
        if checkpoint_files is not None:
            check_files(model, self, checkpoint_files)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Leaves out the conversions that would reshape packed weights."""
        from sparsify.checkpoint.conversions import split

        return split(weight_conversions, self._packed_keys)[0]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from sparsify.checkpoint import dtypes, parallel_loading
        from sparsify.checkpoint.check import check_loaded
        from sparsify.layers.fusion import fuse
        from sparsify.layers.swap import sparse_modules

        modules = sparse_modules(model)
        check_loaded(modules)
        dtypes.settle(model, self._dtypes)
        for name, module in modules.items():
            module.refresh(name)
        fuse(model)
        parallel_loading.divide(model, self.plan)
        # The weights are ordinary floating point: `.half()`, `.float()`, torch.compile and training all work, which
        # transformers forbids to what calls itself quantized.
        model.is_quantized = False  # pyright: ignore[reportArgumentType]
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any]]:
        """Called by `save_pretrained` before it writes anything: makes config and conversions fit the model.

        Of a model that is divided among ranks, all of which must call it, it gives the whole state.
        """
        from sparsify.parallel.model import parallelism_of, whole_state

        self.synchronise(model)
        return (None if parallelism_of(model) is None else whole_state(model)), {}

    def synchronise(self, model: PreTrainedModel) -> None:
        """Brings the config's layer entries and the model's weight conversions up to date with its modules."""
        from sparsify.checkpoint.conversions import for_saving
        from sparsify.layers.kinds import entry
        from sparsify.layers.swap import sparse_modules
        from sparsify.parallel.model import parallelism_of

        modules, divided = sparse_modules(model), parallelism_of(model)
        self.quantization_config.layers = (
            {name: entry(module) for name, module in modules.items()} if divided is None else divided.entries
        )
        self._packed_keys = _packed_keys(modules)
        model._weight_conversions = for_saving(model, self._packed_keys)  # pyright: ignore[reportArgumentType]

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`model.dequantize()`: turns the model back into an ordinary dense one with zeros, in place.

        Args:
            model: The block-sparse model.
            dtype: Cast to this dtype; by default every weight keeps its own.
        """
        from sparsify.checkpoint.densify import dense_skeleton, swap_out

        swap_out(model, dense_skeleton(model))
        model._weight_conversions = None  # pyright: ignore[reportArgumentType] -- those of the architecture
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]

    def is_serializable(self) -> bool:
        """Always: packed weights are saved like any others."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Always: kept blocks are trained directly."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Tells `Trainer` that no adapter is needed."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Always: the ops support `torch.compile(fullgraph=True)`."""
        return True


def register() -> None:
    """Makes the quantizer known to transformers; safe to call again."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, BlockSparseConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, BlockSparseQuantizer)


def attach(model: PreTrainedModel, extra: Mapping[str, Any] | None = None) -> None:
    """Makes a model whose layers were swapped in memory save itself as a block-sparse checkpoint.

    After this, `save_pretrained`, `push_to_hub` and `Trainer` checkpoints are block-sparse checkpoints.

    Args:
        model: A transformers model with block-sparse layers.
        extra: Further keys for `quantization_config`, JSON values.

    Raises:
        ConfigError: If the model has no block-sparse layer or is not a transformers model.
    """
    from transformers import PreTrainedModel

    from sparsify.layers.swap import sparse_modules

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{type(model).__name__} is not a transformers model, so it has no config to describe it"
        )
    if not sparse_modules(model):
        raise ConfigError(
            f"{type(model).__name__} has no block-sparse layer: convert it before attaching the format"
        )
    register()
    previous = getattr(model, "hf_quantizer", None)
    kept_extra = previous.quantization_config.extra if isinstance(previous, BlockSparseQuantizer) else {}
    config = BlockSparseConfig(layers={}, **{**kept_extra, **(extra or {})})
    quantizer = BlockSparseQuantizer(config, pre_quantized=True)
    quantizer.synchronise(model)
    model.hf_quantizer = quantizer  # pyright: ignore[reportArgumentType]
    model.config.quantization_config = config
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Attention code looks for an nn.Linear to learn the dtype from unless the config carries this mark.
            module.config._is_quantized = True


def _packed_keys(modules: Mapping[str, PackedModule]) -> list[str]:
    """Names in the model's state dict of everything that belongs to packed weights."""
    return [f"{name}.{key}" for name, module in modules.items() for key in packed_names(module)]
