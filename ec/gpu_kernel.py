"""The Triton kernel of `ec/gpu.py`: any coefficients, any number of ranges, one binary. Imported where CUDA is used.

Shards are read as words of four bytes. A word is doubled in GF(2^8) seven times, in all its bytes at once, and added to
each target whose coefficient has the bit of that doubling. So each byte of data is read once for four targets.
"""

# What a kernel's code means is Triton's to say: to pyright it is Python, and Triton's annotations do not fit that.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD_BYTES = 4
ALIGN_BYTES = 16  # of every address: a thread then loads and stores 16 bytes at a time
TARGETS = 4  # of one pass over the sources; as many as stay in registers

_BLOCK_WORDS = 512  # 16 bytes for each of 128 threads
# Not of every k and m another binary; but whole blocks of words are stored wider.
_jit: Callable[..., Any] = triton.jit(do_not_specialize=["columns", "rows"])


@_jit
def combine_words(
    addresses: tl.tensor,
    coefficients: tl.tensor,
    columns: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    block_words: tl.constexpr,
) -> None:
    """Four targets' words in one block. `addresses`: sources, then targets; `coefficients`: rows padded to fours."""
    at = tl.program_id(0).to(tl.int64) * block_words + tl.arange(0, block_words)
    inside = at < words
    first = tl.program_id(1) * 4
    a = tl.zeros((block_words,), dtype=tl.int32)
    b = tl.zeros((block_words,), dtype=tl.int32)
    c = tl.zeros((block_words,), dtype=tl.int32)
    d = tl.zeros((block_words,), dtype=tl.int32)
    for column in range(columns):
        start = tl.multiple_of(tl.load(addresses + column).to(tl.pointer_type(tl.int32)), 16)
        word = tl.load(start + at, mask=inside, other=0)
        mine = coefficients + first * columns + column
        for_a = tl.load(mine).to(tl.int32)
        for_b = tl.load(mine + columns).to(tl.int32)
        for_c = tl.load(mine + 2 * columns).to(tl.int32)
        for_d = tl.load(mine + 3 * columns).to(tl.int32)
        for bit in tl.static_range(8):
            a ^= word & -((for_a >> bit) & 1)
            b ^= word & -((for_b >> bit) & 1)
            c ^= word & -((for_c >> bit) & 1)
            d ^= word & -((for_d >> bit) & 1)
            word = ((word & 0x7F7F7F7F) << 1) ^ (((word >> 7) & 0x01010101) * 0x1D)
    for row in tl.static_range(4):
        if first + row < rows:
            target = tl.multiple_of(tl.load(addresses + columns + first + row).to(tl.pointer_type(tl.int32)), 16)
            result = a if row == 0 else b if row == 1 else c if row == 2 else d
            tl.store(target + at, result, mask=inside)


def launch(addresses: Tensor, coefficients: Tensor, rows: int, words: int) -> None:
    """Start the kernel on the current stream. Addresses (int64) and coefficients (uint8) lie on the device.

    `addresses`: sources, then targets. `coefficients` has rows of zeros up to a multiple of `TARGETS`; `rows` count.
    """
    grid = (triton.cdiv(words, _BLOCK_WORDS), triton.cdiv(rows, TARGETS))
    columns = coefficients.shape[1]
    kernel: Any = combine_words
    with torch.cuda.device_of(coefficients):
        kernel[grid](addresses, coefficients, columns, rows, words, block_words=_BLOCK_WORDS, enable_fp_fusion=False)
