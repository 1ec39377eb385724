"""What a foreign pickle's tree holds in place of tensors and of unknown objects."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from resilient.checkpoint.catalog.catalog import ITEMSIZES

__all__ = ["Opaque", "StoredTensor"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: its first element at byte `offset` of the file, the others by `strides`.

    `dtype`: torch's name without the prefix. `strides` are in elements. `storage` is the key of its storage in the
    archive: tensors of one storage share memory.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: str

    def __reduce__(self) -> Any:
        return StoredTensor, (self.dtype, self.shape, self.strides, self.offset, self.storage)

    def __setstate__(self, state: Any) -> NoReturn:  # else a pickle could change one past all checks
        raise TypeError("a tensor has no state")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of its elements; they may lie in more, or (expanded) in fewer."""
        return self.numel * ITEMSIZES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True


class Opaque:
    """An object of a class that is not imported: `name` of the class, and what its pickle had for it.

    `args`: of its constructor or `__new__`. `state`: its attributes, mostly a dict; None where the pickle has none.
    `items`: what was appended to it, or its (key, value) pairs, where it is a kind of list or dict.
    """

    __slots__ = ("args", "items", "state")
    name: ClassVar[str] = ""
    args: Any
    state: Any
    items: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> "Opaque":
        made = super().__new__(cls)
        made.args = (*args, kwargs) if kwargs else args
        made.state = None
        made.items = []
        return made

    def __setstate__(self, state: Any) -> None:
        if not isinstance(self, Opaque):  # BUILD on the class itself
            raise TypeError("a class has no state")
        self.state = state

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"Opaque({self.name}, {self.args!r}, {self.state!r})"
