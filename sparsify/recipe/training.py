"""Sections of a recipe's `finetune` stage: a teacher to learn from, and adapters instead of whole weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

TeacherMemory: TypeAlias = Literal["device", "offload", "cpu", "cache"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Patterns: TypeAlias = Annotated[list[str], BeforeValidator(_as_list)]


class Strict(BaseModel):
    """Base of every section: unknown keys are faults, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Distill(Strict):
    """Learning from a dense teacher; the loss is the weighted sum of the task's own and up to three distances.

    Attributes:
        teacher: Checkpoint of the teacher; when left out the recipe's own dense model, as stages without a teacher
            before the first pruning have trained it.
        teacher_dtype: Dtype of its weights; `auto` takes bfloat16 on a GPU that has it, else the checkpoint's.
        teacher_memory: Where the teacher is: on the training's `device`; there only while it runs (`offload`); on the
            `cpu`, where it runs too; or nowhere, since its outputs were computed before the first step (`cache`).
        task: Weight of the task's own loss; with 0 sentences need no scores.
        logits: Weight of the divergence between the two distributions; 1 where the task has logits when left out.
        temperature: Softens both distributions of that divergence.
        hidden: Weight of the normalised distance between hidden states, each layer's.
        embedding: Weight of the distance between sentence embeddings; 1 for such encoders when left out, else 0.
    """

    teacher: str | None = None
    teacher_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    teacher_memory: TeacherMemory = "device"
    task: float = Field(default=1.0, ge=0)
    logits: float | None = Field(default=None, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    hidden: float = Field(default=1.0, ge=0)
    embedding: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _some_term(self) -> Distill:
        if self.hidden == 0 and self.logits == 0 and self.embedding == 0:
            raise ValueError(
                "logits, hidden and embedding are all 0, so there is nothing to learn from the teacher"
            )
        return self


class Lora(Strict):
    """Training low-rank updates of the stored blocks, and nothing else; they are merged into the blocks at the end.

    Attributes:
        rank: Rank of an update.
        alpha: The update counts `alpha / rank`.
        dropout: Share of a layer's inputs that the update does not see.
        targets: Block-sparse layers to update, by exact name, `re:` pattern or last part of the name; all when left
            out.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Patterns | None = None
