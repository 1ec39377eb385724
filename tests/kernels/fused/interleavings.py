"""Explores every interleaving of small programs that share memory as GPUs do: plain stores arrive late, in any order.

A rank runs calls one after another. A call is a set of programs, which run at once, or one after another as in Triton's
interpreter. A program is a straight line of the operations below. A plain store waits in its program's queue until it
arrives by itself, which may be at any time, or until the program releases a signal, which all its earlier stores
precede. `explore` tries all orders and reports the first read of a wrong value, or state that nothing leads out of.
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
    """Goes on once the cell has this value."""

    cell: Cell
    value: Value


@dataclass(frozen=True, slots=True)
class Read:
    """Must find this value, or the protocol is wrong."""

    cell: Cell
    value: Value


Step = Store | Release | Wait | Read
Program = tuple[Step, ...]
Call = tuple[Program, ...]
Rank = tuple[Call, ...]

# (call number, position in each program, stores on their way from each program) of each rank, and the memory.
_Queue = frozenset[tuple[Cell, Value]]
_Local = tuple[int, tuple[int, ...], tuple[_Queue, ...]]
_State = tuple[tuple[_Local, ...], frozenset[tuple[Cell, Value]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`wrong`: what went wrong first, or None when every interleaving ends well."""

    states: int
    wrong: str | None


def explore(ranks: Sequence[Rank], *, at_once: bool, most_states: int = 2_000_000) -> Outcome:
    """All interleavings. `at_once`: the programs of a call run concurrently, else one after another."""
    start: _State = (tuple(_enter(rank, 0) for rank in ranks), frozenset())
    seen, queue = {start}, [start]
    while queue:
        state = queue.pop()
        moved = False
        for after in _moves(ranks, state, at_once):
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


def _moves(ranks: Sequence[Rank], state: _State, at_once: bool) -> Iterator[_State | str]:
    locals_, memory = state
    known = dict(memory)
    for number, (call, positions, queues) in enumerate(locals_):
        for index, queue in enumerate(queues):
            for cell, value in queue:  # one store arrives
                rest = _replaced(queues, index, queue - {(cell, value)})
                local = _advanced(ranks[number], (call, positions, rest))
                yield _with(locals_, number, local), _stored(known, [(cell, value)])
        for index in _runnable(ranks[number], call, positions, at_once):
            step = ranks[number][call][index][positions[index]]
            if isinstance(step, Wait) and known.get(step.cell, 0) != step.value:
                continue
            if isinstance(step, Read) and known.get(step.cell, 0) != step.value:
                yield f"rank {number}, call {call}: {step} found {known.get(step.cell, 0)}"
                return
            queue, arrived = _effect(step, queues[index])
            local = (call, _replaced(positions, index, positions[index] + 1), _replaced(queues, index, queue))
            yield _with(locals_, number, _advanced(ranks[number], local)), _stored(known, arrived)


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


def _advanced(rank: Rank, local: _Local) -> _Local:
    """The next call begins when all programs of this one are over. The end of a kernel lets its stores arrive."""
    call, positions, queues = local
    over = all(position == len(program) for position, program in zip(positions, rank[call], strict=True))
    return _enter(rank, call + 1) if over and not any(queues) else local


def _stored(known: dict[Cell, Value], arrived: Sequence[tuple[Cell, Value]]) -> frozenset[tuple[Cell, Value]]:
    return frozenset({**known, **dict(arrived)}.items())


def _replaced(row: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*row[:index], value, *row[index + 1 :])


def _with(locals_: tuple[_Local, ...], number: int, local: _Local) -> tuple[_Local, ...]:
    return _replaced(locals_, number, local)
