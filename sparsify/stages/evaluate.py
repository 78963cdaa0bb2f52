"""Measuring a model: quality on held-out data, size, memory, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, TypeAlias

from torch import Tensor, nn

from sparsify import benchmarks, measure, quality
from sparsify.benchmarks import Questions
from sparsify.checkpoint.reader import TASKS
from sparsify.checkpoint.writer import weight_bytes
from sparsify.data.spec import (
    Source,
    causal_blocks,
    classification_samples,
    masked_blocks,
    sentence_pairs,
    target_samples,
)
from sparsify.errors import ConfigError
from sparsify.layers.swap import sparse_modules
from sparsify.recipe.schema import EvaluateStage
from sparsify.runtime.progress import Progress
from sparsify.stages.state import State
from sparsify.training.samples import (
    MEDIA_TASKS,
    check_length,
    media_example,
    media_samples,
    need_tokenizer,
    set_padding,
    target_collator,
)

# Quality of a model, with a label for the progress.
Judge: TypeAlias = Callable[[nn.Module, str], dict[str, float]]


def run(stage: EvaluateStage, state: State) -> None:
    """Adds one column of measurements to the state."""
    label = stage.label or ("dense" if not state.masks else "recovered" if state.trained else "pruned")
    spec = state.recipe.data.eval
    if spec is None:
        state.note(f"evaluate {label}: the recipe has no data.eval, so quality is not measured")
    columns, skipped = evaluate_models(
        {label: state.model},
        state.processor,
        spec,
        state.task,
        latency_tokens=stage.latency_tokens,
        latency_batches=stage.latency_batches,
        batch=stage.batch,
        questions=Questions(stage.benchmarks, stage.shots, stage.limit),
        seed=state.recipe.seed,
        progress=state.progress,
    )
    for reason in skipped:
        state.note(f"evaluate {label}: {reason}")
    state.columns |= columns


def evaluate_models(
    models: Mapping[str, nn.Module],
    processor: Any,
    spec: Source | None,
    task: str | None,
    *,
    latency_tokens: Sequence[int] = (1, 256),
    latency_batches: Sequence[int] = (1,),
    batch: int = 8,
    questions: Questions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Measures models side by side; their latencies are taken in turns.

    Args:
        models: Models by label, all on one device.
        processor: Their tokenizer.
        spec: Held-out data; `None` leaves quality out.
        task: A recipe's task, not `auto`; `None` for a model of no task that can be scored.
        latency_tokens: Token counts of each sequence in a forward pass. A model of pictures or recordings is measured
            with one picture or a second of sound instead, and the count is that of its own tokens; none for none.
        latency_batches: How many such sequences a forward pass takes; each size is measured.
        batch: Samples in one forward pass of the quality measurement.
        questions: Public benchmarks to run, if any.
        seed: Chooses hidden tokens and the random tokens of the latency measurement.
        progress: Told about every batch.

    Returns:
        For each label `quality` (see `sparsify.quality`; only with data), `benchmarks` (only if asked for; see
        `sparsify.benchmarks`), `parameters`, `bytes` (of the weights on
        disk), `peak_memory` (bytes, a forward pass of one sequence of the largest token count), `latency` (seconds of
        one sequence by token count) and `latency_batches` (the same of several sequences, by their number); and in
        words what could not be measured, and where a block-sparse model is slower than a dense one.

    Raises:
        ConfigError: If there is data but no task or tokenizer to read it with.
        DataError: If the data cannot be read.
    """
    progress = progress or Progress()
    columns: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        columns[label] = {"parameters": measure.parameter_count(model), "bytes": weight_bytes(model)}
        if spec is not None:
            of = judge(model, processor, spec, task, batch, seed, progress)
            columns[label]["quality"] = of(model, label)
        if questions is not None and questions.names:
            with progress.task(f"running benchmarks on {label}"):
                columns[label]["benchmarks"] = benchmarks.run(
                    model, processor, questions, batch=batch, seed=seed
                )
    first = next(iter(models.values()))
    if task in MEDIA_TASKS and latency_tokens:
        made, skipped = _media_inputs(first, processor, task, seed)
    else:
        counts, skipped = _usable_counts(first, task, latency_tokens)
        made = {count: partial(measure.token_inputs, first, count, seed=seed) for count in counts}
    if made:
        sizes = sorted(set(latency_batches))
        with progress.task("measuring latency", len(made) * len(sizes)) as advance:
            for size, count in product(sizes, made):
                for label, seconds in measure.compare_latency(models, made[count](batch=size)).items():
                    column = columns[label]
                    if size > 1:
                        column = column.setdefault("latency_batches", {})
                    column.setdefault("latency" if size == 1 else str(size), {})[str(count)] = seconds
                advance()
        inputs = made[max(made)](batch=1)
        for label, model in models.items():
            columns[label]["peak_memory"] = measure.peak_memory_forward(model, inputs)
    return columns, skipped + _slower(models, columns)


