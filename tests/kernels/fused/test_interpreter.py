"""What Triton's interpreter gets wrong about bfloat16, and that the kernels go around it.

Where one of the tests fails, the interpreter has been mended: the detours in kernel.py can go.
"""

import subprocess
import sys
from pathlib import Path

COMMON = """
import torch, triton, triton.language as tl
from resilient.kernels.fused import kernel

def halves(values):  # which are not numbers of bfloat16 but lie between two, or beside the middle
    return torch.tensor(values, dtype=torch.float32)
"""
PRODUCT = """
@triton.jit
def product(a, b, c, upcast: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    if upcast:
        x, y = x.to(tl.float32), y.to(tl.float32)
    tl.store(c + at, tl.dot(x, y))
a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
results = []
for upcast in (False, True):
    c = torch.empty(16, 16)
    product[(1,)](a, b, c, upcast)
    results.append((c - a.float() @ b.float()).abs().max().item())
assert results[0] > 1e3 and results[1] < 1e-4, results
"""
ROUNDING = """
@triton.jit
def narrow(x, plain, ours):
    at = tl.arange(0, 8)
    tl.store(plain + at, tl.load(x + at).to(tl.bfloat16))
    tl.store(ours + at, kernel._narrow(tl.load(x + at), tl.bfloat16, True))
x = halves([1 + 3 / 256, 1 + 1 / 256, 1 + 1.5 / 256, 2 - 1 / 512, -1 - 3 / 256, float("inf"), float("nan"), 0.0])
plain, ours = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
narrow[(1,)](x, plain, ours)
assert torch.equal(ours.nan_to_num(7), x.bfloat16().nan_to_num(7)), (ours, x.bfloat16())
assert not torch.equal(plain.nan_to_num(7), x.bfloat16().nan_to_num(7)), plain
"""


def interpreted(program: str, folder: Path) -> None:
    """Runs a program, from a file because Triton reads kernels' sources, with kernels interpreted."""
    (folder / "program.py").write_text(COMMON + program)
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    command = [sys.executable, "-P", str(folder / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_multiplies_the_bits_of_bfloat16_unless_they_are_widened_first(tmp_path: Path) -> None:
    interpreted(PRODUCT, tmp_path)


def test_the_interpreter_cuts_bits_off_where_the_kernels_round_to_the_nearest(tmp_path: Path) -> None:
    interpreted(ROUNDING, tmp_path)
