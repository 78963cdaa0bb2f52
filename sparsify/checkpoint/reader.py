"""Reading checkpoints: what one consists of without loading it, whether it is sound, and loading it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsify.blocks import BlockMask, BlockShape
from sparsify.checkpoint.files import StoredTensor, read_headers, weight_files
from sparsify.checkpoint.format import KEPT_DENSE, QUANT_METHOD, REPORT_FILE, check_format, packed_weights
from sparsify.checkpoint.sources import check_source, local_folder, read_config
from sparsify.errors import CheckpointError, SparsifyError
from sparsify.kernels.storage import validate_indices
from sparsify.layers.packed import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Task of a recipe -> transformers' class for it.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "sentence-embedding": "AutoModel",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "speech-classification": "AutoModelForAudioClassification",
}


@dataclass(frozen=True)
class LayerInfo:
    """One block-sparse weight of a checkpoint.

    Attributes:
        name: Module name; for fused experts and recurrent layers followed by the parameter's name.
        kind: `linear`, `conv1d`, `experts`, `convolution`, or a recurrent layer's, such as `lstm`.
        shape: Logical shape, `(N, K)`, `(E, N, K)` or `(O, I / groups, *kernel)`.
        block: Block shape.
        blocks: Stored blocks `Z`.
        density: Share of the weight's own elements that is stored, 0 to 1.
        bytes_stored: Bytes of values and indices on disk.
        bytes_dense: Bytes that the dense weight would take.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: BlockShape
    blocks: int
    density: float
    bytes_stored: int
    bytes_dense: int


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as its files describe it.

    Attributes:
        path: The folder.
        config: Contents of `config.json`.
        layers: Its block-sparse weights, sorted by name; none for a dense checkpoint.
        dense_bytes: Bytes of all other tensors.
        total_bytes: Bytes of the weight files.
        files: The weight files.
        kept_dense: Pruned layers that are dense all the same, and why.
    """

    path: Path
    config: dict[str, Any]
    layers: list[LayerInfo]
    dense_bytes: int
    total_bytes: int
    files: list[Path]
    kept_dense: dict[str, str]


def open_checkpoint(path: str | Path) -> CheckpointInfo:
    """Describes a checkpoint without loading its weights; only the indices of block-sparse layers are read.

    Args:
        path: A folder, or a name on the Hub (which is downloaded).

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or its indices are corrupted.
    """
    folder = check_source(path, trust_remote_code=True, plain=True)  # none of it runs here
    config = read_config(folder)
    files = weight_files(folder)
    stored = read_headers(files)
    layers = [
        _layer_info(name, kind, packed, lookup)
        for name, kind, packed, lookup in _packed_layers(folder, config, stored)
    ]
    dense_bytes = sum(tensor.nbytes for tensor in stored.values()) - sum(
        layer.bytes_stored for layer in layers
    )
    total_bytes = sum(file.stat().st_size for file in files)
    return CheckpointInfo(
        folder, config, layers, dense_bytes, total_bytes, files, _kept_dense(folder, config)
    )


def _kept_dense(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What the config says of pruned layers that are dense; where all are dense, what the report says."""
    kept = (config.get("quantization_config") or {}).get(KEPT_DENSE)
    if kept is None and "quantization_config" not in config:
        with suppress(OSError, ValueError, AttributeError):
            kept = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")).get("slower")
    return {str(name): str(why) for name, why in kept.items()} if isinstance(kept, dict) else {}


def read_masks(path: str | Path) -> dict[str, BlockMask]:
    """The mask of every block-sparse weight matrix of a checkpoint, read from its indices alone.

    Args:
        path: A folder, or a name on the Hub (which is downloaded).

    Returns:
        Masks by the name of the matrix: the module's, for fused experts followed by the parameter's and a number, for
        convolutions by group and kernel position where these have masks of their own.
        None for a dense checkpoint.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, or its indices are corrupted.
    """
    folder = check_source(path, trust_remote_code=True, plain=True)  # none of it runs here
    stored = read_headers(weight_files(folder))
    masks: dict[str, BlockMask] = {}
    for name, kind, packed, lookup in _packed_layers(folder, read_config(folder), stored):
        _, crow, col = _tensors(name, packed, lookup)
        for index, mask in enumerate(_masks(name, packed, _read_indices(crow), _read_indices(col))):
            if packed.conv is not None:
                masks[packed.conv.names(name)[index]] = mask
                continue
            matrix = name if packed.name == "weight" else f"{name}.{packed.name}"
            masks[f"{matrix}.{index}" if kind == "experts" else matrix] = mask
    return masks


