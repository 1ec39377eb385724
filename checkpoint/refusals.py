"""What to tell a user whose state holds something that cannot be saved: its name, and what to save instead.

Only words; the decision that it cannot be saved is made by `objects.py` and `stateful.py`.
"""

import dataclasses
import enum
import io
import types
from collections.abc import Iterator

__all__ = ["advice", "type_name"]

_CODE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_CONVERTIBLE = (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset)


def type_name(value: object) -> str:
    """ "a train.Model", "the function train.<lambda>": enough to find it in the program."""
    if isinstance(value, _CODE):
        module = getattr(value, "__module__", None)
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        sort = "class" if isinstance(value, type) else type(value).__name__
        return f"the {sort} {f'{module}.' if module else ''}{name}"
    kind = type(value)
    full = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {full}"


def advice(value: object) -> str:
    """What to do about a value that the codec does not take."""
    if isinstance(value, _CODE):
        return "code is not saved: let the program make it again, and save what it needs as plain values"
    if isinstance(value, (io.IOBase, Iterator)):
        return "its position cannot be saved from outside: save how far it has come as an int"
    if isinstance(value, enum.Enum):
        return "save its `.name` or `.value`"
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "save `value._asdict()`, or a plain tuple"
    if dataclasses.is_dataclass(value):
        return "save `dataclasses.asdict(value)`"
    if hasattr(value, "state_dict"):
        return "save its `state_dict()`, or name it in the state by itself"
    for base in _CONVERTIBLE:
        if isinstance(value, base):
            return f"a subclass would not come back as what it was: convert it with `{base.__name__}(value)`"
    return "save plain values, or give its class `state_dict()` and `load_state_dict()` and name it in the state"
