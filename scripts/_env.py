"""Makes the checkout's `.venv`, or brings it up to date: `python scripts/_env.py [EXTRA]`.

Runs under any supported Python, with the standard library alone, and does nothing when the environment already
holds what pyproject.toml asks for. Which package index serves the packages is for pip's own configuration to say.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.json"


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Lets two commands that start together set up one after the other; the lock is the checkout itself."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another command that sets up this checkout ...", file=sys.stderr)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def venv_fits() -> bool:
    """Whether `.venv` exists, starts, and is of the Python version that runs this file."""
    script = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.stdout.split() == [str(part) for part in sys.version_info[:2]]


def wanted() -> str:
    """What an installation depends on: its declaration, and the folder that the editable install points to."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + os.fsencode(ROOT)).hexdigest()


def installed() -> list[str]:
    """The extras that the environment holds, "" for none of them; empty if it has to be installed again."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return []
    return stamp["extras"] if stamp["for"] == wanted() else []


def set_up(extra: str) -> None:
    """Makes or updates the environment.

    Raises:
        subprocess.CalledProcessError: If venv or pip fails; they have said why.
        OSError: If the checkout cannot be written.
    """
    if not venv_fits():
        STAMP.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    have = installed()
    if extra in have or (not extra and have):
        return
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"Installing into {VENV} (Python {version}); the first time takes some minutes ...", file=sys.stderr
    )
    # A terminal shows pip's progress; a log keeps its errors alone.
    quiet = [] if sys.stderr.isatty() else ["-qq"]
    requirement = f"{ROOT}[{extra}]" if extra else str(ROOT)
    subprocess.run(
        [PYTHON, "-m", "pip", "install", *quiet, "--editable", requirement], check=True, stdout=sys.stderr
    )
    STAMP.write_text(json.dumps({"for": wanted(), "extras": sorted({*have, extra})}))


def main() -> int:
    extra = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        with only_one():
            set_up(extra)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"error: setting up {VENV} failed, see above; the command was: {command}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot set up {VENV}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the next start continues the set-up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
