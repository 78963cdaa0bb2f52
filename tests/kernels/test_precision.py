"""float32 products follow torch's setting for TF32, whichever of its interfaces it was given by."""

import subprocess
import sys

import pytest

# Each in a process of its own: torch remembers which interface was used, and refuses to mix them.
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


@pytest.mark.parametrize("name", SETTINGS)
def test_float32_follows_the_setting(name, monkeypatch):
    setting, expected = SETTINGS[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = (
        f"import torch; from sparsify.kernels.triton_common import dot_options; {setting};"
        f"assert dot_options(torch.float32) == ({expected!r}, False), dot_options(torch.float32);"
        f"assert dot_options(torch.bfloat16) == ('ieee', False)"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=60)
