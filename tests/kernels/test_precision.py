"""float32 products follow torch's setting for TF32, whichever of its interfaces it was given by."""

import json
import subprocess
import sys

# Each in a process of its own, since torch remembers which interface was used and refuses to mix them: forks of a
# fresh one, since importing torch takes long.
SETTINGS = {
    "nothing": ("pass", "ieee"),
    "allow_tf32": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    "allow_tf32 taken back": (
        "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.allow_tf32 = False",
        "ieee",
    ),
    "high": ("torch.set_float32_matmul_precision('high')", "tf32"),
    "highest": ("torch.set_float32_matmul_precision('highest')", "ieee"),
    "cuBLAS": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    "everywhere": ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    "everywhere but cuBLAS": (
        "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "ieee",
    ),
}


PROGRAM = """
import json, os, sys
import torch
from sparsify.kernels.triton_common import dot_options

found = {}
for name, (setting, _) in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    child = os.fork()
    if not child:
        exec(setting)
        os.write(write, json.dumps([dot_options(torch.float32), dot_options(torch.bfloat16)]).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
    found[name] = json.loads(os.read(read, 1000))
print(json.dumps(found))
"""


def test_float32_follows_the_setting(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {name: [[precision, False], ["ieee", False]] for name, (_, precision) in SETTINGS.items()}
    assert json.loads(done.stdout) == expected
