"""Ranks' tensors and a cut → the global tensor and its pieces. Pure.

A rank holds a slice, or a flat range of one as ZeRO leaves it. Where the slice lies in the whole in one part, it is one
piece; where it does not (sub-parameters of which each is cut by itself, padding at the end), it is several boxes with
the strides of the slice. Of copies one is taken, another one from tensor to tensor, so that all are read evenly.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from zlib import crc32

from resilient.checkpoint.catalog.cut import Cut
from resilient.checkpoint.catalog.meet import Box, boxes_of_range, intersect
from resilient.checkpoint.catalog.table import StoredPiece, row_major
from resilient.checkpoint.pieces import Piece
from resilient.errors import LayoutMismatch

Key = tuple[int, ...]
"""The coordinates along the axes of a cut, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one rank has of a tensor: elements [start, stop), row-major, of its slice of the shape `shape`.

    `at`: the rank's coordinates in the mesh; an axis that is not named counts as 0. `offset`: of the first element, in
    bytes, in file number `file` of the catalog. `stop` None: to the end. `strides`, in elements: of a whole slice that
    is not row-major. Raises ValueError for a range outside of the slice, and for strides of a part of one.
    """

    at: Mapping[str, int]
    shape: tuple[int, ...]
    file: int
    offset: int
    start: int = 0
    stop: int | None = None
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= math.prod(self.shape):
            raise ValueError(f"elements {self.start} to {self.end} are not in a slice of shape {self.shape}")
        if self.strides is not None and (self.start, self.end) != (0, math.prod(self.shape)):
            raise ValueError("a part of a slice is stored row-major, not with strides of its own")

    @property
    def end(self) -> int:
        return math.prod(self.shape) if self.stop is None else self.stop


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a rank's slice, at `local`, and where it lies in the global tensor."""

    local: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def assemble(name: str, cut: Cut, held: Sequence[Held], itemsize: int) -> tuple[tuple[int, ...], list[StoredPiece]]:
    """The global shape, and pieces that have each of its elements once.

    Of averaged and unique tensors it is the first rank's, as `held` is ordered (`Catalog.own` is for the others).
    Raises LayoutMismatch where the slices make up no tensor: ranks that are missing, shapes that do not fit together,
    elements that nobody has.
    """
    if not held:
        raise LayoutMismatch(f"no rank has {name}")
    cut.check(name, len(held[0].shape))
    if cut.how in ("averaged", "unique"):
        first = held[0].at
        held = _where(held, first if cut.how == "unique" else {axis: first.get(axis, 0) for axis in cut.averaged})
    slices = _by_slice(name, cut, held)
    whole = _Whole.of(name, cut, {key: copies[0].shape for key, copies in slices.items()})
    if not math.prod(whole.shape):
        return whole.shape, [StoredPiece(piece=Piece.whole(whole.shape), file=held[0].file, offset=held[0].offset)]
    pieces: list[StoredPiece] = []
    for number, (key, copies) in enumerate(sorted(slices.items())):
        regions = list(whole.regions(key))
        turn = crc32(name.encode()) + number
        for one, start, stop in _once(name, copies, turn):
            pieces += _pieces(one, start, stop, regions, whole.shape, itemsize)
    return whole.shape, pieces


def regions_of(
    name: str, cut: Cut, shape: Sequence[int], at: Mapping[str, int], sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], list[Region]]:
    """Which parts of the global tensor a rank's slice is, in a job that cuts evenly: a layout, said by specification.

    `shape`: of the slice; `at`: the rank's coordinates; `sizes`: of the axes of the mesh. Returns the global shape
    and the regions. Raises LayoutMismatch.
    """
    cut.check(name, len(shape))
    keys = product(*(range(sizes.get(axis, 1)) for axis in cut.axes))
    whole = _Whole.of(name, cut, dict.fromkeys(keys, tuple(shape)))
    return whole.shape, list(whole.regions(tuple(at.get(axis, 0) for axis in cut.axes)))


@dataclass(frozen=True, slots=True)
class _Span:
    """Along one dimension: `size` elements at `local` of a slice are those at `offset` of the whole."""

    local: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class _Whole:
    """The global tensor: its shape, and for each slice its spans by dimension."""

    shape: tuple[int, ...]
    spans: Mapping[Key, list[list[_Span]]]

    @classmethod
    def of(cls, name: str, cut: Cut, shapes: Mapping[Key, tuple[int, ...]]) -> "_Whole":
        dims = len(next(iter(shapes.values())))
        spans: dict[Key, list[list[_Span]]] = {key: [] for key in shapes}
        shape: list[int] = []
        for dim in range(dims):
            size, found = _along(name, cut, dim, shapes)
            shape.append(size)
            for key, one in found.items():
                spans[key].append(one)
        return cls(tuple(shape), spans)

    def regions(self, key: Key) -> Iterator[Region]:
        for spans in product(*self.spans[key]):
            yield Region(
                tuple(span.local for span in spans),
                tuple(span.offset for span in spans),
                tuple(span.size for span in spans),
            )


