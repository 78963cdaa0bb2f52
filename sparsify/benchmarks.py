"""Public benchmarks of language models, by EleutherAI's lm-evaluation-harness (`lm-eval`), which is optional.

A benchmark is one of its tasks or groups by name (`lm-eval ls tasks` lists them), or a task of one's own, a YAML file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from sparsify.errors import ConfigError, DataError

# Value and standard error, `None` where lm-eval knows none, by benchmark and metric: `{"arc_easy acc": (0.52, 0.01)}`.
Scores: TypeAlias = dict[str, tuple[float, float | None]]


GENERATING = ("causal-lm", "seq2seq")


@dataclass(frozen=True)
class Questions:
    """Which benchmarks to run, and how much of them.

    Attributes:
        names: Tasks or groups of lm-eval, or paths of task files.
        shots: Worked examples before each question; `None` for each benchmark's own number.
        limit: Questions of each benchmark, the first ones; `None` for all.
    """

    names: Sequence[str] = ()
    shots: int | None = None
    limit: int | None = None


def check(names: Sequence[str], task: str | None = "auto") -> None:
    """Says what stands in the way of running benchmarks, before any weight is loaded.

    Args:
        names: Benchmarks.
        task: What the models are for, as a recipe says it; `auto` if that is not known yet.

    Raises:
        ConfigError: If lm-eval is not installed, the model generates no text, or a benchmark is unknown.
    """
    if not names:
        return
    if task not in ("auto", *GENERATING):
        raise ConfigError(
            f"benchmarks are for models that generate text ({', '.join(GENERATING)}), not for {task or 'others'}"
        )
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise ConfigError(f"unknown benchmark {name!r}: there is no such file")
    named = [name for name in names if name not in files]
    known = _manager(bool(named)).task_index
    for name in named:
        if name not in known:
            raise ConfigError(
                f"unknown benchmark {name!r}: no task of lm-eval (`lm-eval ls tasks` lists them)"
            )


def run(
    model: Any,
    tokenizer: Any,
    questions: Questions,
    *,
    batch: int = 8,
    seed: int = 0,
) -> Scores:
    """Runs benchmarks on one model.

    Args:
        model: A transformers model that generates text, on its device.
        tokenizer: Its tokenizer.
        questions: Benchmarks that `check` has passed.
        batch: Requests in one forward pass.
        seed: Chooses the worked examples.

    Returns:
        All metrics that lm-eval reports for what was asked, in lm-eval's own units.

    Raises:
        DataError: If a benchmark's data cannot be read or a benchmark refuses to run.
    """
    import lm_eval
    from lm_eval.models import huggingface

    harness: Any = lm_eval  # its decorators hide the signatures
    contestants: Any = huggingface
    try:
        found: Any = harness.simple_evaluate(
            contestants.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(questions.names),
            task_manager=_manager(not all(name.endswith((".yaml", ".yml")) for name in questions.names)),
            num_fewshot=questions.shots,
            limit=questions.limit,
            log_samples=False,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"benchmarks {', '.join(questions.names)}: {type(error).__name__}: {reason}"
        ) from error
    results: Mapping[str, Mapping[str, Any]] = (found or {})["results"]
    groups = (found or {}).get("group_subtasks") or {}
    inner = {task for name, tasks in groups.items() for task in tasks if name in results}
    return {
        f"{task} {metric.partition(',')[0]}": (float(value), _error(values, metric))
        for task, values in results.items()
        if task not in inner
        for metric, value in values.items()
        if isinstance(value, float) and "_stderr" not in metric
    }


def _error(values: Mapping[str, Any], metric: str) -> float | None:
    name, comma, kind = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{kind}")
    return error if isinstance(error, float) else None


@cache
def _manager(public: bool) -> Any:
    """Knows tasks by name; the `public` ones are thousands of files, which takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("benchmarks are run by lm-eval: pip install 'block-sparsify[eval]'") from error
    return TaskManager(include_defaults=public)
