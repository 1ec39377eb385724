"""Explores every interleaving of small programs that share memory as GPUs do: plain stores arrive late, in any order.

A rank runs calls one after another. A call is a set of programs, which run at once, or one after another as in Triton's
interpreter. A program is a straight line of the operations below. A plain store waits in its program's queue until it
arrives by itself, which may be at any time, or until the program releases a signal, which all its earlier stores
precede. A wait may be given up: some at any time, then all, because giving up tells all ranks; the rank's call then
raises. `explore` tries all orders and reports the first read of a wrong value, or state that nothing leads out of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Cell = tuple[int, str]  # the rank whose memory it is in, and its name there
Value = int


@dataclass(frozen=True, slots=True)
class Store:
    """A plain store: seen by others sooner or later."""

    cell: Cell
    value: Value


@dataclass(frozen=True, slots=True)
class Release:
    """A signal that is seen after all earlier stores of its program."""

    cell: Cell
    value: Value


@dataclass(frozen=True, slots=True)
class Wait:
    """Goes on once the cell has this value, or given up."""

    cell: Cell
    value: Value


@dataclass(frozen=True, slots=True)
class Read:
    """Must find this value, or the protocol is wrong. Not where the rank has given up, for then its call raises.

    What the program stores later is wrong, too.
    """

    cell: Cell
    value: Value


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the program if its rank has given up."""


Step = Store | Release | Wait | Read | Stop
Program = tuple[Step, ...]
Call = tuple[Program, ...]
Rank = tuple[Call, ...]

# (call number, position in each program, stores on their way from each program) of each rank, and the memory.
_Queue = frozenset[tuple[Cell, Value]]
_Local = tuple[int, tuple[int, ...], tuple[_Queue, ...]]
_State = tuple[tuple[_Local, ...], frozenset[tuple[Cell, Value]]]
_FAILED, _GIVEN_UP = "failed", "given up"  # of a rank: it has been told to give up; it has done so
_WRONG: Value = -1
_TIMEOUTS: Cell = (-1, "timeouts")  # how many there were


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wrong`: what went wrong first, or None when every interleaving ends well."""

    states: int
    wrong: str | None


def explore(ranks: Sequence[Rank], *, at_once: bool, timeouts: int = 0, most_states: int = 2_000_000) -> Outcome:
    """All interleavings. `at_once`: the programs of a call run concurrently, else one after another.

    `timeouts`: how many waits may be given up, whenever that is, before anybody was told to.
    """
    start: _State = (tuple(_enter(rank, 0) for rank in ranks), frozenset())
    seen, queue = {start}, [start]
    while queue:
        state = queue.pop()
        moved = False
        for after in _moves(ranks, state, at_once, timeouts):
            if isinstance(after, str):
                return Outcome(len(seen), after)
            moved = True
            if after not in seen:
                seen.add(after)
                queue.append(after)
        if len(seen) > most_states:
            raise AssertionError(f"more than {most_states} states: make the model smaller")
        if not moved and any(call < len(rank) for (call, _, _), rank in zip(state[0], ranks, strict=True)):
            return Outcome(len(seen), f"nobody can go on: {[local[:2] for local in state[0]]}")
    return Outcome(len(seen), None)


def _enter(rank: Rank, call: int) -> _Local:
    programs = len(rank[call]) if call < len(rank) else 0
    return (call, (0,) * programs, (frozenset(),) * programs)


def _moves(ranks: Sequence[Rank], state: _State, at_once: bool, timeouts: int) -> Iterator[_State | str]:
    locals_, memory = state
    known = dict(memory)
    for number, (call, positions, queues) in enumerate(locals_):
        given_up = (number, _GIVEN_UP) in known
        for index, queue in enumerate(queues):
            for cell, value in queue:  # one store arrives
                rest = _replaced(queues, index, queue - {(cell, value)})
                local = _advanced(ranks[number], (call, positions, rest), given_up)
                yield _with(locals_, number, local), _stored(known, [(cell, value)])
        for index in _runnable(ranks[number], call, positions, at_once):
            program = ranks[number][call][index]
            step = program[positions[index]]
            spoilt = (number, f"wrong in program {index} of call {call}")
            if isinstance(step, Store) and spoilt in known:
                step = Store(step.cell, _WRONG)
            queue, arrived = _effect(step, queues[index])
            if isinstance(step, Read) and known.get(step.cell, 0) != step.value:
                if not given_up:
                    yield f"rank {number}, call {call}: {step} found {known.get(step.cell, 0)}"
                    return
                arrived = [(spoilt, 1)]
            if isinstance(step, Wait) and known.get(step.cell, 0) != step.value:
                arrived = _giving_up(known, number, len(ranks), timeouts)
                if not arrived:
                    continue
            after = len(program) if isinstance(step, Stop) and given_up else positions[index] + 1
            local = (call, _replaced(positions, index, after), _replaced(queues, index, queue))
            raises = given_up or ((number, _GIVEN_UP), 1) in arrived
            yield _with(locals_, number, _advanced(ranks[number], local, raises)), _stored(known, arrived)


def _giving_up(known: dict[Cell, Value], rank: int, world: int, timeouts: int) -> list[tuple[Cell, Value]]:
    """What is written when a rank gives up a wait; nothing if it may not."""
    told, used = (rank, _FAILED) in known, known.get(_TIMEOUTS, 0)
    if not told and used >= timeouts:
        return []
    words: list[tuple[Cell, Value]] = [((other, _FAILED), 1) for other in range(world)]
    return [*words, ((rank, _GIVEN_UP), 1), (_TIMEOUTS, used + (not told))]


def _effect(step: Step, queue: _Queue) -> tuple[_Queue, list[tuple[Cell, Value]]]:
    """The stores that are on their way after a step, and those that have arrived with it."""
    if isinstance(step, Store):
        return queue | {(step.cell, step.value)}, []
    if isinstance(step, Release):
        return frozenset(), [*queue, (step.cell, step.value)]
    return queue, []


def _runnable(rank: Rank, call: int, positions: tuple[int, ...], at_once: bool) -> list[int]:
    if call >= len(rank):
        return []
    open_ = [index for index, position in enumerate(positions) if position < len(rank[call][index])]
    return open_ if at_once else open_[:1]


def _advanced(rank: Rank, local: _Local, raises: bool) -> _Local:
    """The next call begins when all programs of this one are over, unless it raises: that rank makes no other.

    The end of a kernel lets its stores arrive.
    """
    call, positions, queues = local
    over = all(position == len(program) for position, program in zip(positions, rank[call], strict=True))
    return _enter(rank, len(rank) if raises else call + 1) if over and not any(queues) else local


def _stored(known: dict[Cell, Value], arrived: Sequence[tuple[Cell, Value]]) -> frozenset[tuple[Cell, Value]]:
    return frozenset({**known, **dict(arrived)}.items())


def _replaced(row: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*row[:index], value, *row[index + 1 :])


def _with(locals_: tuple[_Local, ...], number: int, local: _Local) -> tuple[_Local, ...]:
    return _replaced(locals_, number, local)
