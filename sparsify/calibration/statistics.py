"""Shows a pruner the inputs of each layer, from forward hooks on a dense model.

A linear layer's inputs are the tokens `(tokens, K)` it is called with. Of fused experts, each expert is shown the
tokens routed to it; the inputs of its second projection, which exist only inside the experts' forward pass, are
computed again from its first projection and the module's own gate. Of recurrent layers, each weight is shown what it is
multiplied with at all time steps, which is computed again too. Of a convolution, the inputs of an output pixel are its
patch, `(pixels, channels * positions)`, or for masks by kernel position that position's channels; only here, and image
by image, are patches laid side by side. Of an embedding, the inputs are the vectors that it scores; row numbers that it
looks up are none.

Padding is left out where a batch has an `attention_mask` (or `decoder_attention_mask`) that fits the layer's inputs in
shape. Where both fit and differ, or the layer sees other positions than the mask (image patches, pooled states), all
inputs count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify.errors import PrunerError
from sparsify.layers.experts import projections
from sparsify.layers.recurrent import observed, recurrent_kind
from sparsify.pruner import PrunableLayer, Pruner


def needs_calibration(pruner: Pruner) -> bool:
    """Whether a pruner reads the layers' inputs."""
    return bool(pruner.requires) or type(pruner).calibrate is not Pruner.calibrate


