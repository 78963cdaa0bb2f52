"""What README and docs name is there: files, links and their headings, imports, commands and their options."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module, util
from pathlib import Path

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from sparsify.cli.main import app
from sparsify.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
# The log tells of files as they were.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md"),
]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def headings(page: Path) -> set[str]:
    """The anchors of a page, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in CODE.findall(page.read_text()) if language in languages]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if not link.startswith("http"):
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


@each_page
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    folders = "sparsify|kernels|pruners|recipes|scripts|tests"
    named = set(re.findall(rf"\b(?:{folders})/[\w./]*\.(?:py|yaml|html)\b", page.read_text()))
    named -= {"kernels/__init__.py"}  # named because it must not be there
    assert [name for name in named if not (ROOT / name).is_file()] == []


@each_page
def test_imports_work(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsify"):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
    for name in re.findall(r"`(sparsify(?:\.\w+)+)", page.read_text()):
        found = import_module("sparsify")
        for part in name.split(".")[1:]:
            whole = f"{found.__name__}.{part}" if hasattr(found, "__path__") else ""
            found = import_module(whole) if whole and util.find_spec(whole) else getattr(found, part)


@each_page
def test_recipes_are_valid(page: Path) -> None:
    for text in blocks(page, "yaml"):
        if text.startswith("version:"):
            Recipe.from_dict(yaml.safe_load(text))


def commands(page: Path) -> list[list[str]]:
    """Every `sparsify ...` of the page's shell blocks, without comments, in words."""
    text = "\n".join(blocks(page, "bash", "console")).replace("\\\n", " ")
    lines = (re.sub(r"^(\$ )?", "", line.strip()) for line in text.splitlines())
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("sparsify ")]


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    group = typer.main.get_command(app)
    for words in commands(page):
        command, rest = group, words
        while rest and isinstance(command, TyperGroup):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known | {"--help"}, words


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20