def _along(name: str, cut: Cut, dim: int, shapes: Mapping[Key, tuple[int, ...]]) -> tuple[int, dict[Key, list[_Span]]]:
    """The size of the whole along a dimension, without padding, and the spans of each slice there."""
    places = [cut.axes.index(axis) for axis in cut.over(dim)]
    widths: dict[Key, int] = {}  # by the coordinates that matter for this dimension
    for key, shape in sorted(shapes.items()):
        mine = tuple(key[place] for place in places)
        if widths.setdefault(mine, shape[dim]) != shape[dim]:
            raise LayoutMismatch(
                f"{name}: slices have {widths[mine]} and {shape[dim]} elements along dimension {dim}, where the cut "
                f"for {cut.text} wants them equal (ranks at {dict(zip(cut.axes, key, strict=True))})"
            )
    fused = cut.sub_parameters
    if fused is None or fused.dim != dim:
        size, spans = _plain(widths)
    elif len(set(widths.values())) > 1:
        raise LayoutMismatch(f"{name}: slices with sub-parameters have different sizes: {list(widths.values())}")
    else:
        size, spans = _fused(widths, fused.spans(next(iter(widths.values())), name))
    if cut.padded is not None and cut.padded.dim == dim and cut.padded.size is not None:
        size, spans = _clipped(name, size, spans, cut.padded.size)
    return size, {key: spans[tuple(key[place] for place in places)] for key in shapes}


def _plain(widths: Mapping[Key, int]) -> tuple[int, dict[Key, list[_Span]]]:
    begin, spans = 0, {}
    for key in sorted(widths):
        spans[key] = [_Span(0, begin, widths[key])]
        begin += widths[key]
    return begin, spans


def _fused(widths: Mapping[Key, int], parts: Sequence[tuple[int, int]]) -> tuple[int, dict[Key, list[_Span]]]:
    ways = len(widths)
    spans = {
        key: [_Span(begin, begin * ways + width * number, width) for begin, width in parts]
        for number, key in enumerate(sorted(widths))
    }
    return sum(widths.values()), spans


def _clipped(name: str, size: int, spans: Mapping[Key, list[_Span]], real: int) -> tuple[int, dict[Key, list[_Span]]]:
    if real > size:
        raise LayoutMismatch(f"{name} has {size} elements, padding included; the specification says {real} without")
    clipped = {
        key: [_Span(one.local, one.offset, min(one.size, real - one.offset)) for one in own if one.offset < real]
        for key, own in spans.items()
    }
    return real, clipped


def _by_slice(name: str, cut: Cut, held: Sequence[Held]) -> dict[Key, list[Held]]:
    """What is held of each slice; every combination of coordinates must be there."""
    slices: dict[Key, list[Held]] = {}
    for one in held:
        copies = slices.setdefault(tuple(one.at.get(axis, 0) for axis in cut.axes), [])
        if copies and copies[0].shape != one.shape:
            raise LayoutMismatch(
                f"{name}: ranks that should have the same have shapes {copies[0].shape} at {dict(copies[0].at)} and "
                f"{one.shape} at {dict(one.at)}; the cut for {cut.text} does not say that they differ"
            )
        if len(one.shape) != len(held[0].shape):
            raise LayoutMismatch(f"{name}: ranks have {len(held[0].shape)} and {len(one.shape)} dimensions of it")
        copies.append(one)
    ends = [max(key[place] for key in slices) + 1 for place in range(len(cut.axes))]
    for key in product(*map(range, ends)):
        if key not in slices:
            raise LayoutMismatch(
                f"{name}: the slice of the ranks at {dict(zip(cut.axes, key, strict=True))} is missing"
            )
    return slices


def _where(held: Sequence[Held], at: Mapping[str, int]) -> list[Held]:
    return [one for one in held if all(one.at.get(axis, 0) == index for axis, index in at.items())]


def _once(name: str, copies: Sequence[Held], turn: int) -> Iterator[tuple[Held, int, int]]:
    """Ranges of a slice that have each element once; of equal copies the `turn`-th."""
    numel, done = math.prod(copies[0].shape), 0
    while done < numel:
        reach = max((one.end for one in copies if one.start <= done), default=done)
        if reach <= done:
            later = min((one.start for one in copies if one.start > done), default=numel)
            raise LayoutMismatch(
                f"{name}: elements {done} to {later} of a slice of shape {copies[0].shape} are nowhere"
            )
        best = [one for one in copies if one.start <= done and one.end == reach]
        yield best[turn % len(best)], done, min(reach, numel)
        done = reach


def _pieces(
    held: Held, start: int, stop: int, regions: Sequence[Region], shape: tuple[int, ...], itemsize: int
) -> Iterator[StoredPiece]:
    """Elements [start, stop) of what is held, as pieces of the whole."""
    strides = held.strides or row_major(held.shape)
    if len(regions) == 1 and regions[0].sizes == held.shape and strides == row_major(held.shape):
        box = Piece.box(shape, regions[0].offsets, held.shape)
        offset = held.offset + (start - held.start) * itemsize
        yield StoredPiece(piece=box.part(start, stop), file=held.file, offset=offset)
        return
    origin = held.offset - held.start * itemsize
    for box_ in boxes_of_range(start, stop, held.shape):
        for region in regions:
            found = intersect(box_, (region.local, region.sizes))
            if found is not None:
                yield _boxed(found, region, held.file, origin, strides, shape, itemsize)


def _boxed(
    box: Box, region: Region, file: int, origin: int, strides: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> StoredPiece:
    at, sizes = box
    offsets = tuple(a - b + c for a, b, c in zip(at, region.local, region.offsets, strict=True))
    first = origin + itemsize * sum(a * s for a, s in zip(at, strides, strict=True))
    return StoredPiece(piece=Piece.box(shape, offsets, sizes), file=file, offset=first, strides=strides)
