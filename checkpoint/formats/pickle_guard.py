"""A look through the opcodes of a foreign pickle before it is read: no memory is taken that the file does not pay for.

Python's unpickler makes its memo as large as the largest number that is put there, and a counted string as long as its
count, before it reads on; so a file of 20 bytes could take 64 GiB. Runs of opcodes of fixed length are matched by one
expression, since a checkpoint's pickle has millions; only counted ones are looked at one by one. Opcodes that no writer
of checkpoints uses (persistent ids as text, classes by number, protocol 0) are refused.
"""

import re

from resilient.errors import DamagedImage

_ALONE = rb"[(012Nab})\]deltsuRQ\x81\x85-\x89\x8f-\x94]"
_STOP, _FRAME = ord("."), 0x95
# opcode -> bytes of the count that follows it: (short) strings, bytes, byte arrays, long integers, frames
_COUNTED = dict.fromkeys((ord("X"), ord("B"), ord("T"), 0x8B), 4)
_COUNTED |= dict.fromkeys((ord("U"), ord("C"), 0x8A, 0x8C), 1)
_COUNTED |= dict.fromkeys((0x8D, 0x8E, 0x96, _FRAME), 8)


def check_opcodes(data: bytes, where: str) -> None:
    """Raises DamagedImage for counts beyond the data, memo numbers beyond any sense, and foreign opcodes."""
    fixed, at = _fixed(len(data)), 0
    while True:
        match = fixed.match(data, at)
        at = match.end() if match else at
        if at >= len(data):
            raise DamagedImage(f"{where}: its pickle ends early")
        if data[at] == _STOP:
            return
        at = _behind_counted(data, at, where)


def _behind_counted(data: bytes, at: int, where: str) -> int:
    width = _COUNTED.get(data[at])
    if width is None:
        raise DamagedImage(f"{where}: its pickle has {data[at : at + 9]!r} at {at}, which is not read")
    begin = at + 1 + width
    count = int.from_bytes(data[at + 1 : begin], "little")
    if begin + count > len(data):
        raise DamagedImage(f"{where}: its pickle names {count} bytes at {at}, beyond its end")
    return begin if data[at] == _FRAME else begin + count


def _fixed(nbytes: int) -> re.Pattern[bytes]:
    """Opcodes of fixed length, any number of them. A memo number may be as large as there are bytes, rounded up."""
    if nbytes < 1 << 16:
        memo = rb"..\x00\x00"
    elif nbytes < 1 << 24:
        memo = rb"...\x00"
    else:
        memo = rb"...[\x00-\x%02x]" % min(255, nbytes >> 24)
    kinds = [_ALONE, rb"[Khq\x80].", rb"M..", rb"[Jj]....", rb"r" + memo, rb"G........", rb"c[^\n]*\n[^\n]*\n"]
    return re.compile(rb"(?:" + rb"|".join(kinds) + rb")*+", re.DOTALL)
