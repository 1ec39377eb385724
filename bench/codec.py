"""How fast parity is made and lost bytes are decoded: our codec against its engine called bare, beside a memory copy.

Shards are walked in blocks of 4 MiB, as an agent does it; the same memory as numpy arrays and as torch tensors. The
engine called bare is ISA-L with tables and pointers made beforehand, so that nothing of Python's is timed but the call:
its general products and, where the coefficients are all ones, also its XOR; the faster of the two counts. All take
turns within one process, in random order, so that each meets the same machine and the same state of its caches.
"""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from bench.processes import Failure, launch
from bench.report import Report, Rounds, Target, least, ratio
from bench.settings import Settings

if TYPE_CHECKING:
    from resilient.ec.codec import Codec

CODES = ((4, 1), (4, 2), (8, 2), (8, 4), (16, 4))
MEMORIES = ("numpy", "torch")
LEAST_OF_ENGINE = 0.90

_BLOCK_BYTES = 4 << 20
_ALIGN_BYTES = 64
_CHECKED_BYTES = 1 << 16

Shards = list[list[Any]]  # shard -> its blocks, each a view
Calls = dict[str, Callable[[], None]]


def measure(*, folder: str, k: int, m: int, blocks: int, block_bytes: int, turns: int) -> dict[str, float]:
    """Seconds of each operation by each way, the median of the turns. Runs in a process of its own."""
    import torch

    from resilient.ec.codec import Codec

    codec = Codec(k, m)
    arrays = _filled(k + m, blocks, block_bytes)
    tensors: Shards = [[torch.from_numpy(block) for block in shard] for shard in arrays]
    memories = dict(zip(MEMORIES, (arrays, tensors), strict=True))
    _encode(codec, arrays)
    calls: Calls = {}
    for operation, lost in _operations(k, m).items():
        for name, shards in memories.items():
            calls[f"{operation}, {name}"] = partial(_code, codec, shards, lost)
        for name, bare in _bare(codec, arrays, lost).items():
            calls[f"{operation}, {name}"] = bare
    calls["copy"] = _copy(arrays[:k], _filled(k, blocks, block_bytes))
    found = _interleaved(calls, turns)
    _check(codec, arrays)
    return found


