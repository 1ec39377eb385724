"""Which files of a level may go, decided from its listing. Pure; `writing.py` deletes what is named here.

Runs after a snapshot became complete at the level: that is step `upto`, and nothing newer is touched (a run that went
back finds the files of its earlier attempt). The newest complete snapshot always stays. A step that is not known to be
complete stays until two newer ones are, for it may still be arriving. Names that are not ours are never named.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from resilient.checkpoint.names import complete_steps, step_of

_OURS = re.compile(r"^step_\d{8,}/(?:rank_(\d{5,})-of-\d{5,}\.(?:json|safetensors|digests)|catalog\.json)$")
_NEWER_COMPLETE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletions:
    """Names to delete: all `records` first, so that a snapshot is never complete without its images."""

    records: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


def durable_deletions(names: Collection[str], *, upto: int, keep_last: int, keep_every: int | None) -> Deletions:
    """What may go from a level that all nodes share: complete is what has the records of all ranks."""
    complete = sorted(step for step in complete_steps(names) if step <= upto)
    kept = set(complete[-keep_last:])
    if keep_every is not None:
        kept |= {step for step in complete if step % keep_every == 0}
    return _deletions(names, _steps_to_delete(names, complete, kept), ranks=None)


def local_deletions(
    names: Collection[str],
    *,
    upto: int,
    ranks: Collection[int],
    complete: Iterable[int],
    keep_last: int,
    uploading: Collection[int],
) -> Deletions:
    """What may go from a level of this node alone, of the files of these ranks.

    `complete`: the steps known to be complete there on every node; `uploading`: those that a slower level still reads.
    """
    there = sorted(step for step in _steps(names) & set(complete) if step <= upto)
    kept = set(there[-keep_last:]) | set(uploading)
    return _deletions(names, _steps_to_delete(names, there, kept), ranks=ranks)


def _steps_to_delete(names: Iterable[str], complete: list[int], kept: Collection[int]) -> set[int]:
    """`complete` is sorted. Steps that are not complete wait for two newer ones that are."""
    gone = {step for step in complete if step not in kept}
    if len(complete) >= _NEWER_COMPLETE:
        limit = complete[-_NEWER_COMPLETE]
        gone |= {step for step in _steps(names) - set(complete) if step < limit and step not in kept}
    assert not complete or complete[-1] not in gone
    return gone


def _steps(names: Iterable[str]) -> set[int]:
    return {step for name in names if (step := step_of(name)) is not None}


def _deletions(names: Iterable[str], steps: Collection[int], ranks: Collection[int] | None) -> Deletions:
    records: list[str] = []
    images: list[str] = []
    for name in names:
        match = _OURS.match(name)
        if match is None or step_of(name) not in steps:
            continue
        if ranks is not None and (match[1] is None or int(match[1]) not in ranks):
            continue
        (records if name.endswith(".json") and match[1] else images).append(name)
    return Deletions(records=tuple(records), images=tuple(images))