def check_weights(model: torch.nn.Module) -> None:
    """Checks that no weight is NaN or infinite.

    Raises:
        CheckpointError: Naming the first weight that is.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter.detach()).all()):
            raise CheckpointError(f"weight {name} holds NaN or infinite values: the checkpoint is damaged")


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its class where the text alone tells nothing."""
    lines = str(error).split("\n")
    text = " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])
    if isinstance(error, (OSError, RuntimeError, ValueError, ImportError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}"


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    complete: bool = False,
    label2id: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """Loads a checkpoint, dense or block-sparse, as `from_pretrained` of the right class does.

    Args:
        path: A folder, or a name on the Hub.
        device: Where to put the model, such as `"cuda"`; `"auto"` spreads it with accelerate. Default: the CPU.
        dtype: Dtype of the weights, such as `"bfloat16"`; indices stay int32. Default: the checkpoint's.
        task: One of `TASKS`; by default the class that the checkpoint was saved from.
        trust_remote_code: Run the Python code that comes with the checkpoint, where transformers has none for it.
        complete: Refuse a checkpoint that lacks parameters of the model's repeated blocks, because nothing will
            train them. (Many encoders lack the pooler that their class has and nobody uses.)
        label2id: Classes of a classifier, instead of the checkpoint's; a head of another size is drawn anew.

    Returns:
        The model in evaluation mode. Parameters that the checkpoint lacks, such as a new head, are random; a warning
        names them, unless `label2id` asks for the head.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, unsafe, or does not fit the task.
    """
    import transformers

    from sparsify.checkpoint.quantizer import register

    register()
    folder = check_source(path, trust_remote_code)
    model_class = _model_class(read_config(folder), task)
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype, "use_safetensors": True}
    if device is not None and str(device) != "cpu":
        options["device_map"] = device if str(device) == "auto" else {"": device}
    if trust_remote_code and model_class.startswith("Auto"):
        options["trust_remote_code"] = True
    if label2id is not None:
        options |= {**labels_of(label2id), "ignore_mismatched_sizes": True}
    try:
        model, found = getattr(transformers, model_class).from_pretrained(
            folder, output_loading_info=True, **options
        )
    except SparsifyError:
        raise
    except Exception as error:  # whatever a damaged config makes transformers stumble over
        raise CheckpointError(f"cannot load {path} as {model_class}: {first_line(error)}") from error
    wrong = sorted(key for key, *_ in found["mismatched_keys"] if _in_repeated_block(key))
    if wrong:
        raise CheckpointError(f"cannot load {path}: {wrong[0]} has another shape than config.json says")
    missing = sorted(found["missing_keys"])
    asked_for = label2id is not None and not any(map(_in_repeated_block, missing))
    if missing and not asked_for:
        lack = (
            f"{path} has no weights for {len(missing)} of the parameters of {type(model).__name__} (the first is "
            f"{missing[0]})"
        )
        if complete and any(map(_in_repeated_block, missing)):
            raise CheckpointError(f"{lack}: they would be random; is its config.json that of another model?")
        warnings.warn(f"{lack}: they are random until they are trained", stacklevel=2)
    return model


def labels_of(label2id: Mapping[str, int]) -> dict[str, Any]:
    """Settings of a config whose head has these classes."""
    id2label = {number: name for name, number in label2id.items()}
    return {"id2label": id2label, "label2id": dict(label2id), "num_labels": len(id2label)}


