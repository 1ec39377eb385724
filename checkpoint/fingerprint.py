"""Sampled fingerprints: did a tensor change between the save and the end of its copy? (law 2)

A few dozen elements of every tensor are read on the training thread when `save` is called, all of them in one
vectorised gather over raw addresses, and are compared with the image when it is complete. `_version` alone does not
see fused optimizers or `.data` writes. Works on host memory only; `device.py` does the same on an accelerator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_WORDS = (4, 2, 1)
_TOTAL = 1 << 14
_MOST = 32
_LEAST = 2


@dataclass(frozen=True, slots=True)
class Sampled:
    """A strided host tensor's elements [start, stop) and where they go in the image."""

    tensor: torch.Tensor
    start: int
    stop: int
    image_offset: int


@dataclass(slots=True)
class _Gather:
    """Addresses to read, in words of one size, and the image positions that must hold the same."""

    word: int
    indices: NDArray[np.int64]
    positions: NDArray[np.int64]
    owners: NDArray[np.int64]
    memory: NDArray[np.unsignedinteger]


class _Address:
    """The array interface of raw memory, so that numpy can read it in place."""

    def __init__(self, address: int, words: int, word: int) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (words,), "typestr": f"<u{word}", "version": 3}


Samples = list[NDArray[np.unsignedinteger]]


class Fingerprints:
    """Where to sample each of a plan's tensors. Made once per plan; holds addresses, so its owner keeps the tensors."""

    def __init__(self, sampled: Sequence[Sampled]) -> None:
        each = max(_LEAST, min(_MOST, _TOTAL // max(1, len(sampled))))
        by_word: dict[int, list[tuple[int, Sampled]]] = {word: [] for word in _WORDS}
        for number, one in enumerate(sampled):
            if one.stop > one.start:
                by_word[_word_of(one)].append((number, one))
        self._gathers = [_gather(rows, word, each) for word, rows in by_word.items() if rows]

    def take(self) -> Samples:
        """Read the samples now. Costs some ten nanoseconds a sample; blocks on nothing."""
        return [np.take(gather.memory, gather.indices) for gather in self._gathers]

    def changed(self, samples: Samples, image: memoryview) -> list[int]:
        """The numbers of the tensors whose bytes in the image are not the ones that were sampled."""
        bad: set[int] = set()
        for gather, before in zip(self._gathers, samples, strict=True):
            words = np.frombuffer(image[: len(image) // gather.word * gather.word], dtype=f"<u{gather.word}")
            differs = words[gather.positions] != before
            bad.update(gather.owners[differs].tolist())
        return sorted(bad)


def _gather(sampled: list[tuple[int, Sampled]], word: int, each: int) -> _Gather:
    even = [(i, s) for i, s in sampled if s.tensor.is_contiguous()]
    parts = [_words(i, s, word, each) for i, s in sampled if not s.tensor.is_contiguous()]
    if even:
        parts.append(_words_of_many(even, word, each))
    addresses, positions, owners = (np.concatenate(column) for column in zip(*parts, strict=True))
    base = int(addresses.min())
    span = int(addresses.max()) - base + word
    return _Gather(
        word=word,
        indices=(addresses - base) // word,
        positions=positions // word,
        owners=owners,
        memory=np.asarray(_Address(base, span // word, word)),
    )


def _word_of(one: Sampled) -> int:
    """The largest word that divides an element, its address and its place in the image."""
    together = one.tensor.element_size() | one.tensor.data_ptr() | one.image_offset
    return min(_WORDS[0], together & -together)


_Columns = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Addresses, image positions, and the number of the tensor of each sample."""


def _words_of_many(sampled: list[tuple[int, Sampled]], word: int, each: int) -> _Columns:
    """Samples of contiguous tensors, `each` of them spread over all of every tensor; all tensors at once."""
    rows = np.array(
        [
            (
                i,
                s.tensor.data_ptr() + s.start * (size := s.tensor.element_size()),
                s.stop - s.start,
                size,
                s.image_offset,
            )
            for i, s in sampled
        ],
        dtype=np.int64,
    )
    numbers, addresses, counts, sizes, offsets = (rows[:, column, None] for column in range(5))
    elements = _spread(counts, each)
    inside = elements * sizes + _inner(elements, sizes, word)
    return (addresses + inside).ravel(), (offsets + inside).ravel(), np.broadcast_to(numbers, inside.shape).ravel()


def _words(number: int, one: Sampled, word: int, each: int) -> _Columns:
    """Samples of one tensor with any strides; its copy in the image is contiguous."""
    size, count = one.tensor.element_size(), one.stop - one.start
    elements = _spread(np.int64(count), each)
    indices = np.unravel_index(elements + one.start, tuple(one.tensor.shape))
    address = np.full(each, one.tensor.data_ptr(), np.int64)
    for index, stride in zip(indices, one.tensor.stride(), strict=True):
        address += index.astype(np.int64) * (stride * size)
    inner = _inner(elements, np.int64(size), word)
    return address + inner, one.image_offset + elements * size + inner, np.full(each, number, np.int64)


def _spread(counts: NDArray[np.int64] | np.int64, each: int) -> NDArray[np.int64]:
    """`each` elements of so many, from the first to the last."""
    return (counts - 1) * np.arange(each, dtype=np.int64) // max(1, each - 1)


def _inner(elements: NDArray[np.int64], sizes: NDArray[np.int64] | np.int64, word: int) -> NDArray[np.int64]:
    """Which word of a wide element: not always the same one."""
    return elements * 7919 % np.maximum(1, sizes // word) * word
