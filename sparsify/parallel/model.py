"""`parallelize`: a model that is whole on every rank becomes this rank's part of it; `whole_state` is the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sparsify.errors import ConfigError
from sparsify.layers.kinds import entry
from sparsify.layers.linear import BlockSparseLinear
from sparsify.layers.packed import PackedModule
from sparsify.layers.swap import replace_module
from sparsify.parallel import collectives
from sparsify.parallel.partition import balanced, contiguous
from sparsify.parallel.plan import Group, groups, style_of
from sparsify.parallel.split import SPLITTABLE, Split, costs, features_of, part_of, step_of, whole_tensors
from sparsify.parallel.vocabulary import VocabularyEmbedding, own_rows

# Rows of a dense output layer that stay together.
_VOCABULARY_ROWS = 8


@dataclass
class Parallelism:
    """How a model is divided.

    Attributes:
        rank: This process's number among those that share the model.
        ranks: How many they are.
        splits: How each divided layer is, by module name.
        whole: Modules that the plan divides but that every rank has whole, with the reason.
        stored: Stored elements of all divided layers on each rank.
        entries: What the checkpoint's configuration says of each block-sparse module of the whole model.
    """

    rank: int
    ranks: int
    group: Any = field(repr=False)
    splits: dict[str, Split] = field(default_factory=dict, repr=False)
    grids: dict[str, tuple[int, int] | None] = field(default_factory=dict, repr=False)
    whole: dict[str, str] = field(default_factory=dict)
    stored: list[float] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: Any) -> Parallelism:
        return self  # process groups cannot be copied, and a copy of the model is divided alike

    def __str__(self) -> str:
        share = self.stored[self.rank] / (sum(self.stored) or 1)
        left = (
            f"; whole on all: {', '.join(f'{name} ({why})' for name, why in self.whole.items())}"
            if self.whole
            else ""
        )
        return (
            f"rank {self.rank} of {self.ranks}: {share:.1%} of the stored weights of {len(self.splits)} divided "
            f"layers{left}"
        )


def parallelism_of(model: nn.Module) -> Parallelism | None:
    """How a model is divided; `None` if it is whole."""
    return getattr(model, "_parallelism", None)


@torch.no_grad()
def parallelize(model: nn.Module, mesh: Any = None, *, plan: Mapping[str, str] | None = None) -> Parallelism:
    """Keeps this rank's part of a model's attention, MLPs and vocabulary, in place; the rest stays whole on every rank.

    Every rank calls it with the same whole model, and then with the same inputs: outputs are the same on all of them,
    and those of the whole model but for the order of summation. Dense and block-sparse layers are divided alike:
    attention by key-value heads with their queries, an equal number for each rank; MLPs by features; each so that the
    *stored* elements of all layers that go together are balanced. Training works: gradients of what every rank has are
    the same on all; a norm of all gradients is not, since each rank has its own part. `save_pretrained`, called on all
    ranks, writes the whole model if it is block-sparse; of a dense one, pass `state_dict=whole_state(model)`.

    Args:
        model: A transformers model with a tensor-parallel plan, such as Llama, Mistral or Qwen3.
        mesh: One-dimensional `DeviceMesh`, or one with a dimension `tp`; all processes by default.
        plan: Module names, `*` for a number -> `colwise` (divided by outputs), `rowwise` (by inputs), for an output
            layer `colwise_gather_output`; the model's own by default.

    Returns:
        What was divided how, and what was not; also kept by the model.

    Raises:
        ConfigError: If the model is divided already, or nothing in it can be.
    """
    if parallelism_of(model) is not None:
        raise ConfigError(
            f"this {type(model).__name__} is divided already: load it whole to divide it otherwise"
        )
    group = _group_of(model, mesh)
    state = Parallelism(distributed.get_rank(group), distributed.get_world_size(group), group)
    own_plan: Mapping[str, str] = (getattr(model, "tp_plan", None) or {}) if plan is None else plan  # pyright: ignore
    found, state.whole = groups(model, own_plan, state.ranks)
    head = _head(model, own_plan)
    if not found and head is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in state.whole.items())
        raise ConfigError(
            f"nothing in {type(model).__name__} can be divided among {state.ranks} ranks: "
            f"{reasons or 'it has no tensor-parallel plan; pass one as plan='}"
        )
    state.entries = {
        name: entry(module) for name, module in model.named_modules() if isinstance(module, PackedModule)
    }
    state.stored = [0.0] * state.ranks
    for each in found:
        _divide_group(model, each, state)
    if head is not None:
        _divide_vocabulary(model, head, state)
    model._parallelism = state  # pyright: ignore[reportArgumentType]
    return state


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the whole model on the CPU, from the parts of all ranks; every rank must call it.

    Raises:
        ConfigError: If the model is not divided.
    """
    state = parallelism_of(model)
    if state is None:
        raise ConfigError(f"this {type(model).__name__} is not divided: it has its whole state_dict()")
    whole = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    # What layers share stays shared.
    known: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for name, split in state.splits.items():
        module = model.get_submodule(name)
        own = {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}
        for key in own:
            del whole[f"{name}.{key}"]
        shared = tuple(id(parameter) for parameter in module.parameters())
        if shared not in known:
            parts: list[Any] = [None] * state.ranks
            distributed.all_gather_object(parts, own, group=state.group)
            known[shared] = whole_tensors(parts, split, state.grids[name])
        whole |= {f"{name}.{key}": tensor for key, tensor in known[shared].items()}
    return whole