def _slower(models: Mapping[str, nn.Module], columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says where a block-sparse model is slower than the dense one that was timed in turns with it."""
    dense = next((label for label, model in models.items() if not sparse_modules(model)), None)
    notes = []
    for label in models:
        if dense is None or label == dense or not sparse_modules(models[label]):
            continue
        reference = columns[dense].get("latency", {})
        lost = [
            count
            for count, seconds in columns[label].get("latency", {}).items()
            if seconds > reference[count]
        ]
        if lost:
            notes.append(
                f"{label} is slower than {dense} at {' and '.join(lost)} token{'s' * (lost != ['1'])}; "
                f"`sparsify bench` shows which layers lose"
            )
    return notes


def _media_inputs(
    model: nn.Module, processor: Any, task: str, seed: int
) -> tuple[dict[int, Callable[..., dict[str, Tensor]]], list[str]]:
    """Makes random pictures or recordings, by the tokens that the model makes of one; and why there are none."""
    try:
        sample = media_example(processor, task)
    except ConfigError as error:
        return {}, [f"latency and peak memory are not measured: {error}"]
    count = measure.positions(model, measure.like_inputs(model, sample, 1, seed))
    return {count: lambda batch: measure.like_inputs(model, sample, batch, seed)}, []


def _usable_counts(model: nn.Module, task: str | None, counts: Sequence[int]) -> tuple[list[int], list[str]]:
    """Token counts that the model can take, and why others are left out."""
    if task is None:
        return [], [
            f"{type(model).__name__} is no text model, so latency and peak memory are not measured"
        ] if counts else []
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    usable = [count for count in counts if limit is None or count <= limit]
    left_out = sorted(set(counts) - set(usable))
    return usable, [
        f"latency at {count} tokens is not measured: the model takes {limit}" for count in left_out
    ]


def judge(
    model: nn.Module,
    processor: Any,
    spec: Source,
    task: str | None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Judge:
    """Reads held-out data, once, and gives what measures the quality of a model with them.

    Args:
        model: A model of the task: the one to judge, or one that has its processor and classes.
        processor: Its tokenizer, image processor or feature extractor.
        spec: Held-out data.
        task: A recipe's task, not `auto`.
        batch: Samples in one forward pass.
        seed: Chooses hidden tokens.
        progress: Told about every batch.

    Returns:
        A function of a model and a label for the progress, which gives what `sparsify.quality` does.

    Raises:
        ConfigError: If there is no task, or no tokenizer to read the data with.
        DataError: If the data cannot be read.
    """
    progress = progress or Progress()
    if task is None:
        raise ConfigError(
            f"{type(model).__name__} is of no task whose quality can be measured ({', '.join(TASKS)}); leave out the "
            f"evaluation data, or set the task"
        )

    def read(function: Callable[..., Any], *arguments: Any) -> Any:
        with progress.task("reading evaluation data"):
            return function(*arguments)

    def judged(measured: Callable[..., dict[str, float]], samples: int) -> Judge:
        def of(contestant: nn.Module, label: str) -> dict[str, float]:
            with _follow(progress, label, samples) as done:
                return measured(contestant, batch=batch, progress=done)

        return of

    if task in MEDIA_TASKS:
        samples = read(media_samples, spec, processor, model, task)
        rows, collate = samples.dataset, samples.collate
        return judged(lambda m, **given: quality.class_accuracy(m, rows, collate, **given), len(rows))
    need_tokenizer(processor, task)
    if task == "seq2seq":
        set_padding(model, processor)
        dataset, collate = read(target_samples, spec, processor), target_collator(processor, model)
        return judged(
            lambda m, **given: quality.target_perplexity(m, dataset, collate, **given), len(dataset)
        )
    if task == "causal-lm":
        dataset = read(causal_blocks, spec, processor)
        check_length(spec, model)
        return judged(lambda m, **given: quality.perplexity(m, dataset, **given), len(dataset))
    if task == "masked-lm":
        if processor.mask_token_id is None:
            raise ConfigError("the tokenizer has no mask token, which a masked-lm evaluation needs")
        dataset = read(masked_blocks, spec, processor)
        check_length(spec, model)
        mask = processor.mask_token_id
        return judged(
            lambda m, **given: quality.masked_perplexity(m, dataset, mask, seed=seed, **given), len(dataset)
        )
    if task == "sequence-classification":
        config = set_padding(model, processor)
        dataset = read(classification_samples, spec, processor, config.label2id)
        return judged(lambda m, **given: quality.accuracy(m, dataset, processor, **given), len(dataset))
    dataset = read(sentence_pairs, spec)
    length = spec.length
    return judged(
        lambda m, **given: quality.similarity(m, dataset, processor, length=length, **given), 2 * len(dataset)
    )


class _follow:
    """Turns counts of samples done into steps of a progress task."""

    def __init__(self, progress: Progress, label: str, total: int) -> None:
        self._task = progress.task(f"evaluating {label}", total)
        self._done = 0

    def __enter__(self) -> Callable[[int], None]:
        self._advance = self._task.__enter__()
        return self._update

    def __exit__(self, *error: Any) -> None:
        self._task.__exit__(*error)

    def _update(self, done: int) -> None:
        self._advance(done - self._done)
        self._done = done
