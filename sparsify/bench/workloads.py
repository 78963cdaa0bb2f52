"""What a whole model is asked to do: a forward pass, the prefill of a language model, steps of its decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import measure
from sparsify.custom import described
from sparsify.errors import ConfigError
from sparsify.training.samples import MEDIA_TASKS, media_example

FORWARD, PREFILL, DECODE = "forward", "prefill", "decode"
# Decoding steps of one timed call on a GPU: what starting the call costs is shared by them.
STEPS = 8
# Logits of so many elements at most are compared; of longer outputs those of some tokens, evenly spread.
MOST_LOGITS = 1 << 26


@dataclass(frozen=True)
class Workload:
    """One thing to do with a model.

    Attributes:
        what: `forward`, `prefill` (up to the last token's logits) or `decode` (a token more, with its cache).
        batch: Sequences or other samples at once.
        tokens: Of each of them; when decoding, those in the cache already.
        unit: What throughput is counted in, `token` or `sample`.
        inputs: For a model that does not read tokens: its inputs, made for it.
    """

    what: str
    batch: int
    tokens: int
    unit: str = "token"
    inputs: Callable[[nn.Module], dict[str, Tensor]] | None = field(default=None, compare=False)

    @property
    def rows(self) -> int:
        """Tokens that a linear layer sees at once."""
        return self.batch * (1 if self.what == DECODE else self.tokens)

    def __str__(self) -> str:
        if self.unit == "sample":
            return f"{self.what} of {self.batch} {'sample' if self.batch == 1 else 'samples'}"
        if self.what == DECODE:
            sequences = "" if self.batch == 1 else f" of {self.batch} sequences"
            return f"decoding{sequences} after {tokens_said(self.tokens)}"
        return f"{self.what} of {tokens_said(self.tokens, self.batch)}"

    def on(self, model: nn.Module) -> Task:
        """Makes it ready to be run, with random inputs: the same for every model of an architecture.

        Weights of convolutions are put channels last, where they are fastest.
        """
        if self.what == DECODE:
            return _decoding(self, model)
        if self.inputs is not None:
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            inputs = _channels_last(self.inputs(model))
        else:
            inputs = measure.token_inputs(model, self.tokens, self.batch)
            # All ones: without it no model waits for the GPU to find that out.
            del inputs["attention_mask"]
        short, long = _kept_logits(self, model)
        return Task(
            call=partial(_forward, model, inputs | short),
            output=partial(_forward, model, inputs | long),
            units=self.batch * (self.tokens if self.unit == "token" else 1),
        )


@dataclass(frozen=True)
class Task:
    """A workload on a model; runs without gradients.

    Attributes:
        call: What is timed.
        output: Its result, to be checked: `(..., D)` floating point.
        units: Tokens or samples of one call.
        passes: Forward passes of one call.
        state: Tensors that last from call to call: keys and values.
    """

    call: Callable[[], object]
    output: Callable[[], Tensor]
    units: int
    passes: int = 1
    state: Sequence[Tensor] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of `state`."""
        return sum(tensor.nbytes for tensor in self.state)


def workloads(
    model: nn.Module,
    task: str | None,
    tokens: Sequence[int],
    batches: Sequence[int] = (1,),
    sample: dict[str, Tensor] | None = None,
) -> tuple[list[Workload], list[str]]:
    """What can be measured of a model end to end, and in words what cannot.

    Args:
        model: A transformers model.
        task: A recipe's task, not `auto`, or `None`.
        tokens: Tokens of each sequence.
        batches: Sequences or samples at once.
        sample: Inputs of one sample, for a model that does not read tokens.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(getattr(config, "vocab_size", None), int):
        if sample is None:
            return [], [f"end to end is not timed: {type(model).__name__} takes no tokens"]
        positions = measure.positions(model, measure.like_inputs(model, sample, 1))
        return [
            Workload(FORWARD, n, positions, "sample", partial(measure.like_inputs, sample=sample, batch=n))
            for n in sorted(set(batches))
        ], []
    limit = getattr(config, "max_position_embeddings", None) or None
    counts, notes = sorted(set(tokens)), []
    usable = [count for count in counts if limit is None or count <= limit]
    notes += [
        f"end to end is not timed at {tokens_said(count)}: the model takes {limit}"
        for count in counts
        if count not in usable
    ]
    language = task == "causal-lm"
    first = PREFILL if language else FORWARD
    found = [Workload(first, batch, count) for batch in sorted(set(batches)) for count in usable]
    if not language:
        return found, notes
    if not getattr(model, "_can_compile_fullgraph", False):
        return found, [*notes, f"decoding is not timed: {type(model).__name__} takes no cache of fixed size"]
    for batch in sorted(set(batches)):
        found += [Workload(DECODE, batch, n) for n in usable if limit is None or n + STEPS <= limit]
    return found, notes


def given_workloads(
    model: nn.Module, make: Callable[[int], Mapping[str, Tensor]], batches: Sequence[int]
) -> list[Workload]:
    """Forward passes of a plain module.

    Args:
        model: The module.
        make: Gives the keyword arguments of its forward pass for a number of samples.
        batches: Samples at once.

    Raises:
        ConfigError: If these are no keyword arguments, or the model does not take them.
    """
    found = []
    for batch in sorted(set(batches)):
        try:
            inputs = dict(make(batch))
        except Exception as error:  # the user's own code, which may hold any mistake
            raise ConfigError(f"cannot make the inputs of a batch of {batch}: {described(error)}") from error
        ids = [value[0].numel() for value in inputs.values() if _is_ids(value)]
        work = Workload(FORWARD, batch, max(ids, default=1), "sample", partial(_placed, inputs))
        try:
            work.on(model).output()
        except StopIteration:
            raise ConfigError(
                f"{type(model).__name__} puts out no floating-point tensor to compare"
            ) from None
        except Exception as error:
            raise ConfigError(
                f"{type(model).__name__} does not take the inputs: {described(error)}"
            ) from error
        found.append(work)
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point()


def _placed(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Inputs on a model's device and, if floating point, in its dtype."""
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    return {
        name: value.to(parameter if value.is_floating_point() else parameter.device)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }


def sample_inputs(processor: Any, task: str | None) -> dict[str, Tensor] | None:
    """Inputs of one picture or recording; `None` for other tasks, or if nothing prepares them."""
    if task not in MEDIA_TASKS:
        return None
    try:
        return media_example(processor, task)
    except ConfigError:
        return None


def tokens_said(count: int, batch: int = 1) -> str:
    """A number of tokens in words."""
    if batch > 1:
        return f"{batch} x {count} tokens"
    return f"{count} token" if count == 1 else f"{count} tokens"


def _channels_last(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, Tensor) and value.dim() == 4
        else value
        for key, value in inputs.items()
    }


