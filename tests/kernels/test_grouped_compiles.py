"""The grouped kernels compile to machine code for compute capability 8 and 9 without a GPU, and spill nothing."""

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
from sparsify.kernels.grouped import triton_grouped, triton_padding

TYPES = {name: "*i32" for name in (
    "place_ptr", "bins_ptr", "items_ptr",
    "crow_ptr", "col_ptr", "row_ptr", "t_crow_ptr", "t_row_ptr", "t_block_ptr", "order_ptr", "offsets_ptr")}
TYPES |= {"experts_ptr": "*i64", "scale_ptr": "*fp32"}
SIZES = dict(
    HAS_BIAS=True, ACTIVATION="silu", HAS_SCALE=True, GATED=False, BI=64, BO=64, TI=64, TO=64, BM=128, BN=64, BK=64,
    LANES=256, TOKENS=128, CHUNK=64, WIDTH=1024, BAND=8, PRECISION="ieee", WIDEN=False, SLOTS=1024,
)
VARIANTS = {
    "prefill": ("grouped", {}, 4), "gated": ("grouped", {"GATED": True}, 8),
    "decode": ("grouped", {"BM": 16, "BN": 16, "BK": 256, "GATED": True}, 4),
    "one": ("grouped", {"BM": 1, "BN": 16, "BK": 512, "GATED": True}, 4),
    "dx": ("dx", {}, 4), "dw": ("dw", {"BM": 32}, 4), "group": ("group", {"BM": 16}, 4),
    "pad": ("pad", {}, 4), "gather": ("gather", {}, 4), "scatter": ("scatter", {"GATED": True}, 4),
}
name, capability = sys.argv[1], int(sys.argv[2])
kernel, changes, warps = VARIANTS[name]
module = triton_padding if kernel in ("pad", "gather", "scatter") else triton_grouped
kernel = getattr(module, f"_{kernel}_kernel")
names = kernel.arg_names
constants = {key: value for key, value in (SIZES | changes).items() if key in names}
types = {n: "constexpr" if n in constants else TYPES.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
constants = {(names.index(n),): v for n, v in constants.items()}
attributes = {
    (i,): [["tt.divisibility", 16]]
    for i, n in enumerate(names)
    if n.endswith("_ptr") or n in ("K", "N", "W") or n.startswith("stride_")
}
source = ASTSource(kernel, types, constants, attributes)
target = GPUTarget("cuda", capability, 32)
compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 5})
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
if module is triton_grouped and name not in ("one", "group"):
    # Activations are gathered by 16 bytes, through the pipeline.
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
    assert "ld.global.b16" not in compiled.asm["ptx"]
if name in ("prefill", "gated", "dx") and capability == 90:
    assert "wgmma.mma_async" in compiled.asm["ptx"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(
    "variant", ["prefill", "gated", "decode", "one", "dx", "dw", "group", "pad", "gather", "scatter"]
)
def test_compiles(variant, capability, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, variant, capability], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
