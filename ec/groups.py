"""Which nodes protect one another: parity groups across failure domains. Pure: facts in, groups and reason out.

A node's domains are named from the widest to the narrowest, ("row 2", "switch 7", "chassis 3"). Nodes that share one
are likely to be lost together, so they are dealt out to different groups, as cards are, in the order of their domains.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resilient.ec.matrix import MOST_SHARDS
from resilient.errors import UsageError

_MOST = MOST_SHARDS // 2  # where the nodes do not divide, a group may have nearly twice as many


@dataclass(frozen=True, slots=True)
class Node:
    """`domains` from the widest to the narrowest; the node itself is not one of them. Empty where nothing is known."""

    name: str
    domains: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Members by their number in the list of nodes, ascending; any `m` of them may be lost."""

    members: tuple[int, ...]
    m: int

    @property
    def k(self) -> int:
        return len(self.members) - self.m


@dataclass(frozen=True, slots=True)
class Grouping:
    """Every node is in one group; no groups where there are too few nodes. `reason` says what the groups can bear."""

    groups: tuple[Group, ...]
    reason: str

    def of(self, node: int) -> Group | None:
        return next((group for group in self.groups if node in group.members), None)


def decide_groups(nodes: Sequence[Node], k: int, m: int) -> Grouping:
    """Groups of k + m nodes, or some more where the nodes do not divide: parity is never dearer than m / k.

    With fewer than k + m nodes there is one group of all of them, whose parity costs more; with m nodes or fewer there
    is none. Every rank takes the same decision from the same list. Raises UsageError for impossible k and m, and for
    two nodes of one name.
    """
    if k < 1 or m < 1 or k + m > _MOST:
        raise UsageError(f"parity of k = {k}, m = {m}: at least 1 of each, and at most {_MOST} together")
    twice = [name for name, count in Counter(node.name for node in nodes).items() if count > 1]
    if twice:
        raise UsageError(f"two nodes are called {twice[0]!r}: names must differ")
    if len(nodes) <= m:
        return Grouping((), f"no parity: {len(nodes)} nodes cannot bear the loss of {m}")
    count = max(1, len(nodes) // (k + m))
    ordered = sorted(range(len(nodes)), key=lambda number: (nodes[number].domains, nodes[number].name))
    groups = tuple(Group(tuple(sorted(ordered[first::count])), m) for first in range(count))
    return Grouping(groups, _reason(nodes, groups, m))


def _reason(nodes: Sequence[Node], groups: Sequence[Group], m: int) -> str:
    sizes = sorted({len(group.members) for group in groups})
    plural = "s" if len(groups) > 1 else ""
    text = f"{len(groups)} group{plural} of {' or '.join(map(str, sizes))} nodes, any {m} of each may be lost"
    depth = min((len(node.domains) for node in nodes), default=0)
    for level in reversed(range(depth)):
        worst = max(
            max(Counter(nodes[number].domains[: level + 1] for number in group.members).values()) for group in groups
        )
        if worst > m:
            example = nodes[groups[0].members[0]].domains[level]
            return f"{text}; not a whole domain such as {example!r}, which may hold {worst} nodes of a group"
        text += f"; also a whole domain such as {nodes[0].domains[level]!r} (at most {worst} of a group)"
    return text
