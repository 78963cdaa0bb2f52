"""English prose that every Python installation holds: the documentation of its own standard library.

The text is read from source files with `ast` and `tokenize`; no module is imported. It has three origins:
docstrings, the language topics behind `help()` (`pydoc_data`), and blocks of comments. What looks like code
is left out, paragraphs become single lines, and repeated paragraphs are kept once.

There are three parts: `train.txt`, `validation.txt` (for every choice made on the way) and `heldout.txt` (for
the number that is reported). A module belongs to one of them by a hash of its name, so that two releases of
Python agree about every module that both have; no paragraph occurs in two parts. Packages that some systems
leave out of a Python installation (tests, IDLE, Tk) are not read: equal releases give equal text. In a file,
one blank line separates passages (a docstring, a topic, a block of comments).

    python scripts/demo_corpus.py --out build/corpus
"""

import argparse
import ast
import hashlib
import os
import platform
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "ensurepip", "encodings"),
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "distutils", "lib2to3"),
}
TOPICS = "pydoc_data/topics.py"
PARTS = {"heldout": 1 / 16, "validation": 2 / 16, "train": 1.0}  # upper ends of the names' hash ranges
LEGAL = re.compile(r"copyright|licen[cs]e|all rights reserved|permission|warrant", re.IGNORECASE)
BULLET = re.compile(r"\s*(?:[-*o+] |\d+[.)] |[\w.]+ +-{1,2} )")
CODE = re.compile(r">>>|::=|\bTraceback\b|[{}\\|^~@$]|\w\)? = |\(\) --|\[\*\]|\bprint ?\(|(?:;|\):)$")


@dataclass(frozen=True)
class Document:
    """All prose of one module or help topic.

    Attributes:
        name: Dotted module name, or ``topics.`` and the topic's name.
        passages: Docstrings, topics or comment blocks; each holds one paragraph a line.
    """

    name: str
    passages: tuple[str, ...]

    @property
    def text(self) -> str:
        """The passages, one blank line between two of them."""
        return "\n\n".join(self.passages)


