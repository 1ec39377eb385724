"""What one rank does in a collective, step by step: what it sends, where what it receives goes, and what it adds up.

Pure, and the same for every rank but for its own place, so nothing is agreed upon by messages. A step's flows are those
of all ranks, which is what the planner needs; `sends` and `receives` name this rank's own by their number among them.
Buffers have names, and a region is bytes of one: "input", "output", and "spare" for what is on its way. How a script is
carried out stands in `execute.py`, which of several is taken in `choice.py`.

    reduce-scatter   around a ring (Patarasuk and Yuan, 2009), direct (everybody sends each part to its owner), or by
                     halves (Rabenseifner, 2004)
    all-gather       around a ring, direct, or by doubling
    all-reduce       a reduce-scatter and an all-gather of the same parts
    all-to-all       direct
    broadcast        down a binomial tree, or scattered and gathered (van de Geijn)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from resilient.comms.flows import Flow, Step, bounds, tree_broadcast


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes `begin` to `end` of the buffer called `buffer`."""

    buffer: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Fold:
    """`into` becomes the reduction of `parts`, in their order; `last`: nothing is added to it any more."""

    into: Region
    parts: tuple[Region, ...]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One step of one rank. Folds run when all that it receives is there."""

    flows: Step
    sends: Mapping[int, Region] = field(default_factory=dict)
    receives: Mapping[int, Region] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """`spare`: bytes of that buffer. `name` is what all ranks must have chosen alike."""

    name: str
    turns: tuple[Turn, ...]
    spare: int = 0


def ring_reduce_scatter(order: Sequence[int], rank: int, at: Sequence[int], output: Region) -> Script:
    """Part r of "input", bytes at[r] to at[r + 1], is reduced into `output` at rank r.

    `order`: the ranks as they stand in the ring. A part is added up in the order of the ring, beginning behind its
    owner, whatever the lanes do. "input" is not changed unless it is where `output` lies.
    """
    count, place = len(order), list(order).index(rank)
    room = max(at[part + 1] - at[part] for part in range(count))

    def part(where: int) -> Region:
        owner = order[where % count]
        return Region("input", at[owner], at[owner + 1])

    turns = []
    for step in range(count - 1):
        flows = tuple(
            Flow(order[p], order[(p + 1) % count], part(p - 1 - step).nbytes) for p in range(count)
        )  # flow p begins at place p
        own = part(place - 2 - step)
        last = step == count - 2
        arrived = _slot(step, room, own.nbytes)
        into = output if last else arrived
        sent = part(place - 1) if not step else _slot(step - 1, room, part(place - 1 - step).nbytes)
        turns.append(
            Turn(
                flows=flows,
                sends={place: sent},
                receives={(place - 1) % count: arrived},
                folds=(Fold(into, (arrived, own), last),),
            )
        )
    return Script(name="ring", turns=tuple(turns), spare=2 * room)


def _slot(step: int, room: int, nbytes: int) -> Region:
    """What arrives in one step is passed on in the next, while the next arrives: two slots in turn."""
    begin = step % 2 * room
    return Region("spare", begin, begin + nbytes)


def direct_reduce_scatter(order: Sequence[int], rank: int, at: Sequence[int], output: Region) -> Script:
    """The same in one step. A part is added up in the order of the ranks, in one go."""
    count = len(order)
    own = Region("input", at[rank], at[rank + 1])
    flows = [Flow(i, j, at[j + 1] - at[j]) for i in range(count) for j in range(count) if i != j]
    sends, receives, parts, begin = {}, {}, [], 0
    for number, flow in enumerate(flows):
        if flow.source == rank:
            sends[number] = Region("input", at[flow.target], at[flow.target + 1])
    by_source = {flow.source: number for number, flow in enumerate(flows) if flow.target == rank}
    for source in range(count):
        if source == rank:
            parts.append(own)
            continue
        receives[by_source[source]] = Region("spare", begin, begin + own.nbytes)
        parts.append(receives[by_source[source]])
        begin += own.nbytes
    turn = Turn(flows=tuple(flows), sends=sends, receives=receives, folds=(Fold(output, tuple(parts), True),))
    return Script(name="direct", turns=(turn,), spare=begin)


def ring_all_gather(order: Sequence[int], rank: int, at: Sequence[int]) -> Script:
    """Part r of "output" is at rank r in the beginning, and everywhere in the end."""
    count, place = len(order), list(order).index(rank)

    def part(where: int) -> Region:
        owner = order[where % count]
        return Region("output", at[owner], at[owner + 1])

    turns = [
        Turn(
            flows=tuple(Flow(order[p], order[(p + 1) % count], part(p - step).nbytes) for p in range(count)),
            sends={place: part(place - step)},
            receives={(place - 1) % count: part(place - 1 - step)},
        )
        for step in range(count - 1)
    ]
    return Script(name="ring", turns=tuple(turns))


def direct_all_gather(order: Sequence[int], rank: int, at: Sequence[int]) -> Script:
    """The same in one step: everybody sends its part to all others."""
    count = len(order)
    flows = tuple(Flow(i, j, at[i + 1] - at[i]) for i in range(count) for j in range(count) if i != j)
    own = {number: flow for number, flow in enumerate(flows) if rank in (flow.source, flow.target)}
    regions = {number: Region("output", at[flow.source], at[flow.source + 1]) for number, flow in own.items()}
    sends = {number: regions[number] for number, flow in own.items() if flow.source == rank}
    receives = {number: regions[number] for number, flow in own.items() if flow.target == rank}
    return Script(name="direct", turns=(Turn(flows=flows, sends=sends, receives=receives),))


def halving_reduce_scatter(ranks: int, rank: int, at: Sequence[int], output: Region) -> Script:
    """The same in log2(ranks) steps, which must be a power of two: halves are exchanged at ever smaller distances."""
    half = max(at[ranks // 2], at[-1] - at[ranks // 2])
    turns: list[Turn] = []
    distance = ranks // 2
    base = at[rank // distance * distance]  # of what is kept of the first step, which lies at the beginning of "spare"
    while distance:
        own, other = rank // distance * distance, (rank ^ distance) // distance * distance
        flows = _exchange(ranks, distance, at, lambda there, far: there // far * far)
        into = Region("spare", at[own] - base, at[own + distance] - base)
        arrived = Region("spare", half, half + into.nbytes)
        first, last = not turns, distance == 1
        kept = Region("input", at[own], at[own + distance]) if first else into
        held, back = ("input", 0) if first else ("spare", base)
        sent = Region(held, at[other] - back, at[other + distance] - back)
        turns.append(
            Turn(
                flows=flows,
                sends={rank: sent},
                receives={rank ^ distance: arrived},
                folds=(Fold(output if last else into, (kept, arrived), last),),
            )
        )
        distance //= 2
    return Script(name="halving", turns=tuple(turns), spare=2 * half)


def doubling_all_gather(ranks: int, rank: int, at: Sequence[int]) -> Script:
    """The same in log2(ranks) steps, which must be a power of two: what each has doubles."""
    turns = []
    distance = 1
    while distance < ranks:
        own, other = rank // distance * distance, (rank ^ distance) // distance * distance
        flows = _exchange(ranks, distance, at, lambda there, far: (there ^ far) // far * far)
        turns.append(
            Turn(
                flows=flows,
                sends={rank: Region("output", at[own], at[own + distance])},
                receives={rank ^ distance: Region("output", at[other], at[other + distance])},
            )
        )
        distance *= 2
    return Script(name="doubling", turns=tuple(turns))


def _exchange(ranks: int, distance: int, at: Sequence[int], of: Callable[[int, int], int]) -> Step:
    """Flow r begins at rank r, and carries `distance` parts, from number `of(target, distance)` on."""
    begins = [of(one ^ distance, distance) for one in range(ranks)]
    return tuple(Flow(one, one ^ distance, at[b + distance] - at[b]) for one, b in enumerate(begins))


def tree(ranks: int, rank: int, nbytes: int, root: int) -> Script:
    """The whole of "output" down a binomial tree."""
    whole = Region("output", 0, nbytes)
    turns = []
    for step in tree_broadcast(ranks, nbytes, root):
        sends = {number: whole for number, flow in enumerate(step) if flow.source == rank}
        receives = {number: whole for number, flow in enumerate(step) if flow.target == rank}
        turns.append(Turn(flows=step, sends=sends, receives=receives))
    return Script(name="tree", turns=tuple(turns))


def scatter(ranks: int, rank: int, at: Sequence[int], root: int) -> Script:
    """The root sends part r of "output" to rank r."""
    flows = tuple(Flow(root, other, at[other + 1] - at[other]) for other in range(ranks) if other != root)
    regions = [Region("output", at[flow.target], at[flow.target + 1]) for flow in flows]
    sends = dict(enumerate(regions)) if rank == root else {}
    receives = {number: regions[number] for number, flow in enumerate(flows) if flow.target == rank}
    return Script(name="scatter", turns=(Turn(flows=flows, sends=sends, receives=receives),))


def all_to_all(rank: int, sent: Sequence[int], received: Sequence[int]) -> Script:
    """Bytes sent[r] of "input" go to rank r, bytes received[r] of "output" come from it; own bytes are not moved.

    What others send to one another is not known here, nor needed: the flows are those that begin or end at this rank,
    and where all are of one size, all.
    """
    ranks = len(sent)
    out, into = _offsets(sent), _offsets(received)
    if len({*sent, *received}) == 1:
        flows = [Flow(i, j, sent[0]) for i in range(ranks) for j in range(ranks) if i != j]
    else:
        flows = [Flow(rank, other, sent[other]) for other in range(ranks) if other != rank]
        flows += [Flow(other, rank, received[other]) for other in range(ranks) if other != rank]
    sends = {
        number: Region("input", out[flow.target], out[flow.target + 1])
        for number, flow in enumerate(flows)
        if flow.source == rank
    }
    receives = {
        number: Region("output", into[flow.source], into[flow.source + 1])
        for number, flow in enumerate(flows)
        if flow.target == rank
    }
    return Script(name="direct", turns=(Turn(flows=tuple(flows), sends=sends, receives=receives),))


def _offsets(sizes: Sequence[int]) -> list[int]:
    at = [0]
    for size in sizes:
        at.append(at[-1] + size)
    return at


def parts(nbytes: int, ranks: int, item: int) -> list[int]:
    """Where a tensor is cut for its owners: at whole items, as evenly as can be."""
    return bounds(nbytes, ranks, item)


def ring_order(leaf_of: Sequence[int]) -> tuple[int, ...]:
    """Ranks of one leaf next to one another: then one flow leaves each leaf, and one comes."""
    return tuple(sorted(range(len(leaf_of)), key=lambda rank: (leaf_of[rank], rank)))


def joined(first: Script, second: Script) -> Script:
    """One after the other."""
    name = first.name if first.name == second.name else f"{first.name} and {second.name}"
    return Script(name=name, turns=first.turns + second.turns, spare=max(first.spare, second.spare))