def _in_repeated_block(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def load_processor(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer, image processor, feature extractor or combined processor of a checkpoint.

    Args:
        path: A folder, or a name on the Hub.
        trust_remote_code: Run the Python code that comes with the checkpoint, where transformers has none for it.

    Returns:
        Whatever `save_pretrained` of that object can write again; `None` if the checkpoint has none.

    Raises:
        CheckpointError: If the folder does not exist.
    """
    import transformers

    folder = local_folder(path)
    candidates = (
        ("processor_config.json", "AutoProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("tokenizer.json", "AutoTokenizer"),
        ("preprocessor_config.json", _preprocessor_class(folder)),
    )
    for file, loader in candidates:
        if (folder / file).is_file():
            try:
                return getattr(transformers, loader).from_pretrained(
                    folder, trust_remote_code=trust_remote_code
                )
            except Exception as error:  # tokenizers raise bare ones too
                reason = first_line(error)
                raise CheckpointError(f"cannot load the {loader[4:].lower()} of {path}: {reason}") from error
    return None


def _preprocessor_class(folder: Path) -> str:
    """The class for a preprocessor that comes alone; asked for both, transformers would look for a tokenizer too."""
    with suppress(OSError, ValueError):
        settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        if "feature_extractor_type" in settings:
            return "AutoFeatureExtractor"
    return "AutoProcessor"


def _model_class(config: Mapping[str, Any], task: str | None) -> str:
    import transformers

    if task not in (None, "auto"):
        if task not in TASKS:
            raise CheckpointError(f"unknown task {task!r}: expected one of auto, {', '.join(TASKS)}")
        return TASKS[task]
    names = config.get("architectures") or []
    own_code = [name for name in config.get("auto_map") or {} if name.startswith("AutoModel")]
    return next((name for name in [*names, *own_code] if hasattr(transformers, name)), "AutoModel")


def _natural(name: str) -> list[Any]:
    """Sorts `layers.10` after `layers.9`."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]


def _by_model_name(
    folder: Path, stored: Mapping[str, StoredTensor], entries: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """The stored tensors by the model's names, which for some architectures differ from those in the files."""
    wanted = (
        f"{name}.{packed.name}" for name, entry in entries.items() for packed in packed_weights(name, entry)
    )
    if all(name in stored for name in wanted):
        return stored
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    from sparsify.checkpoint.conversions import KeyMap
    from sparsify.checkpoint.skeleton import build

    model: Any = build(AutoConfig.from_pretrained(folder))
    key_map = KeyMap(model, get_model_conversion_mapping(model, None, model.hf_quantizer))
    return {key_map(key): tensor for key, tensor in stored.items()}


def _packed_layers(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, str, PackedWeight, Mapping[str, StoredTensor]]]:
    """Name, kind and description of every packed weight, and where to find its tensors; none if all are dense."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != QUANT_METHOD:
        return
    entries = check_format(quantization.get("format_version"), quantization.get("layers"))
    lookup = _by_model_name(folder, stored, entries)
    for name in sorted(entries, key=_natural):
        for packed in packed_weights(name, entries[name]):
            yield name, entries[name]["kind"], packed, lookup


def _tensors(name: str, packed: PackedWeight, stored: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """Values, row pointers and columns of a packed weight."""
    index_names = [f"{name}.{packed.prefix}{part}_indices" for part in ("crow", "col")]
    keys = [f"{name}.{packed.name}", *index_names]
    missing = [key for key in keys if key not in stored]
    if missing:
        raise CheckpointError(
            f"the checkpoint has no tensor {missing[0]}: a weight file is missing or damaged"
        )
    return [stored[key] for key in keys]


def _layer_info(name: str, kind: str, packed: PackedWeight, stored: Mapping[str, StoredTensor]) -> LayerInfo:
    values, crow, col = _tensors(name, packed, stored)
    masks = _masks(name, packed, _read_indices(crow), _read_indices(col))
    shape = packed.full_shape if kind != "experts" else (packed.count, *packed.shape)
    elements = math.prod(shape)
    return LayerInfo(
        name=name if packed.name == "weight" else f"{name}.{packed.name}",
        kind=kind,
        shape=shape,
        block=packed.block,
        blocks=packed.blocks,
        density=sum(mask.elements_kept for mask in masks) / elements,
        bytes_stored=values.nbytes + crow.nbytes + col.nbytes,
        bytes_dense=elements * (values.nbytes // values.numel if values.numel else 4),
    )


def _read_indices(tensor: StoredTensor) -> torch.Tensor:
    if tensor.dtype != "I32":
        raise CheckpointError(
            f"indices in {tensor.file} are {tensor.dtype}, expected I32: the file is damaged"
        )
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        content = bytearray(stream.read(tensor.nbytes))
    return torch.frombuffer(content, dtype=torch.int32) if content else torch.zeros(0, dtype=torch.int32)


def _masks(name: str, packed: PackedWeight, crow: torch.Tensor, col: torch.Tensor) -> Iterator[BlockMask]:
    rows, cols = packed.grid
    validate_indices(crow, col, (packed.count * rows, cols), packed.blocks, f"{name}.{packed.name}")
    for begin in range(0, packed.count * rows, rows):
        part = crow[begin : begin + rows + 1]
        columns = col[int(part[0]) : int(part[-1])]
        mask = BlockMask.from_csr(part - part[0], columns, packed.shape, packed.block)
        if packed.conv is None:
            yield mask
        else:
            yield from packed.conv.masks(mask.keep, packed.block)