@dataclass(frozen=True)
class Corpus:
    """Three disjoint parts of the text; documents are sorted by name.

    Attributes:
        train: What a model is trained on: documentation and comments.
        validation: Documentation to choose settings by.
        heldout: Documentation to report results on, and for nothing else.
        source: The Python whose library was read.
    """

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    heldout: tuple[Document, ...]
    source: str

    @property
    def texts(self) -> dict[str, str]:
        """The files' contents by the part's name."""
        return {part: "\n\n".join(d.text for d in getattr(self, part)) + "\n" for part in sorted(PARTS)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the three texts, 64 hexadecimal digits."""
        return hashlib.sha256("\0".join(self.texts.values()).encode()).hexdigest()


def part_of(name: str) -> str:
    """Return the part a document belongs to, from its name alone (SHA-256, not Python's salted hash)."""
    position = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(part for part, end in PARTS.items() if position < end)


def collect(stdlib: Path | None = None) -> Corpus:
    """Read the standard library's prose and split it.

    Args:
        stdlib: Folder of the library's ``.py`` files; by default the running interpreter's.

    Returns:
        The corpus; the same files give the same text on every call.

    Raises:
        FileNotFoundError: If the folder holds no readable module (a stripped or zipped installation).
    """
    root = Path(sysconfig.get_path("stdlib")) if stdlib is None else Path(stdlib)
    found: dict[str, list[Passage]] = {}
    for path in sorted(source_files(root)):
        for name, passages in read_module(path, path.relative_to(root)):
            found.setdefault(name, []).extend(passages)
    if not found:
        raise FileNotFoundError(
            f"no Python source with documentation under {root}; expected the standard library's .py files. "
            "Use a Python installation that ships its library as source."
        )
    seen: set[str] = set()
    parts: dict[str, tuple[Document, ...]] = {}
    # Training documents claim their paragraphs first: what two parts contain is dropped from the smaller one.
    for part in reversed(PARTS):
        documents = (
            # Comments help in training; what is measured is documentation, which the model is meant to write.
            unseen(name, [p for p in found[name] if part == "train" or not p.comment], seen)
            for name in sorted(found)
            if part_of(name) == part
        )
        parts[part] = tuple(document for document in documents if document.passages)
    source = f"Python {platform.python_version()}" if stdlib is None else root.resolve().name
    return Corpus(**parts, source=source)


def source_files(folder: Path) -> Iterator[Path]:
    """Yield the ``.py`` files below a folder, without entering what is skipped."""
    for current, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        yield from (Path(current, name) for name in files if name.endswith(".py") and name not in SKIPPED)


@dataclass(frozen=True)
class Passage:
    """Paragraphs that belong together, and whether they come from comments."""

    paragraphs: tuple[str, ...]
    comment: bool = False


def unseen(name: str, passages: Iterable[Passage], seen: set[str]) -> Document:
    """Build a document of the paragraphs that are not in ``seen`` yet, and add them to it."""
    texts = []
    for passage in passages:
        fresh = [p for p in dict.fromkeys(passage.paragraphs) if p not in seen]
        seen.update(fresh)
        if fresh:
            texts.append("\n".join(fresh))
    return Document(name, tuple(texts))


def read_module(path: Path, relative: Path) -> Iterator[tuple[str, list[Passage]]]:
    """Yield (document name, passages) of one source file; nothing, with a warning, if it cannot be parsed."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError) as error:
        warnings.warn(f"{path} is left out of the text: {error}", stacklevel=2)
        return
    if relative.as_posix() == TOPICS:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                for topic, text in ast.literal_eval(node.value).items():
                    yield f"topics.{topic}", [Passage(tuple(paragraphs(text)))]
        return
    passages = [Passage(tuple(paragraphs(text))) for text in docstrings(tree)]
    passages += [Passage(tuple(paragraphs(text)), comment=True) for text in comments(source)]
    yield module_name(relative), passages


def module_name(relative: Path) -> str:
    """Return the dotted name, without the marks of a Python twin of a C module (``_pyio`` is ``io``)."""
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    return ".".join(re.sub(r"^_(?:py)?", "", part) for part in parts)


def docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and its functions, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and not LEGAL.search(text):
            yield text
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # no definition hides inside an expression
            yield from docstrings(child)


def comments(source: str) -> Iterator[str]:
    """Yield blocks of at least two whole-line comments that begin like a sentence and end like one."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        match = re.match(r"\s*# ?(.*)$", line)
        if match:
            block.append(match.group(1))
            continue
        text = "\n".join(block).strip()
        if len(block) > 1 and re.match(r"[A-Z].*[.:]$", text, re.DOTALL) and not LEGAL.search(text):
            yield text
        block = []


def paragraphs(text: str) -> Iterator[str]:
    """Yield the prose paragraphs of a documentation string, each as one line."""
    for chunk in re.split(r"\n\s*\n", text.expandtabs()):
        item: list[str] = []
        for line in [*chunk.splitlines(), None]:
            if item and (line is None or BULLET.match(line) or indent(line) < indent(item[-1])):
                joined = plain(" ".join(item))
                if is_prose(joined):
                    yield joined
                item = []
            if line is not None and line.strip():
                item.append(line)


def indent(line: str) -> int:
    """Return the number of leading blanks."""
    return len(line) - len(line.lstrip())


def plain(text: str) -> str:
    """Return the text on one line, with reStructuredText marks made into plain quotes."""
    text = re.sub(r":[\w:]+:`~?([^`<]*)[^`]*`", r"\1", text)
    text = re.sub(r"`+([^`']*)[`']+_*", r'"\1"', text)
    return re.sub(r"\s+", " ", re.sub(r"\*{2,}|={2,}|-{3,}", "", text)).strip()


def is_prose(text: str) -> bool:
    """Tell English from code: enough words, few symbols, the shape of a sentence or a heading."""
    words = re.findall(r"[A-Za-z][a-z']+", text)
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return len(words) >= 5 and letters >= 0.88 * len(text) and text.isascii() and not CODE.search(text)


def write(corpus: Corpus, out: Path, force: bool = False) -> None:
    """Write ``train.txt``, ``validation.txt`` and ``heldout.txt`` (UTF-8) to a folder.

    Args:
        corpus: What to write.
        out: The folder; made if missing.
        force: Replace these files if they exist.

    Raises:
        FileExistsError: If one of the files exists and ``force`` is not set.
    """
    targets = {out / f"{part}.txt": text for part, text in corpus.texts.items()}
    for path in targets:
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists; pass --force to replace it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in targets.items():
        part = path.with_name(path.name + ".part")
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Write the standard library's prose as three text files.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--stdlib", type=Path, help="library folder to read (default: this Python's)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    options = parser.parse_args(arguments)
    try:
        corpus = collect(options.stdlib)
        write(corpus, options.out, options.force)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part, text in corpus.texts.items():
        print(f"{part}: {len(getattr(corpus, part))} documents, {len(text.encode()):,} bytes")
    print(f"fingerprint: {corpus.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
