"""Units laid into rooms with the fewest cuts: McNaughton's wrap-around rule (1959), with whole units where they fit.

`n` equal units over `s` equal rooms that hold them exactly take n + s - gcd(n, s) pieces, and no fewer will do: a group
of a units that share b rooms fills them, so a / b = n / s, and there are gcd(n, s) such groups at most.
"""

from collections.abc import Sequence
from fractions import Fraction

from resilient.errors import UsageError

Part = tuple[int, Fraction, Fraction]  # room, and from where to where in the unit


def pack(units: int, rooms: Sequence[Fraction]) -> list[list[Part]]:
    """The parts of each unit, in order; a unit has the size 1, and a room is never filled beyond its own.

    Raises UsageError when the rooms together hold less than the units.
    """
    if sum(rooms) < units:
        raise UsageError(f"{units} units do not fit into rooms for {float(sum(rooms)):g}")
    whole = [room for room, size in enumerate(rooms) for _ in range(int(size))][:units]
    left = {room: size - int(size) for room, size in enumerate(rooms)}
    # What room the whole units did not need is as good as the rest; the largest rooms first make the fewest cuts.
    for room in [room for room, size in enumerate(rooms) for _ in range(int(size))][units:]:
        left[room] += 1
    row = sorted((room for room in left if left[room]), key=lambda room: (-left[room], room))
    packed: list[list[Part]] = [[(room, Fraction(0), Fraction(1))] for room in whole]
    at = 0
    for _ in range(units - len(whole)):
        parts: list[Part] = []
        begin = Fraction(0)
        while begin < 1:
            room = row[at]
            end = min(Fraction(1), begin + left[room])
            parts.append((room, begin, end))
            left[room] -= end - begin
            at += not left[room]
            begin = end
        packed.append(parts)
    return packed
