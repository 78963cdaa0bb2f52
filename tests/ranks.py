"""A test file run as a program by two processes that meet over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = 2


def run_ranks(script: str, *arguments: str, timeout: float = 240) -> None:
    """Runs `script` on two processes with the environment that `torchrun` gives; each has to exit with 0.

    Processes of their own: a fork of this one could not run backward once any other test has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).resolve().parents[1])
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    common |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(RANKS)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [rank.communicate(timeout=timeout)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(told)
    finally:
        for rank in ranks:
            rank.kill()
