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
from sparsify.kernels.linear import hopper_decode, hopper_linear, hopper_narrow, hopper_narrow_sdd, hopper_sdd
from sparsify.kernels.hopper_common import LAYOUT, NARROW_LAYOUTS

def box(rows, columns):
    # Narrow boxes of tokens' features are narrow in shared memory; those of a transposed copy have rows of 64 and more.
    return f"tensordesc<bf16[{rows}, {columns}],{NARROW_LAYOUTS.get(columns, LAYOUT)!r}>"

TYPES = dict(bias_ptr="*bf16", bias2_ptr="*bf16", y_ptr="*bf16", dw_ptr="*bf16", partial_ptr="*fp32", cells_ptr="*i64")

def check(kernel, descriptors, constants, numbers, **options):
    names = kernel.arg_names
    types = {**TYPES, **descriptors}
    types = {
        n: "constexpr" if n in constants else "i32" if n in numbers else types.get(n, "*i32") for n in names
    }
    source = GluonASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})
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
    constants = dict(
        PAIRED=paired, TRANSPOSED=transposed, HAS_BIAS=True, ACTIVATION="silu", SUBS=2, STAGES=stages, TOKENS=tokens
    )
    check(hopper_linear.linear_kernel, dict(y_desc=y, x_desc=box(tokens, 64), w_desc=w), constants, "N")
elif kind == "narrow":
    part = int(options[0])
    x = box(part, tokens) if part < 64 else box(tokens, 64)
    constants = dict(
        HAS_BIAS=True, ACTIVATION="", COLUMN=0, TRANSPOSED=part < 64, PART=part, STAGES=stages, TOKENS=tokens
    )
    check(hopper_narrow.narrow_kernel, dict(y_desc=y, x_desc=x, w_desc=w), constants, "N")
elif kind == "decode":
    width, height, few, gated = (int(option) for option in options)
    stages = min(14, hopper_decode.RING_BYTES // (128 * (height + few)))
    constants = dict(
        HAS_BIAS=True, HAS_BIAS2=True, ACTIVATION="silu", GATED=bool(gated), HALVES=1, BI=width, BO=height,
        STAGES=stages, TOKENS=few,
    )
    boxes = dict(x_desc=box(few, width), w_desc=box(64, height), w2_desc=box(64, height))
    check(hopper_decode.decode_kernel, boxes, constants, ("M", "N", "most", "groups"), maxnreg=128)
elif kind == "narrow_sdd":
    shared, part = wide == "wide", int(options[0])
    constants = dict(SHARED_X=shared, BO=128, HIGH=64 if shared else 16, PART=part, STAGES=6 if shared else 4)
    check(hopper_narrow_sdd.narrow_sdd_kernel, dict(dy_desc=w, xt_desc=box(part, 64)), constants, ("U", "steps"))
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
    "narrow wide 16",
    "narrow wide 64",
    "narrow narrow 32",
    "decode wide 64 64 8 0",
    "decode wide 16 128 64 0",
    "decode narrow 16 64 64 1",
    "decode narrow 64 128 32 1",
    "narrow_sdd wide 16",
    "narrow_sdd narrow 32",
    "sdd wide",
    "sdd narrow",
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spilling(variant, monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", PROGRAM, *variant.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
