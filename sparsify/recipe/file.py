"""Reading recipe files: finding them, YAML with line numbers, and `key=value` overrides.

The YAML dialect is the strict core: `true` and `false` are the only booleans, `1e-4` is a number, there are no dates,
and a key that is given twice is a fault.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import yaml

from sparsify.errors import ConfigError

Place: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a recipe, such as `("stages", 0, "sparsity")`."""

PACKAGED = Path(__file__).parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars on top of PyYAML's 1.1 parser."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _starts = [None if char == "\0" else char for char in _first] + ([""] if _tag == "null" else [])
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _starts)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def load_yaml(text: str) -> Any:
    """Parses one YAML document in the dialect above; raises `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)


@dataclass(frozen=True)
class RecipeText:
    """A recipe as read from its file.

    Attributes:
        origin: What to call the file in messages.
        text: The file's text.
        data: The parsed document.
        lines: First line (from 1) of each value of the document.
    """

    origin: str
    text: str
    data: dict[str, Any]
    lines: dict[Place, int]

    def line(self, place: Place) -> int | None:
        """Line of a place in the document, or of the nearest thing around it that the document holds."""
        for end in range(len(place), 0, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return None

    @property
    def header(self) -> str:
        """The comment that opens the file, without its `#` signs."""
        lines = []
        for line in self.text.splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").removeprefix(" "))
        return "\n".join(lines)


def packaged() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in PACKAGED.glob("*.yaml"))


def launch_configurations() -> dict[str, Path]:
    """Configurations for `accelerate launch` that come with the package, by the name that `recipe show` takes."""
    return {f"accelerate/{path.stem}": path for path in sorted((PACKAGED / "accelerate").glob("*.yaml"))}


def locate(source: str | Path) -> RecipeText:
    """Reads a recipe by path, or by the name of a packaged one.

    Raises:
        ConfigError: If there is no such recipe, or its text is not a YAML mapping with each key once.
    """
    path = Path(source).expanduser()
    looks_like_name = isinstance(source, str) and re.fullmatch(r"[\w-]+", source) is not None
    if looks_like_name and not path.is_file():
        if source not in packaged():
            raise ConfigError(
                f"no recipe file or packaged recipe is called {source!r}{nearest(source, packaged())}"
            )
        path = PACKAGED / f"{source}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"recipe {source} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {source} cannot be read: {error}") from error
    return parse(text, str(source))


def parse(text: str, origin: str) -> RecipeText:
    """Parses a recipe's text; see `locate`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = load_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: not YAML: {reason}") from error
    if not isinstance(data, dict) or node is None:
        raise ConfigError(
            f"{origin}: a recipe is a mapping of keys such as `version: 1`, got {type(data).__name__}"
        )
    lines: dict[Place, int] = {}
    twice = list(_walk(node, (), lines))
    if twice:
        raise ConfigError(f"{origin}: " + "; ".join(twice))
    return RecipeText(origin, text, data, lines)


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Iterable[str]:
    """Fills `lines`, and yields a message for each key that stands twice in one mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*place, key.value)
            line = key.start_mark.line + 1
            if child in lines and key.value != "<<":
                yield f"line {line}: key {key.value!r} is given twice, first on line {lines[child]}"
            lines[child] = line
            yield from _walk(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[*place, index] = value.start_mark.line + 1
            yield from _walk(value, (*place, index), lines)


def nearest(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or else the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], known: Iterable[str]) -> dict[str, Any]:
    """Returns a deep copy of `data` with `key=value` settings applied in order.

    Args:
        data: A recipe as plain data.
        overrides: Settings; a key is a dotted path with list positions counted from 0 (`stages.0.sparsity`), or starts
            with the name of a stage (`prune.sparsity`), or of a section in one (`pruner.sparsity`), that occurs once.
            The value is YAML; an empty one is null.
        known: The recipe's top-level keys.

    Raises:
        ConfigError: If a setting has no `=`, no YAML value, or names a place that cannot exist.
    """
    data = copy.deepcopy(data)
    for setting in overrides:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting}: expected key=value, such as prune.sparsity=0.6")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: {text!r} is not a YAML value") from error
        _assign(data, _resolve(data, key.strip().split("."), setting, known), value, setting)
    return data


def _resolve(data: dict[str, Any], parts: list[str], setting: str, known: Iterable[str]) -> list[str]:
    """Turns the leading name of a stage, or of a section in a stage, into its path."""
    if parts[0] in set(known) | set(data):
        return parts
    listed = data.get("stages")
    stages = (
        [stage if isinstance(stage, dict) else {} for stage in listed] if isinstance(listed, list) else []
    )
    places = [["stages", str(index)] for index, stage in enumerate(stages) if stage.get("stage") == parts[0]]
    kind = "stages"
    if not places:
        places = [
            ["stages", str(index), parts[0]]
            for index, stage in enumerate(stages)
            if isinstance(stage.get(parts[0]), dict)
        ]
        kind = "sections"
    if not places:
        names = {stage["stage"] for stage in stages if isinstance(stage.get("stage"), str)}
        sections = {key for stage in stages for key, value in stage.items() if isinstance(value, dict)}
        raise ConfigError(
            f"--set {setting}: no key or stage is called {parts[0]!r}{nearest(parts[0], {*known, *names, *sections})}"
        )
    if len(places) > 1:
        choices = " or ".join(".".join(place) for place in places)
        raise ConfigError(
            f"--set {setting}: the recipe has {len(places)} {parts[0]} {kind}; write {choices} instead"
        )
    return [*places[0], *parts[1:]]


def _assign(data: dict[str, Any], parts: list[str], value: Any, setting: str) -> None:
    here: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                raise ConfigError(
                    f"--set {setting}: {where} has the entries 0 to {len(here) - 1}, got {part!r}"
                )
            slot: Any = int(part)
        elif isinstance(here, dict):
            slot = part
        else:
            raise ConfigError(f"--set {setting}: {where} is {here!r}, which has no key {part!r}")
        if last:
            here[slot] = value
        else:
            if isinstance(here, dict) and here.get(slot) is None:
                here[slot] = {}
            here = here[slot]
