"""What can be wrong with a recipe, in words that say how to put it right."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sparsify.recipe.file import Place, RecipeText, nearest

# Arguments of the Trainer that a finetune stage decides by itself, and the key to write instead where there is one.
OWN_ARGUMENTS = {
    "output_dir": "out",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "lr_scheduler_type": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "seed": "seed",
    "use_cpu": "device",
    **dict.fromkeys(
        (
            "data_seed",
            "disable_tqdm",
            "eval_strategy",
            "label_names",
            "load_best_model_at_end",
            "push_to_hub",
        ),
        "",
    ),
    **dict.fromkeys(
        ("logging_nan_inf_filter", "remove_unused_columns", "resume_from_checkpoint", "save_only_model"), ""
    ),
    "save_total_limit": "",
}
STAGES = ("calibrate", "prune", "finetune", "convert", "evaluate", "report")


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe: where it is, and what is wrong there."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place))}: {self.message}" if self.place else self.message


def describe(faults: Sequence[Fault], text: RecipeText | None) -> str:
    """All faults as one message: on one line if there is one fault, else one line each, in the file's order."""
    origin = f"{text.origin}: " if text else ""

    def line(fault: Fault) -> int:
        return (text.line(fault.place) if text else None) or 0

    lines = [
        f"line {line(fault)}: {fault}" if line(fault) else str(fault) for fault in sorted(faults, key=line)
    ]
    lines = list(dict.fromkeys(lines))
    if len(lines) == 1:
        return f"{origin}{lines[0]}"
    return f"{origin}{len(lines)} faults\n" + "\n".join(f"  {line}" for line in lines)