def _steps(device: torch.device) -> int:
    return STEPS if device.type == "cuda" else 1


@torch.no_grad()
def _forward(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first floating-point tensor of a model's output: logits, or the last hidden state."""
    return next(part for part in _tensors(model(**inputs)) if part.is_floating_point())


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, in order, however they are wrapped."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _kept_logits(work: Workload, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that ask for the last token's logits alone, and for as many as can be compared."""
    if work.what != PREFILL or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}, {}
    vocabulary: Any = model.config.vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    most = max(1, MOST_LOGITS // (work.batch * vocabulary))
    if most >= work.tokens:
        return {"logits_to_keep": 1}, {}
    device = next(model.parameters()).device
    places = torch.linspace(0, work.tokens - 1, most, device=device).round().long().unique()
    return {"logits_to_keep": 1}, {"logits_to_keep": places}


@torch.no_grad()
def _decoding(work: Workload, model: Any) -> Task:
    """Steps of decoding, each with one more token in the cache; every call begins where the last one began."""
    from transformers import StaticCache

    ids = measure.token_inputs(model, work.tokens, work.batch)["input_ids"]
    steps = _steps(ids.device)
    cache = StaticCache(config=model.config, max_cache_len=work.tokens + steps)
    filling: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        filling["logits_to_keep"] = 1
    _forward(model, filling)
    inputs = {"input_ids": ids[:, :1].clone(), "past_key_values": cache, "use_cache": True}
    rewind = _rewinder(cache)

    def run(count: int) -> Tensor:
        rewind()
        for _ in range(count - 1):
            _forward(model, inputs)
        return _forward(model, inputs)

    state = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return Task(partial(run, steps), partial(run, 1), work.batch * steps, steps, state)


def _rewinder(cache: Any) -> Callable[[], None]:
    """Puts a cache of fixed size back to where it is now: it counts its tokens in tensors and in numbers."""
    tensors: list[tuple[Tensor, int]] = []
    numbers: list[tuple[Any, str, int]] = []
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if "cumulative_length" in name:
                if isinstance(value, Tensor):
                    tensors.append((value, int(value)))
                else:
                    numbers.append((layer, name, value))

    def rewind() -> None:
        for counter, value in tensors:
            counter.fill_(value)
        for layer, name, value in numbers:
            setattr(layer, name, value)

    return rewind


def positive(name: str, counts: Sequence[int] | str) -> list[int]:
    """Counts from text such as `1,16` or from numbers, sorted.

    Raises:
        ConfigError: If they are not positive whole numbers.
    """
    parts = [part.strip() for part in counts.split(",")] if isinstance(counts, str) else list(counts)
    if not parts or not all(str(part).isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{name}: got {counts!r}, expected positive whole numbers, such as 1,16,256")
    return sorted({int(part) for part in parts})
