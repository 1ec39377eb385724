"""The kernels compiled for GPUs that this machine does not have: code for tensor cores, ordered signals, no spills."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resilient.kernels.fused import kernel
from resilient.kernels.fused.launch import constants
from resilient.kernels.fused.shapes import OPERATIONS, TILES, Call, Operation

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a block, CUDA C++ Programming Guide, compute capabilities
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def compiled(
    operation: Operation, dtype: torch.dtype, capability: int, *, m: int = 8192, n: int = 8192, k: int = 4096
) -> Any:
    """A call of eight ranks as the launcher would have it compiled, with bias and activation."""
    tile = TILES[dtype]
    call = Call(operation=operation, m=m, n=n, k=k, dtype=dtype, world=8, biased=True, activation="gelu", tile=tile)
    gathers = operation == "all_gather_matmul"
    function: Any = kernel.all_gather_matmul if gathers else kernel.matmul_reduce
    constant = constants(call) | ({"aligned": k % 8 == 0} if gathers else {})
    options = {name: constant.pop(name) for name in OPTIONS}
    types = {"buffers": "*i64", "signals": "*i64"}
    types |= dict.fromkeys(("shard", "left", "weight", "bias", "out"), NAMES[dtype])
    numbers = {"rows": call.rows, "whole": m, "columns": n, "depth": k, "depth_stride": n, "column_stride": 1}
    signature, attributes = {}, {}
    for parameter in function.params:
        name = parameter.name
        if not parameter.do_not_specialize and numbers.get(name) == 1:  # Triton takes it for a constant
            constant[name] = 1
        elif not parameter.do_not_specialize and (name in types or (name in numbers and numbers[name] % 16 == 0)):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        signature[name] = "constexpr" if name in constant else types.get(name, "i32")
    source = ASTSource(fn=function, signature=signature, constexprs=constant, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(made: Any, folder: Path) -> dict[str, int]:
    """What a kernel takes, such as REG; STACK and LOCAL are what did not fit into registers."""
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    line = next(line for line in said.splitlines() if "REG:" in line)
    pairs = (part.split(":") for part in line.split())
    return {name: int(number) for name, number in pairs}


def signals_are_ordered(ptx: list[str]) -> None:
    """Signals are released and acquired, and among all devices."""
    for order in ("release", "acquire"):
        found = [line for line in ptx if f".{order}" in line]
        assert found
        assert all(".sys" in line for line in found)
    assert all(".sys" in line for line in ptx if "atom." in line)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("capability", [80, 90])
def test_default_tiles_stay_in_registers_and_signals_are_ordered(
    operation: Operation, dtype: torch.dtype, capability: int, tmp_path: Path
) -> None:
    made = compiled(operation, dtype, capability)
    used = resources(made, tmp_path)
    print(operation, dtype, f"sm_{capability}", used["REG"], "registers,", made.metadata.shared, "bytes shared")
    assert used["STACK"] == used["LOCAL"] == 0
    assert made.metadata.shared <= SHARED_BYTES[capability]
    signals_are_ordered(made.asm["ptx"].splitlines())
    if dtype == torch.bfloat16:
        assert ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"]
        assert made.metadata.shared > 2 * 128 * 64 * 2  # loads of the next steps are on their way meanwhile


def test_any_depth_compiles_for_float16() -> None:
    for operation in OPERATIONS:
        assert compiled(operation, torch.float16, 90, k=4095).asm["cubin"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(8, 8192, 4096), (1, 1, 1)])
def test_one_row_of_a_rank_and_every_other_dimension_of_one_compile(
    operation: Operation, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    assert compiled(operation, torch.bfloat16, 90, m=m, n=n, k=k).asm["cubin"]
