"""The file that `sparsify sensitivity` writes and the scope `sensitivity` reads: what each layer's loss costs.

JSON: `settings` (what was measured, how), `loss` (the dense model's), and `layers`, each with its `name`, `shape`,
`block` and `increase`, the rise of the loss at each of `settings.sparsities` when this layer alone is pruned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify.allocation.shares import Curve
from sparsify.errors import ConfigError, OutputError
from sparsify.pruner import PrunableLayer
from sparsify.runtime.workfolder import replace_text

VERSION = 1


@dataclass
class Measured:
    """A measurement, finished or under way.

    Attributes:
        settings: Everything that decides the result; a measurement under other settings is another one.
        loss: The dense model's loss.
        unit: What the loss is.
        layers: One entry for each layer measured so far: `name`, `shape` `[N, K]`, `block`, `increase`.
        left: Number of layers still to be measured.
    """

    settings: dict[str, Any]
    loss: float
    unit: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0

    @property
    def curves(self) -> dict[str, Curve]:
        """Loss increase by sparsity, of each layer by name."""
        sparsities = self.settings["sparsities"]
        return {layer["name"]: dict(zip(sparsities, layer["increase"], strict=True)) for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return {"version": VERSION, **asdict(self)}

    def write(self, file: Path) -> None:
        """Replaces `file` in one step.

        Raises:
            OutputError: If that is impossible.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error.strerror or error}") from error


def read(file: str | Path) -> Measured:
    """Reads a measurement, finished or not.

    Raises:
        ConfigError: If there is none, or it is damaged.
    """
    path = Path(file).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ConfigError(
                f"{file} was written by another version of sparsify: measure again with --force"
            )
        found = Measured(**content)
        values = [float(value) for curve in found.curves.values() for value in curve.values()]
    except FileNotFoundError:
        raise ConfigError(
            f"there is no sensitivity file {file}: `sparsify sensitivity MODEL --data FILE` writes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{file} is not a sensitivity file, or damaged: measure again with --force"
        ) from error
    if not all(math.isfinite(value) for value in values):
        raise ConfigError(f"{file} holds a loss that is no finite number: measure again with --force")
    return found


def curves_for(file: str | Path, layers: Sequence[PrunableLayer]) -> Mapping[str, Curve]:
    """The curves of a finished measurement, which must have covered these layers in their block shape.

    Raises:
        ConfigError: If it did not.
    """
    found = read(file)
    if found.left:
        raise ConfigError(
            f"{file} lacks {found.left} layers still to be measured: run the same `sparsify sensitivity` again to go on"
        )
    known = {layer["name"]: (tuple(layer["shape"]), layer["block"]) for layer in found.layers}
    for layer in layers:
        if layer.name not in known:
            raise ConfigError(
                f"{file} has no layer {layer.name}: it was measured on another model, or with other targets or ignore"
            )
        shape, block = known[layer.name]
        if (shape, block) != (layer.shape, str(layer.block)):
            raise ConfigError(
                f"{file} measured layer {layer.name} as {shape[0]}x{shape[1]} in blocks of {block}, but it is "
                f"{layer.shape[0]}x{layer.shape[1]} in blocks of {layer.block}: measure again with "
                f"--block {layer.block}"
            )
    return found.curves
