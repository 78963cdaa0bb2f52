"""The Hopper kernels compile to machine code for compute capability 9 without a GPU, and spill no registers."""

import subprocess
import sys

import pytest

# In a process of its own: this one may run Triton's interpreter, which Gluon does not have.
PROGRAM = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource
from sparsify.kernels import hopper_linear, hopper_sdd, hopper_tall
from sparsify.kernels.hopper_common import LAYOUT

def box(rows, columns):
    return f"tensordesc<bf16[{rows}, {columns}],{LAYOUT!r}>"

def check(kernel, descriptors, constants, numbers):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else descriptors.get(n, "i32" if n in numbers else "*i32") for n in names}
    if "bias_ptr" in types:
        types["bias_ptr"] = "*bf16"
    source = GluonASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.metadata.shared <= 232448, compiled.metadata.shared
    assembler = get_ptxas(90).path
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [assembler, "-v", "--gpu-name=sm_90a", ptx, "-o", ptx.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report = done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report

kind, wide, *options = sys.argv[1:]
tokens, stages = (256, 4) if wide == "wide" else (128, 5)
y, w = box(tokens // 2, 64), box(64, 64)
if kind == "linear":
    paired, transposed = (option == "yes" for option in options)
    constants = dict(PAIRED=paired, TRANSPOSED=transposed, HAS_BIAS=True, SUBS=2, STAGES=stages, TOKENS=tokens)
    check(hopper_linear.linear_kernel, dict(y_desc=y, x_desc=box(tokens, 64), w_desc=w), constants, "N")
elif kind == "tall":
    width = int(options[0])
    constants = dict(HAS_BIAS=True, BI=width, STAGES=stages, TOKENS=tokens)
    check(hopper_tall.tall_kernel, dict(y_desc=y, x_desc=box(width, tokens), w_desc=w), constants, "N")
else:
    shared = wide == "wide"
    constants = dict(SHARED_X=shared, SUBS=2, STAGES=6 if shared else 4)
    check(hopper_sdd.sdd_kernel, dict(dw_desc=w, dy_desc=w, x_desc=w), constants, ("U", "steps"))
"""

VARIANTS = [
    "linear wide yes no",
    "linear wide yes yes",
    "linear wide no no",
    "linear narrow no yes",
    "tall wide 16",
    "tall narrow 32",
    "sdd wide",
    "sdd narrow",
]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spilling(variant, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM, *variant.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
