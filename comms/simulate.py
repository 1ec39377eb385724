"""How long a step takes when its pieces share the links fairly: a flow-level simulation, no packets.

Rates are max-min fair (Bertsekas and Gallager, Data Networks, 6.5.2), as congestion control of one transport aims at:
the fullest link divides what it has among its flows, then the next fullest what is left, and so on; when a piece ends
its rate is free for others. Good for thousands of hosts; what it leaves out are queues, losses and start-up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from resilient.comms.certificate import Piece
from resilient.comms.fabric import Fabric, Link
from resilient.comms.flows import Flow

_LINKS = 4  # that a piece crosses at most: out, up, down, in
_SAME = 1e-9

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Simulated:
    """`seconds` until the last flow has arrived, and until each has."""

    seconds: float
    flows: tuple[float, ...]


def simulate(fabric: Fabric, flows: Sequence[Flow], pieces: Sequence[Piece], *, tolerance: float = _SAME) -> Simulated:
    """Run one step: all pieces start at once. Time: the number of different ends times the links.

    `tolerance`: pieces that would end within this part of the time gone by are taken to free their links together,
    and links whose fair shares differ by less to be full together. 0.005 makes thousands of hosts a matter of seconds.
    """
    left = np.array([piece.end - piece.begin for piece in pieces], dtype=np.float64)
    links, rates = _table(fabric, flows, pieces)
    ends = np.zeros(len(pieces))
    active = left > 0
    now = 0.0
    while active.any():
        numbers = np.flatnonzero(active)
        speed = fair_rates(links[numbers], rates, tolerance)
        after = left[numbers] / speed
        step = after.min()
        together = after <= step + tolerance * (now + step)
        done = numbers[together]
        ends[done] = now + after[together]
        now += step
        left[numbers] -= np.where(np.isinf(speed), 0.0, speed) * step
        active[done] = False
    arrived = np.zeros(len(flows))
    np.maximum.at(arrived, [piece.flow for piece in pieces], ends)
    return Simulated(float(arrived.max(initial=0.0)), tuple(arrived.tolist()))


def fair_rates(links: Integers, rates: Floats, tolerance: float = _SAME) -> Floats:
    """The max-min fair rate of each piece. `links`: [pieces, 4], numbers into `rates` ([links], bytes a second).

    Links are full together whose shares differ by no more than `tolerance` of the least; their pieces get the least.
    """
    found = np.zeros(len(links))
    room = rates.copy()
    open_pieces = np.arange(len(links))
    while len(open_pieces):
        crossing = links[open_pieces]
        count = np.bincount(crossing.ravel(), minlength=len(rates))
        share = np.divide(room, count, out=np.full(len(rates), np.inf), where=count > 0)
        share = np.maximum(share, 0.0)
        least = share.min()
        if np.isinf(least):  # nothing holds these: within a leaf, where interfaces are no limit
            found[open_pieces] = least
            break
        full = share <= least * (1 + tolerance)
        held = full[crossing].any(axis=1)
        found[open_pieces[held]] = least
        room -= least * np.bincount(crossing[held].ravel(), minlength=len(rates))
        open_pieces = open_pieces[~held]
    return found


def _table(fabric: Fabric, flows: Sequence[Flow], pieces: Sequence[Piece]) -> tuple[Integers, Floats]:
    """For each piece the numbers of its links, filled up with number 0, and the rate of each link."""
    numbers: dict[Link, int] = {}
    rates = [np.inf]
    links = np.zeros((len(pieces), _LINKS), dtype=np.int64)
    for row, piece in enumerate(pieces):
        for column, link in enumerate(fabric.links(flows[piece.flow], piece.path)):
            if link not in numbers:
                numbers[link] = len(rates)
                rates.append(fabric.rate(link))
            links[row, column] = numbers[link]
    return links, np.array(rates)
