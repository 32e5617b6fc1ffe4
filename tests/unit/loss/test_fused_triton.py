"""The CUDA epilogue where there is no CUDA: Triton's interpreter runs the very kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pear_data.loss.epilogue_triton import _BLOCK, _WARPS, _row_kernel

dtype, softcap, architecture = sys.argv[1], sys.argv[2] == "softcap", int(sys.argv[3])
constants = {"HAS_BIAS": True, "HAS_SOFTCAP": softcap, "GRADIENTS": True, "BLOCK": _BLOCK}
types = ["*" + dtype, "i64", "*i64", "*" + dtype, "*fp32", "*fp32", "i32", "fp32", "fp32"]
names = [name for name in _row_kernel.arg_names if name not in constants]
signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
source = ASTSource(fn=_row_kernel, signature=signature, constexprs=constants)
target = GPUTarget("cuda", architecture, 32)
print(len(triton.compile(source, target=target, options={"num_warps": _WARPS}).asm["cubin"]) > 0)
"""


@pytest.mark.parametrize(
    ("dtype", "softcap", "architecture"), [("bf16", "softcap", 90), ("fp32", "none", 80)]
)
def test_the_kernel_compiles_to_machine_code_of_real_devices(
    dtype: str, softcap: str, architecture: int, tmp_path: Path
) -> None:
    """With Triton's own compiler and assembler, which need no device."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, dtype, softcap, str(architecture)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True\n", done.stderr


def test_the_kernel_does_what_torch_does() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("epilogues_compared.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "equal\n", done.stderr
