"""The convolutions' kernels compile to machine code for compute capability 8 and 9 without a GPU, and spill nothing."""

import os
import subprocess
import sys

import pytest

# In a process of its own: this one may run Triton's interpreter.
PROGRAM = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from sparsify.kernels.convolution import triton_conv

TYPES = dict(t_crow_ptr="*i32", t_row_ptr="*i32", t_block_ptr="*i32", crow_ptr="*i32", col_ptr="*i32", row_ptr="*i32")
SIZES = dict(
    KH=3, KW=3, SH=1, SW=1, TOP=1, LEFT=1, DH=1, DW=1, HAS_BIAS=True, BITS=True, BI=64, BO=64, TI=64, TO=64, BM=128,
    BK=64, PRECISION="ieee", WIDEN=False,
)
capability, dtype, *kernels = sys.argv[1:]
capability = int(capability)
for name in kernels:
    sizes = SIZES | {"BM": 64 if name == "dw" else 128}
    kernel = getattr(triton_conv, f"_{name}_kernel")
    names = kernel.arg_names
    constants = {key: value for key, value in sizes.items() if key in names}
    types = {
        n: "constexpr" if n in constants else TYPES.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in names
    }
    constants = {(names.index(n),): v for n, v in constants.items()}
    constants[(names.index("stride_c"),)] = 1  # channels-last
    types["stride_c"] = "constexpr"
    if "stride_yc" in names:
        constants[(names.index("stride_yc"),)] = 1
        types["stride_yc"] = "constexpr"
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n.endswith("_ptr") or n in ("IG", "OG", "channels") or (n.startswith("stride_") and not n.endswith("c"))
    }
    source = ASTSource(kernel, types, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4, "num_stages": 3 if dtype != "fp32" else 2}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= (232448 if capability == 90 else 101376), compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", ptx, "-o", ptx.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report = done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report
    if dtype == "bf16":  # pixels are gathered by 16 bytes, through the pipeline
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
        assert "ld.global.b16" not in compiled.asm["ptx"]
"""


@pytest.mark.parametrize("capability", ["80", "90"])
def test_compiles(capability):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability, "bf16", "conv", "dx", "dw"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
