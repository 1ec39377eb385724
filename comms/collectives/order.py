"""In which order the turns of several scripts are begun, when they are parts of one collective: pure.

A part's turns come one after the other, so links idle while it adds up or stays within a leaf. With several parts under
way one uses the links meanwhile. All ranks begin turns that cross the fabric in one order: lanes are queues, so parts
take their turns on the links as well, and a step finds them as its plan means it to. For a step that crosses, then
another, with four parts (B and C are the two, the number is the part): B0 B1 C0 B2 C1 B3 C2 C3.
"""

from collections.abc import Sequence

from resilient.comms.collectives.schedule import Script, Turn
from resilient.comms.fabric import Fabric

_APART = 1.5  # waves from one crossing of a part to its next: there is always one of another part between
_BEFORE = 0.75  # a turn within a leaf begins so much before the crossing that needs it,
_BEHIND = 1.25  # or behind the last one: not before another part's crossing has been begun


def merged(fabric: Fabric, scripts: Sequence[Script]) -> list[int]:
    """The numbers of the scripts, each as often as it has turns: whose next turn is begun.

    The same on all ranks of scripts that differ in the ranks' own places alone.
    """
    if len(scripts) == 1:
        return [0] * len(scripts[0].turns)
    keyed = [(wave, number) for number, script in enumerate(scripts) for wave in _waves(fabric, script, number)]
    return [number for _, number in sorted(keyed)]


def _waves(fabric: Fabric, script: Script, number: int) -> list[float]:
    """When each turn is begun: the first crossing of part n in wave n."""
    crossing = [_crosses(fabric, turn) for turn in script.turns]
    waves: list[float] = []
    done, last = 0, sum(crossing)
    for crosses in crossing:
        following = number + _APART * done
        if crosses:
            waves.append(following)
            done += 1
        elif done < last:
            waves.append(following - _BEFORE)
        else:
            waves.append(following - _APART + _BEHIND)
    return waves


def _crosses(fabric: Fabric, turn: Turn) -> bool:
    return any(fabric.crosses(flow) and flow.nbytes for flow in turn.flows)
