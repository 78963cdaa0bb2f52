"""Between the names in a checkpoint's files and the names in the model, where packed weights are concerned.

transformers renames and reshapes tensors on the way in and out (`transformers/conversion_mapping.py`): Mixtral's files
hold one matrix per expert, its model one fused parameter. Packed weights must not be reshaped, so converters that
would touch one are left out in loading. In saving, all conversions are left out wherever the model's own names load
back as themselves, which is nearly everywhere: packed experts then lie in the files under their fused names, and
`Trainer`, which resumes by the model's own names, finds every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# A `WeightRenaming` or `WeightConverter` of transformers, whose module has no stable public name for both.
Conversion = Any


def split(
    conversions: Iterable[Conversion], packed: Iterable[str]
) -> tuple[list[Conversion], list[Conversion]]:
    """Divides conversions into those that may stay and those that would reshape a packed tensor.

    Args:
        conversions: transformers' conversions in loading direction.
        packed: Names of all packed parameters and index buffers in the model.

    Returns:
        `(kept, dropped)`, both in their original order.
    """
    from transformers.core_model_loading import WeightConverter

    packed = list(packed)
    kept: list[Conversion] = []
    dropped: list[Conversion] = []
    for conversion in conversions:
        touches = isinstance(conversion, WeightConverter) and any(
            direction.rename_source_key(key)[1] is not None
            for direction in _directions(conversion)
            for key in packed
        )
        (dropped if touches else kept).append(conversion)
    return kept, dropped


def _directions(conversion: Conversion) -> list[Conversion]:
    """Copies of a converter for loading and, if it can be reversed at all, for saving."""
    # Copies, because matching marks a conversion as used.
    forwards = deepcopy(conversion)
    try:
        return [forwards, conversion.reverse_transform()]
    except (NotImplementedError, ValueError):
        return [forwards]


def for_saving(model: PreTrainedModel, packed: Iterable[str]) -> list[Conversion]:
    """The conversions, in loading direction, that `save_pretrained` is to reverse for a block-sparse model.

    Args:
        model: The model.
        packed: Names of all packed parameters and index buffers in the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    packed = list(packed)
    loading, _ = split(get_model_conversion_mapping(model), packed)
    key_map = KeyMap(model, loading)
    if all(key_map.keeps(key) for key in model.state_dict()):
        return []
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        # As `revert_weight_conversion` does: a model that was not loaded has no prefix to restore.
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    return split(conversions, packed)[0]


@contextmanager
def own_names(model: nn.Module) -> Iterator[None]:
    """Inside the block, `save_pretrained` writes a model's own names wherever they load back as themselves.

    For training: `Trainer` resumes by the model's names, and merely warns about weights that it does not find under
    them, so that the experts of a resumed Mixtral would not be those of its checkpoint.

    Args:
        model: Any model; only transformers models have conversions.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_quantizer", None) is not None:
        yield  # a block-sparse model does so anyway
        return
    before = getattr(model, "_weight_conversions", None)
    untyped: Any = model
    untyped._weight_conversions = for_saving(model, [])
    try:
        yield
    finally:
        untyped._weight_conversions = before


class KeyMap:
    """Maps tensor names of a checkpoint's files to the model's, as `from_pretrained` does.

    Args:
        model: The model, possibly on the meta device.
        conversions: Conversions in loading direction.
    """

    def __init__(self, model: PreTrainedModel, conversions: Iterable[Conversion]) -> None:
        from transformers.core_model_loading import WeightConverter

        conversions = list(conversions)
        self._renamings = [entry for entry in conversions if not isinstance(entry, WeightConverter)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state: dict[str, Any] = model.state_dict()

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> KeyMap:
        """The map for a dense model that is about to be loaded."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        return cls(model, get_model_conversion_mapping(model))

    def __call__(self, key: str) -> str:
        """The model's name for the file's tensor `key`; the name itself if the model has none such."""
        name, _ = self._rename(key)
        return key if name not in self._state and key in self._state else name

    def keeps(self, key: str) -> bool:
        """Whether a tensor stored under the model's own name `key` is loaded under it, and not reshaped."""
        name, converter = self._rename(key)
        # A name that renaming would take out of the model is left alone.
        return name not in self._state or (name == key and converter is None)

    def _rename(self, key: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
