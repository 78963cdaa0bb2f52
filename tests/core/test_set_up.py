"""scripts/_env.sh and scripts/_env.py: the set-up that both commands of the README share. pip itself is replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SET_UP = '. "{checkout}/scripts/_env.sh"; set_up {extra}; echo "$python"'

# Stands for .venv/bin/python: notes every call of pip, and lets it fail where a file `offline` lies in the checkout.
PYTHON = """\
#!/bin/sh
[ "$2" = pip ] || exec "{python}" "$@"
echo "$@" >> "{checkout}/pip.log"
[ ! -e "{checkout}/offline" ]
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose environment exists, with nothing installed in it yet."""
    monkeypatch.delenv("PYTHON", raising=False)
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("_env.sh", "_env.py"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    (root / "pyproject.toml").write_text("[project]\n")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(python=sys.executable, checkout=root))
    python.chmod(0o755)
    return root


def set_up(checkout: Path, extra: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Does what scripts/test and scripts/quickstart do first, from another folder."""
    command = ["bash", "-c", SET_UP.format(checkout=checkout, extra=extra)]
    environ = os.environ | environment
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, check=False)


def installs(checkout: Path) -> list[str]:
    log = checkout / "pip.log"
    return (
        [line.rpartition(" --editable ")[2] for line in log.read_text().splitlines()] if log.exists() else []
    )


def test_installs_once(checkout: Path) -> None:
    for _ in range(2):
        done = set_up(checkout, "dev")
        assert done.returncode == 0
        assert done.stdout.strip() == str(checkout / ".venv" / "bin" / "python")
    assert installs(checkout) == [f"{checkout}[dev]"]
    assert done.stderr == ""


def test_extra_covers_the_plain_install_but_not_the_other_way_round(checkout: Path) -> None:
    for extra in ("", "dev", ""):
        assert set_up(checkout, extra).returncode == 0
    assert installs(checkout) == [str(checkout), f"{checkout}[dev]"]


def test_changed_dependencies_are_installed(checkout: Path) -> None:
    assert set_up(checkout).returncode == 0
    (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["torch"]\n')
    assert set_up(checkout).returncode == 0
    assert installs(checkout) == [str(checkout)] * 2


def test_moved_checkout_is_installed_from_its_new_place(checkout: Path) -> None:
    assert set_up(checkout).returncode == 0
    moved = checkout.rename(checkout.with_name("moved"))
    python = moved / ".venv" / "bin" / "python"
    python.write_text(PYTHON.format(python=sys.executable, checkout=moved))
    assert set_up(moved).returncode == 0
    assert installs(moved) == [str(checkout), str(moved)]


def test_failed_install_is_reported_and_tried_again(checkout: Path) -> None:
    (checkout / "offline").touch()
    failed = set_up(checkout)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: setting up {checkout}/.venv failed")
    (checkout / "offline").unlink()
    assert set_up(checkout).returncode == 0
    assert len(installs(checkout)) == 2


def test_two_at_once_install_once(checkout: Path) -> None:
    command = ["bash", "-c", SET_UP.format(checkout=checkout, extra="dev")]
    started = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert installs(checkout) == [f"{checkout}[dev]"]


def test_unusable_python_is_refused(checkout: Path) -> None:
    done = set_up(checkout, PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert (
        done.stderr == "error: PYTHON=/nowhere/python is not Python 3.11, 3.12 or 3.13 with the venv module\n"
    )


def test_no_python_at_all_is_explained(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    done = set_up(checkout, PATH=str(tools))
    assert done.returncode == 1
    assert done.stderr.startswith("error: found no Python 3.11, 3.12 or 3.13 with the venv module")
    assert installs(checkout) == []
