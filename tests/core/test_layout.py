"""The import layout of docs/decisions/0001-import-layout.md, and the wheel and source archive made from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("pruners", "kernels", "recipes")


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command in a folder and returns what it printed; fails with all of it if the command fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_sources(target: Path) -> Path:
    """Copies what a build reads, links as links: a build in the checkout would leave its folders there."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    copy_package(target)
    return target


def copy_package(target: Path) -> None:
    for name in ("sparsify", *LINKS):
        shutil.copytree(
            ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    return target


def build(kind: str, source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    return target / run(sys.executable, "-c", code, target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    return build("sdist", copy_sources(folder / "source"), folder / "dist")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build("wheel", copy_sources(folder / "source"), folder / "dist")


@pytest.mark.parametrize("name", LINKS)
def test_link_is_relative(name: str) -> None:
    assert os.readlink(ROOT / "sparsify" / name) == f"../{name}"


@pytest.mark.parametrize("name", LINKS)
def test_linked_folder_is_no_package(name: str) -> None:
    init = ROOT / name / "__init__.py"
    assert not init.exists(), f"{init} would shadow or overwrite a published package of the same name"


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("checked_out_as", ["text file", "missing link"])
def test_broken_link_is_explained_at_import(name: str, checked_out_as: str, tmp_path: Path) -> None:
    copy_package(tmp_path)
    link = tmp_path / "sparsify" / name
    link.unlink()
    if checked_out_as == "text file":
        link.write_text(f"../{name}")
    command = [sys.executable, "-c", "import sparsify"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: sparsify/{name} is a {checked_out_as}, not a folder")
    assert "symbolic link" in message
    assert "git config core.symlinks true" in message


def package_files(root: Path) -> set[str]:
    """All that an installation needs, as paths from the package's parent folder."""
    files = {f"sparsify/{path.name}" for path in (root / "sparsify").glob("*") if path.is_file()}
    for folder in (path for path in (root / "sparsify").glob("*") if path.is_dir()):
        for path in folder.resolve().rglob("*"):
            inner = Path(folder.name) / path.relative_to(folder.resolve())
            if path.is_file() and inner.parts[1] != "demo" and "__pycache__" not in inner.parts:
                files.add(f"sparsify/{inner}")
    return files


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == package_files(ROOT)


def test_sdist_holds_real_files_and_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    from_sdist = build("wheel", source, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(from_sdist) as theirs:
        assert {
            (file.filename, file.CRC) for file in ours.infolist() if ".dist-info" not in file.filename
        } == {(file.filename, file.CRC) for file in theirs.infolist() if ".dist-info" not in file.filename}


def test_wheel_lives_beside_hugging_face_kernels(wheel: Path, tmp_path: Path) -> None:
    """`kernels` is also a published package, which transformers looks up by name."""
    try:
        published = metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's kernels package, which ./scripts/test installs")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    for file in published.files or []:
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # Everything else comes from the environment that runs the tests, whose own `sparsify` is not seen.
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import kernels, sparsify, sparsify.kernels.linear.ops, sparsify.pruners.magnitude, transformers\n"
        "print(kernels.get_kernel.__module__)\n"
        "ours = (sparsify, sparsify.kernels.linear.ops, sparsify.pruners.magnitude)\n"
        "print(*(module.__file__ for module in (kernels, *ours)), sep='\\n')"
    )
    origin, *files = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert origin.startswith("kernels.")
    inside = (
        "kernels/__init__.py",
        "sparsify/__init__.py",
        "sparsify/kernels/linear/ops.py",
        "sparsify/pruners/magnitude.py",
    )
    assert files == [str(site / file) for file in inside]
    assert run(tmp_path / "venv" / "bin" / "sparsify", "recipe", "list", cwd=tmp_path).strip()


def test_checkout_does_not_hide_hugging_face_kernels() -> None:
    """From the repository's root, where the folder `kernels` is on the path, transformers still imports."""
    code = "import transformers, importlib.util as u; print(u.find_spec('kernels').origin)"
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert origin == "None" or Path(origin).parent != ROOT / "kernels"
