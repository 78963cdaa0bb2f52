"""Checkpoints of plain `nn.Module`s, which no config can build: the caller builds the model, `load` fills it.

The folder is that of any other checkpoint: safetensors, and a `config.json` with the same `quantization_config`. In
place of an architecture it names the module's class, under `module_class`, which is for people and messages alone:
nothing is imported by that name, and no code or pickle comes with the weights. Tensors are stored under the names of
the model's `state_dict`, a weight that several names share once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.checkpoint.files import StoredTensor, read_headers, weight_files
from sparsify.checkpoint.format import FORMAT_VERSION, QUANT_METHOD, check_format, packed_names
from sparsify.checkpoint.sources import MODULE_CLASS, local_folder, module_class, read_config
from sparsify.custom import described, find
from sparsify.errors import CheckpointError, ConfigError
from sparsify.layers.fusion import fuse
from sparsify.layers.kinds import build, dense_parameters, entry
from sparsify.layers.packed import PackedModule
from sparsify.layers.swap import replace_module, sparse_modules


def check_savable(model: nn.Module) -> None:
    """Checks that a model can be written under the names that its class will ask for.

    Raises:
        ConfigError: If it is compiled by `torch.jit`, wrapped for training, adapted, or not in memory.
    """
    kind = type(model).__name__
    inside = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
    fault = None
    if not isinstance(model, nn.Module):
        fault = "expected an nn.Module"
    elif isinstance(model, torch.jit.ScriptModule):
        fault = "a torch.jit module is a program of its own: save the model that it was made from"
    elif hasattr(model, "peft_config"):
        fault = "merge the adapter first, or save the adapter alone with its own save_pretrained"
    elif kind in inside:
        fault = f"it is a wrapper: save the model inside, its `{inside[kind]}`"
    else:
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                fault = f"{name} of its state is a {type(value).__name__}: safetensors hold tensors alone"
            elif value.device.type == "meta":
                fault = f"{name} is on the meta device: load its weights first"
    if fault is not None:
        raise ConfigError(f"cannot save {kind}: {fault}")


def write(model: nn.Module, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Writes weights and `config.json` of a plain module into an existing folder.

    Args:
        model: What `check_savable` takes; with block-sparse layers or dense (also while it is masked).
        folder: Where to.
        max_shard_size: Largest weight file, in bytes or as in `"5GB"`.
    """
    layers = {name: entry(module) for name, module in sparse_modules(model).items()}
    _write(model, model.state_dict(), layers, folder, max_shard_size)


