"""Edge colouring of a bipartite multigraph with as few colours as its largest degree: König's theorem (1916).

The flows between leaves are the edges, and a colour is a set of flows of which no two leave the same leaf or enter the
same leaf. Whatever share of a path a colour gets, the load that it puts on any link is at most that share of one flow.
Every rank computes the same colours from the same list, so nobody has to be asked.
"""

from collections.abc import Sequence

_NONE = -1


def colour(edges: Sequence[tuple[int, int]], lefts: int, rights: int) -> tuple[list[int], int]:
    """The colour of each edge (left, right), and how many colours there are: the largest degree.

    Colours an edge with one that is free at both ends, or else swaps two colours along an alternating path, which in a
    bipartite graph never comes back. Time: edges times the length of such paths, at most lefts + rights.
    """
    left_degree, right_degree = [0] * lefts, [0] * rights
    for left, right in edges:
        left_degree[left] += 1
        right_degree[right] += 1
    colours = max((*left_degree, *right_degree), default=0)
    at_left = [[_NONE] * colours for _ in range(lefts)]
    at_right = [[_NONE] * colours for _ in range(rights)]
    found = [_NONE] * len(edges)
    for number, (left, right) in enumerate(edges):
        free_left, free_right = at_left[left].index(_NONE), at_right[right].index(_NONE)
        if free_left != free_right:
            _swap(edges, found, (at_right, at_left), right, free_left, free_right)
        found[number] = free_left
        at_left[left][free_left] = at_right[right][free_left] = number
    return found, colours


def _swap(
    edges: Sequence[tuple[int, int]],
    found: list[int],
    sides: tuple[list[list[int]], list[list[int]]],
    node: int,
    wanted: int,
    other: int,
) -> None:
    """Make `wanted` free at a right node, where `other` is, along the path of edges that alternate between the two."""
    path: list[int] = []
    side, at, next_colour = 0, node, wanted
    while (edge := sides[side][at][next_colour]) != _NONE:
        path.append(edge)
        at = edges[edge][side]  # of an edge (left, right) the end on the other side
        side, next_colour = 1 - side, other if next_colour == wanted else wanted
    for edge in path:
        left, right = edges[edge]
        sides[1][left][found[edge]] = sides[0][right][found[edge]] = _NONE
    for edge in path:
        left, right = edges[edge]
        found[edge] = other if found[edge] == wanted else wanted
        sides[1][left][found[edge]] = sides[0][right][found[edge]] = edge