def from_pydantic(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """Translates pydantic's errors about data for `model`."""
    return [Fault(_place(item["loc"]), _message(item, model)) for item in error.errors()]


def _place(loc: tuple[str | int, ...]) -> Place:
    """Drops the union tag that pydantic puts behind a stage's position."""
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGES:
        return (*loc[:2], *loc[3:])
    return loc


def _message(item: Any, model: type[BaseModel]) -> str:
    kind, got, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{nearest(item['loc'][-1], _known_keys(item['loc'][:-1], model))}"
    if kind == "missing":
        return "is missing"
    if kind == "union_tag_not_found":
        return f"a stage needs a `stage:` key, one of {', '.join(STAGES)}"
    if kind == "union_tag_invalid":
        return f"unknown stage {context['tag']!r}{nearest(context['tag'], STAGES)}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        return f"got {got!r}, expected {expected}"
    if kind == "value_error":
        return str(context["error"])
    return f"got {got!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _known_keys(loc: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    """Keys of the section at `loc`."""
    sections = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        tagged = [section for section in sections if part in _tag(section)]
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = tagged or [found for field in fields for found in _sections(field.annotation)]
    return sorted({key for section in sections for key in section.model_fields})


def _tag(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("stage")
    return get_args(field.annotation) if field else ()


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def check_trainer_arguments(given: Mapping[str, Any]) -> None:
    """Refuses what `transformers.TrainingArguments` does not know, and what a finetune stage decides by itself.

    Raises:
        ValueError: Naming the argument.
    """
    if not given:
        return
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)} - set(OWN_ARGUMENTS)
    for key in given:
        if OWN_ARGUMENTS.get(key):
            raise ValueError(f"{key} is set by the recipe's key `{OWN_ARGUMENTS[key]}`; use that one")
        if key in OWN_ARGUMENTS:
            raise ValueError(f"{key} cannot be changed: the stage depends on its own value")
        if key not in known:
            close = nearest(key, known) if difflib.get_close_matches(key, known, n=1) else ""
            raise ValueError(f"transformers.TrainingArguments has no {key!r}{close}")


def order_faults(data: Mapping[str, Any]) -> list[Fault]:
    """Faults between stages, and between stages and data, of a recipe that may have other faults as well."""
    listed = data.get("stages")
    stages = (
        [stage if isinstance(stage, Mapping) else {} for stage in listed] if isinstance(listed, list) else []
    )
    sources = data.get("data")
    sources = sources if isinstance(sources, Mapping) else {}
    faults: list[Fault] = []

    def fault(index: int, message: str, *key: str) -> None:
        faults.append(Fault(("stages", index, *key), message))

    for kind, source in sources.items():
        if kind != "train" and isinstance(source, Mapping) and source.get("stream"):
            faults.append(
                Fault(
                    ("data", kind, "stream"), "is for data.train; give `samples` to read a part of the data"
                )
            )
    names = [stage.get("stage") for stage in stages]
    prunes = [stage.get("stage") == "prune" or stage.get("pruner") is not None for stage in stages]
    packed = trained = False
    for index, (stage, name) in enumerate(zip(stages, names, strict=True)):
        if prunes[index] and packed:
            fault(
                index,
                "nothing can be pruned once the weights are packed; move this stage before the conversion",
            )
        if stage.get("reconstruct") and "calibrate" not in names[:index]:
            fault(index, "reconstruct needs a calibrate stage before it (--data)", "reconstruct")
        if name == "calibrate":
            if not any(prunes[index + 1 :]):
                fault(index, "no later stage prunes, so nothing would use the statistics")
            if not sources.get("calibration"):
                fault(index, "calibrate needs data.calibration")
        if name == "finetune":
            if not sources.get("train"):
                fault(index, "finetune needs data.train")
            distill = stage.get("distill")
            untaught = isinstance(distill, Mapping) and not distill.get("teacher")
            if data.get("from_scratch") is True and untaught and not trained:
                fault(
                    index,
                    "the recipe's model begins with random weights (from_scratch), so it cannot teach: name a "
                    "trained checkpoint as `teacher`, or train it in a finetune stage before the first pruning",
                    "distill",
                )
            some = stage.get("steps") not in (0, None) or stage.get("epochs") not in (0, None)
            trained = trained or (some and distill is None and not any(prunes[: index + 1]))
            train = sources.get("train")
            if isinstance(train, Mapping) and train.get("stream") and stage.get("steps") is None:
                fault(index, "data.train is streamed, so its length is not known: give `steps`, not `epochs`")
            packed = _heal_faults(stages, index, packed, any(prunes[:index]), fault) or packed
        if name == "convert":
            if not any(prunes[:index]):
                fault(index, "there is nothing to convert: no earlier stage prunes")
            if "convert" in names[:index]:
                fault(index, "the model is converted already; a recipe has at most one convert stage")
            packed = packed or stage.get("format", "block_sparse") != "dense"
        if name == "report" and index != len(stages) - 1:
            fault(index, "report must be the last stage")
    return faults


def _heal_faults(stages: list[Mapping[str, Any]], index: int, packed: bool, pruned: bool, fault: Any) -> bool:
    """Judges `heal` of one finetune stage; returns whether the stage surely packs the weights."""
    heal = stages[index].get("heal", "auto")
    later_dense = any(
        stage.get("stage") == "convert" and stage.get("format") == "dense" for stage in stages[index:]
    )
    if stages[index].get("lora") is not None:
        if stages[index].get("pruner") is not None:
            fault(index, "lora trains packed blocks, which a stage with a pruner does not have yet", "lora")
            return False
        if heal == "masked":
            fault(index, "lora trains packed blocks; leave `heal` out", "heal")
        heal = "packed"
        if not pruned:  # of a block-sparse source, or there is nothing to train
            return False
    if stages[index].get("pruner") is not None:
        if heal != "auto":
            fault(index, "a stage with a pruner searches the mask and cannot heal; leave `heal` out", "heal")
        return False
    if heal == "masked" and packed:
        fault(
            index, "the weights are packed before this stage, so they cannot be trained under a mask", "heal"
        )
    if heal == "packed" and not pruned and not packed:
        fault(index, "there are no blocks to pack yet: no earlier stage prunes", "heal")
    if heal == "packed" and later_dense:
        fault(index, "a later stage converts to dense weights; heal masked instead", "heal")
    return heal == "packed"