def write_dense(model: nn.Module, folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Writes the dense weights that a plain module with block-sparse layers stands for; see `write`."""
    state = model.state_dict()
    for name, module in sparse_modules(model).items():
        for key in packed_names(module):
            del state[f"{name}.{key}"]
        state |= {f"{name}.{key}": tensor for key, tensor in dense_parameters(module).items()}
    _write(model, state, {}, folder, max_shard_size)


def _write(
    model: nn.Module,
    state: dict[str, Tensor],
    layers: dict[str, Any],
    folder: Path,
    max_shard_size: int | str,
) -> None:
    from huggingface_hub import save_torch_state_dict

    config: dict[str, Any] = {MODULE_CLASS: f"{type(model).__module__}:{type(model).__qualname__}"}
    if layers:
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "layers": layers,
        }
    # A part of a larger storage would take all of it along.
    state = {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in state.items()
    }
    save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(
    path: str | Path,
    model: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> nn.Module:
    """Fills a plain module with a checkpoint's weights, in place, and swaps in its block-sparse layers.

    Args:
        path: A folder, or a name on the Hub.
        model: A dense model of the class that was saved, with weights of any value; it may be on the meta device.
        device: Where to put the model. Default: the CPU.
        dtype: Dtype of the floating-point weights. Default: the checkpoint's.

    Returns:
        `model`, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged, or does not fit the model, which is unchanged then.
        ConfigError: If the dtype is unknown, or the model is none that can be filled.
    """
    _check_fillable(model)
    folder, wanted = local_folder(path), _dtype(dtype)
    config = read_config(folder)
    if module_class(config) is None:
        raise CheckpointError(f"{path} is a checkpoint of transformers: load it without `model`")
    stored = read_headers(weight_files(folder))
    sparse = _sparse_layers(model, config)
    targets = _targets(model, sparse)
    _check_fit(path, type(model).__name__, stored, targets)
    place = torch.device("cpu" if device is None else device)
    _check_tensors_left(model, sparse, targets)
    tensors = _read(stored, place, wanted)
    for name, module in sparse.items():
        for key in packed_names(module):
            _set(module, key, tensors.pop(f"{name}.{key}"))
        module.refresh(name)
    for name, module in sparse.items():
        replace_module(model, name, module)
    _fill(model, tensors)
    fuse(model)
    return model.to(place).eval()


def builder(
    path: str | Path, config: Mapping[str, Any], module: str | Callable[[], nn.Module] | None
) -> Callable[[], nn.Module] | None:
    """What builds the dense module of a checkpoint; `None` for a checkpoint of transformers.

    Args:
        path: The checkpoint, for messages.
        config: Its `config.json`.
        module: The class or function, or where it is, as `package.module:name`.

    Raises:
        ConfigError: If it is missing, cannot be found, or does not build a module.
        CheckpointError: If the checkpoint is of transformers, which needs none.
    """
    name = module_class(config)
    if module is None and name is None:
        return None
    if name is None:
        raise CheckpointError(f"{path} is a checkpoint of transformers: load it without a module")
    if module is None:
        raise ConfigError(
            f"{path} holds the weights of a plain module, {name}, which your own code builds: say what builds "
            f"it, as in --module {name}"
        )
    make = find(module, "module", ConfigError) if isinstance(module, str) else module

    def build() -> nn.Module:
        try:
            made = make()
        except Exception as error:  # the user's own code, which may hold any mistake
            raise ConfigError(f"{module} cannot build a module: {described(error)}") from error
        if not isinstance(made, nn.Module):
            raise ConfigError(f"{module} gave a {type(made).__name__}, expected an nn.Module")
        return made

    return build


def _check_fillable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"cannot load into {model!r:.60}: `model` is a model that your own code has built, such as "
            f"model=MyModel(...), and no class and no torch.jit module"
        )
    if sparse_modules(model):
        raise ConfigError(
            f"cannot load into {type(model).__name__}: it has block-sparse layers already; build a dense one"
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"unknown dtype {dtype!r}: expected a floating-point one, such as bfloat16")
    return found


def _sparse_layers(model: nn.Module, config: Mapping[str, Any]) -> dict[str, PackedModule]:
    """The block-sparse layers that a config describes, on the meta device."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError("config.json: quantization_config is none of ours: the checkpoint is damaged")
    layers = check_format(quantization.get("format_version"), quantization.get("layers"))
    modules = dict(model.named_modules())
    sparse = {}
    for name, layer in layers.items():
        if name not in modules:
            raise CheckpointError(
                f"config.json names the block-sparse layer {name!r}, which {type(model).__name__} does not have: "
                f"build the model that was saved, a {module_class(config)}"
            )
        dense = modules[name]
        sparse[name] = build(name, dense, layer)
        for key, parameter in dense.named_parameters(recurse=False):
            sparse[name].get_parameter(key).requires_grad_(parameter.requires_grad)
    return sparse


def _targets(model: nn.Module, sparse: Mapping[str, PackedModule]) -> dict[str, Tensor]:
    """Every tensor that the filled model will have, by name."""
    own = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not any(name.startswith(f"{layer}.") for layer in sparse)
    }
    for layer, module in sparse.items():
        own |= {f"{layer}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return own


def _check_fit(
    path: str | Path, kind: str, stored: Mapping[str, StoredTensor], targets: Mapping[str, Tensor]
) -> None:
    # Of names that share a tensor, one is stored.
    filled = {id(tensor) for name, tensor in targets.items() if name in stored}
    missing = [name for name, tensor in targets.items() if name not in stored and id(tensor) not in filled]
    unknown = [name for name in stored if name not in targets]
    shapes = [
        f"{name} is {list(stored[name].shape)} there and {list(tensor.shape)} in the model"
        for name, tensor in targets.items()
        if name in stored and stored[name].shape != tuple(tensor.shape)
    ]
    faults = [
        f"{fault.format(found[0])}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}"
        for fault, found in (("it has no {}", missing), ("the model has no {}", unknown), ("{}", shapes))
        if found
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit {kind}: {'; '.join(faults)}")


def _check_tensors_left(
    model: nn.Module, sparse: Mapping[str, PackedModule], targets: Mapping[str, Tensor]
) -> None:
    """What no file holds has to be in memory already."""
    known = {id(tensor) for tensor in targets.values()}
    for name, buffer in model.named_buffers():
        inside = any(name.startswith(f"{layer}.") for layer in sparse)
        if buffer.device.type == "meta" and id(buffer) not in known and not inside:
            raise CheckpointError(
                f"buffer {name} is on the meta device and in no file: build the model off the meta device"
            )


def _read(
    stored: Mapping[str, StoredTensor], device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 -- it is no dictionary
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return tensors


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors under their names; what shares a tensor with a filled one goes on sharing it."""
    fresh: dict[int, Tensor] = {}
    targets = model.state_dict(keep_vars=True)
    for name, old in targets.items():
        if name in tensors:
            fresh[id(old)] = _renewed(old, tensors[name])
    for name, old in targets.items():
        if id(old) in fresh:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, fresh[id(old)])


def _set(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    setattr(module, leaf, _renewed(getattr(module, leaf), tensor))


def _renewed(old: Tensor, tensor: Tensor) -> Tensor:
    """`old` with the values of `tensor`: the very same object, which optimizers may hold, if it is in memory."""
    if not isinstance(old, nn.Parameter):
        return tensor
    if old.device.type == "meta":
        return nn.Parameter(tensor, old.requires_grad)
    old.data = tensor
    return old
