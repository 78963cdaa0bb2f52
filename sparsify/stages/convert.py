"""The weights' final form: packed blocks, or dense with zeros, also layer by layer where dense is faster."""

from __future__ import annotations

from sparsify.checkpoint.format import KEPT_DENSE
from sparsify.checkpoint.quantizer import attach
from sparsify.conv_speed import slower_convolutions
from sparsify.kernels.tuning_files import device_name
from sparsify.layers import swap
from sparsify.layers.kinds import dense_kind, every_matrix
from sparsify.prediction import predict
from sparsify.recipe.schema import ConvertStage
from sparsify.stages.state import State


def run(stage: ConvertStage, state: State) -> None:
    """Packs the model's layers, unless dense weights are asked for or a stage before packed them already."""
    if stage.format == "block_sparse":
        choose(state, stage.dense_where_slower)
        pack(state)
    if state.recipe.offload:
        state.model.to(state.device)  # what is packed is smaller


def choose(state: State, dense_where_slower: str) -> None:
    """Decides which masked layers stay dense because they would run slower block-sparse, and says so.

    A layer that keeps all its blocks would on any machine. Linear layers are predicted from what was measured of this
    machine before; convolutions are timed now, on a GPU.

    Args:
        state: The state of the run; its `slower` is brought up to date.
        dense_where_slower: `auto`, or `never` for none.
    """
    if dense_where_slower == "never":
        state.slower = {}
        return
    modules = dict(state.model.named_modules())
    state.slower |= {
        name: "keeps all its blocks"
        for name, mask in state.dense_masks.items()
        if name in modules and name not in state.slower and mask.keep.all()
    }
    # A weight of which nothing is left costs nothing.
    layers = {
        name: mask
        for name, mask in state.dense_masks.items()
        if name not in state.slower and mask.blocks_kept
    }
    unknown, slower = 0, {}
    convolutions = {
        layer.name
        for name, module in modules.items()
        if dense_kind(module) == "convolution"
        for layer in every_matrix(name, module)
    } & layers.keys()
    if convolutions and state.device.type == "cuda":
        with state.progress.task("timing convolutions"):
            slower = slower_convolutions(state.model, state.dense_masks, state.device, state.model.dtype)
    for name, mask in layers.items():
        prediction = None
        if name in convolutions and state.device.type == "cuda":
            continue
        # Experts are swapped all together, and each works on the tokens that are sent to it: nothing predicts them. A
        # lookup multiplies nothing.
        if name in modules and name not in convolutions and dense_kind(modules[name]) != "embedding":
            prediction = predict(state.device, state.model.dtype, mask.block, mask.shape, mask.density)
        if prediction is None:
            unknown += 1
        elif prediction.slower:
            slower[name] = f"predicted {prediction} here"
    state.slower |= slower
    machine, count = device_name(state.device), len(layers)
    if unknown:
        which = "the" if unknown == count else f"{unknown} of the"
        verb = "bench" if unknown == len(convolutions) else "tune"
        state.note(
            f"nothing like {which} {count} pruned weights was measured on this machine ({machine}), so these are "
            f"packed without knowing whether they run faster; `sparsify {verb}` measures them"
        )
    if slower:
        state.note(
            f"{len(slower)} of {count} pruned weights stay dense, with zeros, because they would run slower "
            f"block-sparse on this machine ({machine}); `dense_where_slower: never` packs them"
        )


def pack(state: State) -> None:
    """Swaps masked layers for block-sparse ones that hold the kept blocks alone; the chosen ones stay dense."""
    masks = {name: mask for name, mask in state.dense_masks.items() if name not in state.slower}
    if not masks:
        return
    with state.progress.task("packing blocks"):
        swap.convert(state.model, masks)
        attach(state.model)
    extra = state.model.config.quantization_config.extra
    packed = swap.sparse_modules(state.model)
    kept = {name: why for name, why in extra.pop(KEPT_DENSE, {}).items() if name not in packed} | state.slower
    if kept:
        extra[KEPT_DENSE] = kept