def _group_of(model: nn.Module, mesh: Any) -> Any:
    if not distributed.is_available() or not distributed.is_initialized():
        raise ConfigError(
            "several processes are needed: launch with torchrun and call torch.distributed.init_process_group()"
        )
    if mesh is None:
        from torch.distributed.device_mesh import init_device_mesh

        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (distributed.get_world_size(),), mesh_dim_names=("tp",))
    if mesh.ndim > 1:
        if "tp" not in (mesh.mesh_dim_names or ()):
            raise ConfigError(
                f"the mesh has dimensions {mesh.mesh_dim_names}, expected one of them to be `tp`"
            )
        mesh = mesh["tp"]
    return mesh.get_group()


def _divide_group(model: nn.Module, group: Group, state: Parallelism) -> None:
    price = group.costs(model)
    granules = balanced(price, state.ranks, equal_counts=group.equal)
    for rank, own in enumerate(granules):
        state.stored[rank] += sum(price[granule] for granule in own)
    for name, (side, unit) in group.layers.items():
        layer = model.get_submodule(name)
        size, step = features_of(layer, side), step_of(layer, side)
        together = unit * group.granule // step
        steps = tuple(_expanded(own, together, -(-size // step)) for own in granules)
        _replace(model, name, Split(side, size, step, steps), state)
    processes = state.group
    module = model.get_submodule(group.module)

    def enter(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if inputs:
            return (collectives.replicated(inputs[0], processes), *inputs[1:]), named
        first = "hidden_states" if "hidden_states" in named else next(iter(named))
        return inputs, {**named, first: collectives.replicated(named[first], processes)}

    module.register_forward_pre_hook(enter, with_kwargs=True)
    for name, (side, _) in group.layers.items():
        if side == "inputs":
            hook: Any = lambda _, __, y: collectives.summed(y, processes)  # noqa: E731
            model.get_submodule(name).register_forward_hook(hook)
    for name in group.inner:
        model.get_parameter(name).register_hook(lambda gradient: _sum(gradient, processes))


def _sum(gradient: Tensor, group: Any) -> Tensor:
    gradient = gradient.clone()
    distributed.all_reduce(gradient, group=group)
    return gradient


def _expanded(granules: list[int], together: int, count: int) -> Tensor:
    """The steps of granules of `together` steps each; the last one may be shorter."""
    steps = (torch.tensor(granules)[:, None] * together + torch.arange(together)).flatten()
    return steps[steps < count]


def _replace(model: nn.Module, name: str, split: Split, state: Parallelism) -> None:
    layer = model.get_submodule(name)
    state.grids[name] = layer.packed["weight"].grid if isinstance(layer, BlockSparseLinear) else None
    state.splits[name] = split
    replace_module(model, name, part_of(layer, split, state.rank))


def _head(model: nn.Module, plan: Mapping[str, str]) -> str | None:
    """Name of the output layer, if the plan divides it and it can be."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if type(output) not in SPLITTABLE:
        return None
    assert isinstance(output, SPLITTABLE)
    name = next(name for name, module in model.named_modules() if module is output)
    style = style_of(name, plan) or ""
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    tied = getattr(embedding, "weight", None) is output.weight
    if not style.startswith("colwise") or (tied and type(embedding) is not nn.Embedding):
        return None
    return name


def _divide_vocabulary(model: nn.Module, name: str, state: Parallelism) -> None:
    output: Any = model.get_submodule(name)
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    tied = embedding.weight is output.weight
    size, step = output.out_features, step_of(output, "outputs")
    together = 1 if step > 1 else _VOCABULARY_ROWS
    price = costs(output, "outputs", step * together).tolist()
    if len(price) < state.ranks:
        state.whole[name] = f"a vocabulary of {size} cannot be divided among {state.ranks} ranks"
        return
    granules = contiguous(price, state.ranks)
    for rank, own in enumerate(granules):
        state.stored[rank] += sum(price[granule] for granule in own)
    steps = tuple(_expanded(own, together, -(-size // step)) for own in granules)
    split = Split("outputs", size, step, steps)
    _replace(model, name, split, state)
    part: Any = model.get_submodule(name)
    processes, widths = state.group, split.widths()
    part.register_forward_pre_hook(
        lambda _, inputs: (collectives.replicated(inputs[0], processes), *inputs[1:])
    )
    part.register_forward_hook(lambda _, __, y: collectives.joined(y, widths, processes))
    if type(embedding) is not nn.Embedding or embedding.num_embeddings != size:
        return
    tokens = split.features(state.rank)
    weight = part.weight if tied else own_rows(embedding, tokens)
    embedding_name = next(key for key, module in model.named_modules() if module is embedding)
    # Tokens are rows of both, though not in blocks here.
    rows = tuple(split.features(rank) for rank in range(state.ranks))
    state.splits[embedding_name], state.grids[embedding_name] = Split("outputs", size, 1, rows), None
    replace_module(model, embedding_name, VocabularyEmbedding(embedding, weight, int(tokens[0]), processes))
