"""Sampled fingerprints: did a tensor change between the save and the end of its copy? (law 2)

A few dozen elements of every tensor are read on the training thread when `save` is called, all of them in one
vectorised gather over raw addresses, and are compared with the image when it is complete. `_version` alone does not
see fused optimizers or `.data` writes. Works on host memory only; `device.py` does the same on an accelerator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

_WORDS = (4, 2, 1)
_TOTAL = 1 << 16
_MOST = 32
_LEAST = 4


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
    base: int = 0
    indices: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    positions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    owners: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    memory: NDArray[np.unsignedinteger] = field(default_factory=lambda: np.empty(0, np.uint8))


class _Address:
    """The array interface of raw memory, so that numpy can read it in place."""

    def __init__(self, address: int, words: int, word: int) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (words,), "typestr": f"<u{word}", "version": 3}


Samples = list[NDArray[np.unsignedinteger]]


class Fingerprints:
    """Where to sample each of a plan's tensors. Made once per plan; holds addresses, so its owner keeps the tensors."""

    def __init__(self, sampled: Sequence[Sampled]) -> None:
        self._gathers = [
            gather for word in _WORDS if (gather := _gather([(i, s) for i, s in enumerate(sampled)], word)) is not None
        ]

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


def _gather(sampled: list[tuple[int, Sampled]], word: int) -> _Gather | None:
    chosen = [(i, s) for i, s in sampled if _word_of(s) == word and s.stop > s.start]
    if not chosen:
        return None
    each = max(_LEAST, min(_MOST, _TOTAL // max(1, len(sampled))))
    addresses, positions, owners = [], [], []
    for number, one in chosen:
        source, target = _words(one, word, each)
        addresses.append(source)
        positions.append(target)
        owners.append(np.full(len(source), number, np.int64))
    flat = np.concatenate(addresses)
    base = int(flat.min())
    span = int(flat.max()) - base + word
    return _Gather(
        word=word,
        base=base,
        indices=(flat - base) // word,
        positions=np.concatenate(positions) // word,
        owners=np.concatenate(owners),
        memory=np.asarray(_Address(base, span // word, word)),
    )


def _word_of(one: Sampled) -> int:
    """The largest word that divides an element, its address and its place in the image."""
    itemsize = one.tensor.element_size()
    for word in _WORDS:
        if itemsize % word == 0 and one.tensor.data_ptr() % word == 0 and one.image_offset % word == 0:
            return word
    return 1


def _words(one: Sampled, word: int, each: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Addresses and image positions of up to `each` sampled words of one tensor, spread over all of it."""
    itemsize, count = one.tensor.element_size(), one.stop - one.start
    elements = np.unique(np.linspace(0, count - 1, min(each, count)).astype(np.int64))
    indices = np.unravel_index(elements + one.start, tuple(one.tensor.shape)) if one.tensor.dim() else ()
    address = np.full(len(elements), one.tensor.data_ptr(), np.int64)
    for index, stride in zip(indices, one.tensor.stride(), strict=True):
        address += index.astype(np.int64) * (stride * itemsize)
    inner = (elements * 7919 % max(1, itemsize // word)) * word  # not always the same word of a wide element
    return address + inner, one.image_offset + elements * itemsize + inner