def checked_batches(batches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calibration data as a list, which can be gone through more than once.

    Raises:
        PrunerError: If there is none, or a batch is not the keyword arguments of a forward pass.
    """
    data: list[dict[str, Any]] = []
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise PrunerError(
                f"calibration batch {index} is a {type(batch).__name__}: expected the keyword arguments of the model's "
                f"forward pass, such as {{'x': tensor}}"
            )
        data.append(dict(batch))
    if not data:
        raise PrunerError("there is no calibration data: give at least one batch")
    return data


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    pruner: Pruner,
    batches: Iterable[Mapping[str, Any]],
    device: torch.device | str | None = None,
) -> None:
    """Runs batches through the model and calls `pruner.calibrate` with the inputs of each layer.

    Args:
        model: The dense model, in the state it is to be measured in; run in evaluation mode.
        layers: The layers to show.
        pruner: Who is shown; does nothing if it needs no calibration.
        batches: Keyword arguments of the model's forward pass, tensors or not.
        device: Where the tensors of a batch go; `None` for the device of the model's first parameter.

    Raises:
        PrunerError: If no batch reaches some layer (an expert without tokens is fine).
    """
    if not needs_calibration(pruner):
        return
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device if device is None else device
        with showing(model, layers, pruner) as masks:
            for batch in batches:
                moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                masks[:] = padding_masks(moved)
                model(**moved)
    finally:
        model.train(training)


def padding_masks(batch: Mapping[str, Any]) -> list[Tensor]:
    """The masks of a batch that say which of its tokens are padding, `(B, T)` bool, `False` for padding."""
    found = (batch.get("attention_mask"), batch.get("decoder_attention_mask"))
    return [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.dim() == 2]


@contextmanager
def showing(
    model: nn.Module, layers: Sequence[PrunableLayer], pruner: Pruner, share: bool = False
) -> Iterator[list[Tensor]]:
    """While it is open, whatever `layers` are called with is shown to `pruner.calibrate`.

    Args:
        model: The model.
        layers: The layers to show.
        pruner: Who is shown.
        share: Let linear layers that are called with the very same tensor have the very same statistics, collected
            and stored once; for a pruner whose `calibrate` only adds to them.

    Yields:
        A list to put the padding masks of each batch into before it runs.

    Raises:
        PrunerError: At the end, if no call has reached some layer (an expert without tokens is fine).
    """
    modules: dict[str, list[PrunableLayer]] = {}
    for layer in layers:
        modules.setdefault(layer.module_name, []).append(layer)
    masks: list[Tensor] = []
    reached: set[str] = set()
    leader: list[Any] = [None, None]  # the tensor shown last, and the layer it was shown for

    def hook(module_name: str) -> Callable[..., None]:
        own = modules[module_name]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [*args, *kwargs.values()]
            if isinstance(module, nn.Embedding) and not inputs[0].is_floating_point():
                return  # row numbers are no inputs of a product
            if own[0].conv is not None:
                _show_convolution(module, own, pruner, inputs[0])
            elif recurrent_kind(module) is not None:
                _show_recurrent(module, own, pruner, args, kwargs)
            elif own[0].index is not None:
                _show_experts(module, own, pruner, inputs, masks)
            elif share and inputs[0] is leader[0] and _follows(own[0], leader[1]):
                own[0].statistics.update(leader[1].statistics)
            else:
                _show_linear(module, own, pruner, inputs, masks)
                leader[:] = inputs[0], own[0]
            reached.add(module_name)

        return before

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True) for name in modules
    ]
    try:
        yield masks
    finally:
        leader[:] = None, None
        for handle in handles:
            handle.remove()
    missed = [name for name in modules if name not in reached]
    if missed and isinstance(model.get_submodule(missed[0]), nn.Embedding):
        raise PrunerError(
            f"embedding {missed[0]} only looks rows up, and has no inputs to measure: prune it with a method that "
            f"needs no calibration, such as magnitude"
        )
    if missed:
        raise PrunerError(
            f"layer {missed[0]} saw no calibration input{f', and {len(missed) - 1} more' if missed[1:] else ''}: "
            f"give data that reaches it, or leave it out with ignore"
        )


def _follows(layer: PrunableLayer, leader: PrunableLayer) -> bool:
    """Whether a layer has the same statistics as `leader` up to here: the very same, or none yet."""
    if layer is leader:  # called twice with the same tensor
        return False
    tokens = layer.statistics.get("tokens")
    return tokens is None or tokens is leader.statistics.get("tokens")


def _show_linear(
    module: nn.Module, layers: list[PrunableLayer], pruner: Pruner, inputs: list[Any], masks: list[Tensor]
) -> None:
    tokens = inputs[0]
    valid = valid_tokens(tokens, masks)
    pruner.calibrate(layers[0], tokens[valid] if valid is not None else tokens.flatten(0, -2))


def _show_convolution(module: Any, layers: list[PrunableLayer], pruner: Pruner, images: Tensor) -> None:
    images = images if images.dim() == module.weight.dim() else images.unsqueeze(0)
    padding, mode = module._reversed_padding_repeated_twice, module.padding_mode
    if any(padding):
        images = functional.pad(images, padding, "constant" if mode == "zeros" else mode)
    lead = (1,) * (2 - len(module.kernel_size))
    images = images.unsqueeze(2) if lead else images  # one dimension is an image of height 1
    window = {"dilation": lead + module.dilation, "stride": lead + module.stride}
    for image in images.split(1):
        patches = functional.unfold(image, lead + module.kernel_size, **window)
        patches = patches.unflatten(1, (module.groups, -1, layers[0].conv.positions))  # pyright: ignore
        for layer in layers:
            index = layer.index or 0
            if layer.conv is not None and layer.conv.per_position:
                group, position = divmod(index, layer.conv.positions)
                own = patches[:, group, :, position]
            else:
                own = patches[:, index].flatten(1, 2)
            pruner.calibrate(layer, own.transpose(1, 2).flatten(0, 1))


def _show_recurrent(
    module: nn.Module,
    layers: list[PrunableLayer],
    pruner: Pruner,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    rows: dict[str, Tensor] = {}
    observed(module).observe(rows.__setitem__, *args, **kwargs)
    for layer in layers:
        pruner.calibrate(layer, rows[layer.name[len(layer.module_name) + 1 :]])


def _show_experts(
    module: nn.Module, layers: list[PrunableLayer], pruner: Pruner, inputs: list[Any], masks: list[Tensor]
) -> None:
    tokens, routed = inputs[0], inputs[1]
    valid = valid_tokens(tokens, masks)
    if valid is not None:
        tokens, routed = tokens[valid], routed[valid]
    names = projections(module)
    assert names is not None
    for layer in layers:
        assert layer.index is not None
        shown = tokens[(routed == layer.index).any(-1)]
        first = layer.parameter is module._parameters[names[0]]
        pruner.calibrate(layer, shown if first else _hidden(module, names[0], layer.index, shown))


def _hidden(module: Any, projection: str, expert: int, tokens: Tensor) -> Tensor:
    """Inputs `(tokens, I)` of an expert's second projection."""
    weight, bias = getattr(module, projection)[expert], module._parameters.get(f"{projection}_bias")
    weight = weight.t() if getattr(module, "is_transposed", False) else weight
    hidden = functional.linear(tokens, weight, None if bias is None else bias[expert])
    gated = projection == "gate_up_proj" and getattr(module, "has_gate", True)
    return module._apply_gate(hidden) if gated else module.act_fn(hidden)


def valid_tokens(tokens: Tensor, masks: list[Tensor]) -> Tensor | None:
    """Which of `tokens` `(..., K)` are no padding, bool in the shape of `...`; `None` if no mask fits, or several.

    Args:
        tokens: Activations.
        masks: The batch's padding masks (see `padding_masks`).
    """
    lead = tokens.shape[:-1]
    fitting = [mask for mask in masks if mask.shape == lead or lead == (mask.numel(),)]
    if not fitting or any(not torch.equal(fitting[0], other) for other in fitting[1:]):
        return None
    return fitting[0].view(lead).to(tokens.device)
