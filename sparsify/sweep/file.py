"""The file of a sweep, row by row; and what it says: the fronts, the best choices, as a table and as a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsify import plots_speed
from sparsify.errors import ConfigError, OutputError
from sparsify.runtime.workfolder import replace_text
from sparsify.sweep import front

VERSION = 1
# Of what `sparsify.quality` gives, the number that counts, and its name in a table.
METRICS = {"perplexity": "perplexity", "accuracy": "accuracy, %", "spearman": "Spearman x 100"}


@dataclass
class Swept:
    """A sweep, finished or under way.

    Attributes:
        settings: Everything that decides a row but its block shape and sparsity.
        environment: Machine, versions and command.
        dense: `quality` and `bytes` of the dense model.
        max_loss: For the best choice; see `front.best`.
        rows: One entry for each model measured: `block`, `sparsity` (asked for), `removed` (of the pruned weights),
            `quality`, `loss` (see `front.Trade`), `bytes`, `times` (by workload: `dense_us`, `sparse_us`,
            `speedup`, `timing`, `rounds`, `error`), `kept_dense` (layers left dense because they would be slower),
            `notes`, `seconds` (of pruning).
        left: Pairs still to be measured.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    dense: dict[str, Any]
    max_loss: float | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0

    @property
    def metric(self) -> str:
        """Name of the number in `quality` that counts."""
        return next(name for name in METRICS if name in self.dense["quality"])

    @property
    def works(self) -> list[str]:
        """The workloads, in words."""
        return list(self.settings["workloads"])

    def quality(self, row: dict[str, Any]) -> float:
        """The number that counts of a row, or of `dense`."""
        return row["quality"][self.metric]

    def trades(self, work: str) -> list[front.Trade]:
        """Speed for quality, of each row."""
        dense = self.quality(self.dense)
        return [
            front.trade(row["times"][work]["speedup"], self.metric, self.quality(row), dense)
            for row in self.rows
        ]

    def front(self, work: str) -> list[int]:
        """Positions of the rows on a workload's front, slowest first."""
        return front.front(self.trades(work))

    def best(self, work: str) -> int | None:
        """Position of the row to choose for a workload."""
        return front.best(self.trades(work), self.max_loss)

    def to_dict(self) -> dict[str, Any]:
        """The sweep as JSON values, with what follows from its rows: `rule`, `front` and `best` by workload."""
        named = [{"block": row["block"], "sparsity": row["sparsity"]} for row in self.rows]
        fronts = {work: [named[index] for index in self.front(work)] for work in self.works}
        chosen = {work: self.best(work) for work in self.works}
        return {
            "version": VERSION,
            **asdict(self),
            "rule": front.rule(self.max_loss, self.metric),
            "front": fronts,
            "best": {work: None if index is None else named[index] for work, index in chosen.items()},
        }

    def write(self, file: Path) -> None:
        """Replaces `file`, JSON, in one step.

        Raises:
            OutputError: If that is impossible.
        """
        _replace(file, json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: fastest first by the first workload; `front` and `best` say for which workloads."""
        loss = "more" if self.metric == "perplexity" else "lost"
        number = {work: index + 1 for index, work in enumerate(self.works)}
        several = len(self.works) > 1
        titles = [f"{number[work]}: {work}" if several else work for work in self.works]
        header = ["block", "removed", METRICS[self.metric], loss, *titles, "weights MB", ""]
        fronts = {work: self.front(work) for work in self.works}
        chosen = {work: self.best(work) for work in self.works}
        unit = "%" if self.metric == "perplexity" else ""
        rows = []
        for index, row in enumerate(self.rows):
            marks = []
            for name, found in (
                ("best", [w for w in self.works if chosen[w] == index]),
                ("front", [w for w in self.works if index in fronts[w] and chosen[w] != index]),
            ):
                if found:
                    where = f" {','.join(str(number[work]) for work in found)}" if several else ""
                    marks.append(f"{name}{where}")
            times = [f"{row['times'][work]['speedup']:.2f}x" for work in self.works]
            quality, cost = f"{self.quality(row):.4g}", f"{row['loss']:.1f}{unit}"
            memory = f"{row['bytes'] / 1e6:.2f}"
            rows.append(
                [row["block"], f"{row['removed']:.1%}", quality, cost, *times, memory, "; ".join(marks)]
            )
        order = sorted(range(len(rows)), key=lambda i: -self.rows[i]["times"][self.works[0]]["speedup"])
        dense = [
            "dense", "0%", f"{self.quality(self.dense):.4g}", f"0{unit}", *("1.00x" for _ in self.works),
            f"{self.dense['bytes'] / 1e6:.2f}", "",
        ]  # fmt: skip
        return header, [dense, *(rows[index] for index in order)]

    def closing(self) -> list[str]:
        """What was measured on what, and the choice for each workload, in words."""
        settings, chosen = self.settings, {work: self.best(work) for work in self.works}
        lines = [
            f"{self.metric} on {settings['evaluated_on']}; speed beside dense on {settings['device']}, "
            f"{settings['dtype']}"
        ]
        for work, index in chosen.items():
            if index is None:
                lines.append(f"no best choice for {work}: {self._why_none(work)}")
                continue
            row = self.rows[index]
            lines.append(
                f"best for {work}: {row['block']} at {row['sparsity']:.0%}, {row['times'][work]['speedup']:.2f}x, "
                f"{self.metric} {self.quality(row):.4g} (dense {self.quality(self.dense):.4g})"
            )
        if any(index is not None for index in chosen.values()):
            lines.append(f"the choice is {front.rule(self.max_loss, self.metric)}")
        return lines

    def _why_none(self, work: str) -> str:
        if not self.front(work):
            return "nothing is faster than dense here, leave the model dense"
        if self.max_loss is not None:
            return f"nothing that is faster loses at most {self.max_loss:g}"
        return "the front has no knee, set --max-loss to what may be lost"

    def write_page(self, file: Path) -> None:
        """Replaces `file`, Markdown: machine, command, picture, table, choice.

        Raises:
            OutputError: If that is impossible.
        """
        place, versions = self.environment, self.environment["versions"]
        machine = ", ".join([*(place["gpu"] or [place["cpu"]]), f"torch {versions['torch']}"])
        header, rows = self.table()
        lines = [
            f"# {self.settings['model']}: quality against measured speed",
            "",
            f"`{place['command']}`",
            "",
        ]
        lines += [f"{machine}. {self.closing()[0]}.", "", "![the front](sweep.png)", ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
        lines += ["", *(f"- {line}" for line in self.closing()[1:])]
        _replace(file, "\n".join(lines) + "\n")

    def draw(self, file: Path) -> Path:
        """Draws quality against speed, a panel a workload.

        Raises:
            OutputError: If the picture cannot be written.
        """
        points = [
            {work: self._point(row, work) for work in self.works}
            for row in self.rows
        ]  # fmt: skip
        panels = {}
        for work in self.works:
            chosen = self.best(work)
            panels[work] = (
                [point[work] for point in points],
                [points[index][work] for index in self.front(work)],
                None if chosen is None else points[chosen][work],
            )
        try:
            return plots_speed.tradeoff(
                panels,
                file,
                quality=METRICS[self.metric],
                dense=self.quality(self.dense),
                log=self.metric == "perplexity",
            )
        except OSError as error:
            raise OutputError(f"cannot write {file}: {error.strerror or error}") from error

    def _point(self, row: dict[str, Any], work: str) -> plots_speed.Point:
        speedup = row["times"][work]["speedup"]
        return plots_speed.Point(row["block"], row["sparsity"], speedup, self.quality(row))


def _replace(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error


def read(file: Path) -> Swept:
    """Reads a sweep, finished or not.

    Raises:
        ConfigError: If it is damaged, or of another version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ConfigError(f"{file} was written by another version of sparsify: start over with --force")
        for key in ("rule", "front", "best"):
            content.pop(key)
        found = Swept(**content)
        found.to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} is no sweep, or damaged: start over with --force") from error
    return found
