"""The work folder of a run: what finished stages left, so that an interrupted run can go on.

`<out>.work/` holds `state.json`, masks, at most one checkpoint of the weights, and the Trainer's own checkpoints of a
stage in progress. `state.json` is replaced in one step after everything it refers to is on the disk, so at any
moment the folder describes a stage that really finished. A run that succeeds removes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsify.blocks import BlockMask
from sparsify.errors import CheckpointError, ConfigError, OutputError
from sparsify.masking import load_masks, save_masks
from sparsify.recipe.schema import Recipe

STATE_FILE = "state.json"
# What may change between interruption and resumption: where a run computes and writes, and how many samples it takes at
# once, as a run that was too large for its GPU has to. An optimizer step must be of as many samples as before.
_MAY_CHANGE = {"out", "device", "name", "description", "offload"}
_MAY_CHANGE_IN_STAGES = {"batch", "accumulate", "gradient_checkpointing"}


class WorkFolder:
    """One run's work folder.

    Args:
        out: The run's output folder; the work folder is its neighbour.
        recipe: The run's recipe; a folder left by another recipe is not resumed.
    """

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.path = out.with_name(out.name + ".work")
        self._recipe = recipe

    @property
    def exists(self) -> bool:
        """Whether an earlier run left something here to go on from."""
        return (self.path / STATE_FILE).is_file()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the result: the recipe without what may change."""
        settings = self._recipe.model_dump(mode="json", exclude=_MAY_CHANGE)
        for stage in settings["stages"]:
            if stage["stage"] == "finetune":
                stage["samples"] = stage["batch"] * stage["accumulate"]
            for key in _MAY_CHANGE_IN_STAGES & stage.keys():
                del stage[key]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def trainer_folder(self, index: int) -> Path:
        """Folder for the Trainer's checkpoints of the stage at `index`."""
        return self.path / f"{index}-trainer"

    def read(self) -> dict[str, Any]:
        """The last state that `write` stored, or `{}` if no stage had finished.

        Raises:
            ConfigError: If another recipe left the folder.
            CheckpointError: If the state cannot be read.
        """
        file = self.path / STATE_FILE
        if not file.is_file():
            return {}
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            same = state["recipe"] == self.fingerprint
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); start over with --force") from error
        if not same:
            raise ConfigError(
                f"{self.path} was left by a run with other settings; repeat that run's settings to resume it, "
                f"or start over with --force"
            )
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Stores the state in one step, then removes whatever it no longer refers to."""
        self.create()
        text = json.dumps({**state, "recipe": self.fingerprint}, indent=2)
        with self._writing(STATE_FILE):
            replace_text(self.path / STATE_FILE, text)
        wanted = {STATE_FILE, state.get("weights"), state.get("masks"), state.get("trainer")}
        wanted |= {*state.get("teachers", ())}
        for entry in self.path.iterdir():
            if entry.name not in wanted:
                remove(entry)

    def write_masks(self, name: str, masks: Mapping[str, BlockMask]) -> None:
        """Stores masks as `name` (a safetensors file)."""
        self.create()
        fresh = self.path / f"{name}.tmp-{os.getpid()}"
        with self._writing(name):
            save_masks(fresh, masks)
            fresh.replace(self.path / name)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot write {self.path / name}: {reason}; what was stored before is whole: make room on the disk "
                f"and go on with --resume"
            ) from error

    def read_masks(self, name: str) -> dict[str, BlockMask]:
        """Reads what `write_masks` stored."""
        return load_masks(self.path / name)

    def create(self) -> None:
        """Makes the folder.

        Raises:
            OutputError: If that is impossible.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the work folder {self.path}: {error.strerror or error}"
            ) from error

    def remove(self) -> None:
        """Removes the folder and all it holds."""
        remove(self.path)


def last_trainer_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a Trainer in `folder`; a half-written one is passed over."""
    found = []
    for entry in folder.glob("checkpoint-*"):
        step = entry.name.removeprefix("checkpoint-")
        try:
            # The Trainer writes this file last.
            json.loads((entry / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if step.isdecimal():
            found.append((int(step), entry))
    return max(found)[1] if found else None


def replace_text(file: Path, text: str) -> None:
    """Writes a file so that a reader finds either the old text or the new, whole."""
    fresh = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    with fresh.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)


def remove(path: Path) -> None:
    """Removes a file or a folder; one that is gone already is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