def _operations(k: int, m: int) -> dict[str, tuple[int, ...]]:
    """What is computed, by number of the shard: all parity, one data shard, as many data shards as can be lost."""
    return {"encode": tuple(range(k, k + m)), "one loss": (k // 2,), "m losses": tuple(range(m))}


def _filled(count: int, blocks: int, block_bytes: int) -> Shards:
    """Random shards, at the beginning of pages, as agents keep them."""
    import numpy as np

    shards = []
    for number in range(count):
        source = np.random.default_rng(number).integers(0, 256, blocks * block_bytes + 4096, dtype=np.uint8)
        first = -int(source.ctypes.data) % 4096
        whole = source[first : first + blocks * block_bytes]
        shards.append([whole[begin : begin + block_bytes] for begin in range(0, len(whole), block_bytes)])
    return shards


def _encode(codec: "Codec", shards: Shards) -> None:
    for block in zip(*shards, strict=True):
        codec.encode(block[: codec.k], block[codec.k :])


def _code(codec: "Codec", shards: Shards, lost: Sequence[int]) -> None:
    """Compute the lost shards again, where they are, block by block."""
    if lost[0] == codec.k:
        _encode(codec, shards)
        return
    for block in zip(*shards, strict=True):
        present = {number: view for number, view in enumerate(block) if number not in lost}
        codec.decode(present, {number: block[number] for number in lost})


def _bare(codec: "Codec", shards: Shards, lost: Sequence[int]) -> Calls:
    """The library's own functions on the same blocks."""
    library, plan = _library(), codec.plan([n for n in range(len(shards)) if n not in lost], lost)
    rows, columns = plan.coefficients.shape
    tables = ctypes.create_string_buffer(32 * rows * columns)
    library.ec_init_tables(columns, rows, plan.coefficients.tobytes(), tables)
    blocks = [
        (len(block[0]), _pointers([block[n] for n in plan.sources]), _pointers([block[n] for n in lost]))
        for block in zip(*shards, strict=True)
    ]
    together = [
        (len(block[0]), _pointers([block[n] for n in (*plan.sources, *lost)])) for block in zip(*shards, strict=True)
    ]

    def products() -> None:
        for nbytes, sources, targets in blocks:
            library.ec_encode_data(nbytes, columns, rows, tables, sources, targets)

    def xor() -> None:
        for nbytes, pointers in together:
            if library.xor_gen(columns + 1, nbytes, pointers):
                raise RuntimeError("the library refused to XOR")

    return (
        {"products": products, "xor": xor} if rows == 1 and (plan.coefficients == 1).all() else {"products": products}
    )


def _library() -> ctypes.CDLL:
    """The library that our codec uses, or this raises RuntimeError: there is nothing to compare with."""
    from resilient.ec.engine import default_engine

    name = default_engine().name
    if not name.startswith("isa-l ("):
        raise RuntimeError(f"there is no ISA-L here, only {name}")
    library = ctypes.CDLL(name.removeprefix("isa-l (").removesuffix(")"))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.ec_init_tables.argtypes = (integer, integer, pointer, pointer)
    library.ec_encode_data.argtypes = (integer, integer, integer, pointer, pointer, pointer)
    library.xor_gen.argtypes = (integer, integer, pointer)
    return library


def _pointers(views: Sequence[Any]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(views))(*(view.ctypes.data for view in views))


def _copy(sources: Shards, targets: Shards) -> Callable[[], None]:
    """memcpy of the data shards."""
    copy = ctypes.CDLL(None).memcpy
    copy.argtypes, copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_void_p
    pairs = [
        (to.ctypes.data, of.ctypes.data, len(of))
        for target, source in zip(targets, sources, strict=True)
        for to, of in zip(target, source, strict=True)
    ]

    def run(_kept: tuple[Shards, Shards] = (sources, targets)) -> None:
        for target, source, nbytes in pairs:
            copy(target, source, nbytes)

    return run


def _interleaved(calls: Mapping[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """The median time of each call. In each turn they come in another order: each leaves caches in another state."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names, orders = list(calls), Random(turns)
    for turn in range(turns + 1):
        orders.shuffle(names)
        for name in names:
            begun = time.perf_counter()
            calls[name]()
            if turn:  # the first is not timed
                seconds[name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}


def _check(codec: "Codec", shards: Shards) -> None:
    """All ways have computed the same, and it is right: the first bytes of each block by the tables."""
    import numpy as np

    from resilient.ec.codec import Codec
    from resilient.ec.engine import Tables

    oracle = Codec(codec.k, codec.m, Tables())
    for block in zip(*shards, strict=True):
        part = [np.asarray(view[:_CHECKED_BYTES]) for view in block]
        wrong = oracle.verify(part[: codec.k], part[codec.k :])
        if wrong or codec.verify(block[: codec.k], block[codec.k :]):
            raise RuntimeError(f"the code ({codec.k}, {codec.m}) computed wrong bytes: {wrong}")


def run(settings: Settings) -> list[Report]:
    rounds = Rounds()
    codes = {f"({k}, {m})": (k, m) for k, m in CODES}
    for number in range(settings.rounds):
        rounds.begin()
        for name in settings.turned(list(codes), number):
            settings.say(f"codec, round {number + 1} of {settings.rounds}: {name}")
            k, m = codes[name]
            arguments = {
                "k": k,
                "m": m,
                "blocks": 2 if settings.smoke else 4,
                "block_bytes": 1 << 16 if settings.smoke else _BLOCK_BYTES,
                "turns": 3 if settings.smoke else 15 if settings.quick else 31,
            }
            measured = launch(settings.place, "bench.codec:measure", arguments)
            if isinstance(measured, Failure):
                rounds.failed(name, measured.reason)
            else:
                rounds.add(name, measured)
    return [_report(rounds, list(codes))]


def _report(rounds: Rounds, names: Sequence[str]) -> Report:
    ways = [(operation, memory) for operation in ("encode", "one loss", "m losses") for memory in MEMORIES]
    speeds = {name: [_of_engine(rounds, name, *way) for way in ways] for name in names}
    beside_copy = {name: ratio(rounds.series(name, "copy"), rounds.series(name, "encode, numpy")) for name in names}
    targets = []
    for name in names:
        for what, values in (("encode", speeds[name][:2]), ("decode", speeds[name][2:])):
            known = [value for value in values if value is not None]
            worst = min(known) if len(known) == len(values) else None
            targets.append(Target(what=f"{what} {name} / engine", value=worst, bound=LEAST_OF_ENGINE, at_most=False))
    columns = [f"{operation}, {memory}" for operation, memory in ways]
    return Report(
        name="codec",
        title="Speed of the codec / speed of its engine called bare, in blocks of 4 MiB",
        columns=(*columns, "encode / memcpy"),
        rows={name: [*speeds[name], beside_copy[name]] for name in names},
        targets=targets,
        plotted=columns,
        samples=rounds.samples,
        failures=rounds.failures,
        notes=["each target is the worst of both kinds of memory, and for decode of one and of m losses"],
    )


def _of_engine(rounds: Rounds, name: str, operation: str, memory: str) -> float | None:
    """Above 1: faster than the engine called bare."""
    bare = least([rounds.series(name, f"{operation}, {way}") for way in ("products", "xor")])
    return ratio(bare, rounds.series(name, f"{operation}, {memory}"))
