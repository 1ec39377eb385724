"""Names in the short form of SLURM: `n[1-3,07-09],login` stands for n1, n2, n3, n07, n08, n09 and login. Pure."""

import re
from itertools import product

_MOST_NAMES = 1 << 16
_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def expand(expression: str) -> list[str]:
    """All the names, in order; brackets may stand anywhere in a name, and more than once.

    Raises ValueError that quotes what is wrong.
    """
    names: list[str] = []
    for item in _items(expression):
        names += _names(item, _MOST_NAMES - len(names))
    return names


def _items(expression: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    items, depth, begin = [], 0, 0
    for at, sign in enumerate(expression):
        depth += (sign == "[") - (sign == "]")
        if depth not in (0, 1):
            raise ValueError(f"{expression!r}: a bracket that does not match")
        if sign == "," and not depth:
            items.append(expression[begin:at])
            begin = at + 1
    if depth:
        raise ValueError(f"{expression!r}: a bracket that is not closed")
    items.append(expression[begin:])
    if not all(item.strip() for item in items):
        raise ValueError(f"{expression!r}: an empty name")
    return [item.strip() for item in items]


def _names(item: str, most: int) -> list[str]:
    parts = re.split(r"\[([^\]]*)\]", item)  # text, ranges, text, ranges, ..., text
    choices = [_numbers(part, item, most) if number % 2 else [part] for number, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > most:
        raise ValueError(f"{item!r}: more than {_MOST_NAMES} names")
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(text: str, item: str, most: int) -> list[str]:
    """`1-3,07-09`: numbers keep the zeros that the first of their range has."""
    found: list[str] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{item!r}: {part.strip()!r} is neither a number nor a range")
        low, high = match[1], match[2] or match[1]
        if int(high) < int(low):
            raise ValueError(f"{item!r}: {part.strip()!r} runs backwards")
        if int(high) - int(low) >= most:
            raise ValueError(f"{item!r}: more than {_MOST_NAMES} names")
        found += [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return found
