"""Class numbers of labels, which may be numbers or words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsify.data.tables import Source, title
from sparsify.errors import DataError


class Classes:
    """The classes of a model.

    Args:
        label2id: Class number of each label, such as `model.config.label2id`; `None` numbers words in sorted order.
        names: All labels of the data, where they are known. They give the classes of a model whose own are only called
            `LABEL_0`, `LABEL_1`, ... their numbers, in sorted order.
        spec: Where the labels are from, for messages.

    Raises:
        DataError: If such data have words for more or fewer classes than the model has.
    """

    def __init__(self, label2id: Mapping[str, int] | None, names: Iterable[Any] | None, spec: Source) -> None:
        words = sorted({str(name) for name in names or () if not _is_number(name)})
        self._spec = spec
        self.numbers = dict(label2id) if label2id else {word: number for number, word in enumerate(words)}
        self._count = max(self.numbers.values(), default=-1) + 1 if label2id else None
        if label2id and _unnamed(label2id) and not set(words) <= label2id.keys():
            if len(words) != len(label2id):
                raise DataError(
                    f"{title(spec)} has {len(words)} labels ({', '.join(words[:5])}{', ...' * (len(words) > 5)}), "
                    f"the model {len(label2id)} classes without names: give data with as many, or put label2id "
                    f"into the model's config.json"
                )
            self.numbers = {word: number for number, word in enumerate(words)}

    def __call__(self, label: Any, row: int) -> int:
        """The class number of a label; `row` counts from 0.

        Raises:
            DataError: If the model has no such class.
        """
        place = f"{title(self._spec)}, row {row + 1}"
        if re.fullmatch(r"-?\d+", str(label)):
            number = int(label)
            if self._count is not None and not 0 <= number < self._count:
                raise DataError(
                    f"{place}: label {number} is out of range; the model has {self._count} classes, from 0 to "
                    f"{self._count - 1}"
                )
            return number
        if str(label) not in self.numbers:
            known = ", ".join(sorted(self.numbers)[:20])
            raise DataError(f"{place}: unknown label {str(label)!r}; the model knows {known}")
        return self.numbers[str(label)]


def number_labels(labels: Iterable[Any], spec: Source) -> dict[str, int]:
    """Class numbers for a head that is made for the labels: words in sorted order; numbers are what they are.

    Raises:
        DataError: If the labels are of fewer than two classes, or are no classes, such as 0.5.
    """
    found = {str(label) for label in labels}
    words = sorted(found - {label for label in found if re.fullmatch(r"\d+", label)})
    odd = next((word for word in words if _is_number(word) or len(words) < len(found)), None)
    if odd is not None:
        raise DataError(
            f"{title(spec)}: label {odd!r} cannot be the name of a class beside numbers, nor a class number: give "
            f"words alone, or whole numbers from 0"
        )
    names = words or [f"LABEL_{number}" for number in range(max(map(int, found), default=-1) + 1)]
    if len(names) < 2:
        raise DataError(f"{title(spec)} has {len(names)} class: a classifier needs at least 2")
    return {name: number for number, name in enumerate(names)}


def class_numbers(labels: Sequence[Any], label2id: Mapping[str, int] | None, spec: Source) -> list[int]:
    """The class numbers of all labels of a source."""
    classes = Classes(label2id, labels, spec)
    return [classes(label, row) for row, label in enumerate(labels)]


def _is_number(label: Any) -> bool:
    try:
        float(label)
    except (TypeError, ValueError):
        return False
    return True


def _unnamed(label2id: Mapping[str, int]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", name) for name in label2id)
