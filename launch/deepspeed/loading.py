"""What `load_checkpoint` loads: facts about the folder and the tag → a decision with its reason. Pure."""

from dataclasses import dataclass

from resilient.launch.deepspeed.folder import Looked

_STEP_TAG = "global_step"  # what DeepSpeed calls a checkpoint that the program gave no name


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """First the newest complete snapshot of any level, of `steps` where that is not None (an empty set: of none).

    Where there is none: `other_url` and `other_step`, a checkpoint elsewhere or of another format; None: nothing.
    """

    steps: frozenset[int] | None
    other_url: str | None
    other_step: int | None = None
    reason: str


def choose(folder: str, tag: str | None, looked: Looked, url: str, *, every_step: bool) -> Choice:
    """`looked` is what is in the folder. `url`: of this job. `every_step`: snapshots are taken without being asked for,
    so those that the folder does not name count too."""
    ours = {name: one.step for name, one in looked.tags.items() if one.url == url}
    foreign = None if looked.foreign is None else f"{folder.rstrip('/')}/{looked.foreign}"
    if tag is not None:
        return _named(folder, tag, looked, ours, foreign)
    if ours and not every_step:
        reason = f"the newest complete one of the {len(ours)} snapshots that {folder} names"
        return Choice(steps=frozenset(ours.values()), other_url=foreign, reason=reason)
    return Choice(steps=None, other_url=foreign, reason=f"the newest complete snapshot of {url}")


def _named(folder: str, tag: str, looked: Looked, ours: dict[str, int], foreign: str | None) -> Choice:
    if tag in ours:
        return Choice(steps=frozenset({ours[tag]}), other_url=None, reason=f"{tag} is step {ours[tag]}")
    if tag in looked.tags:
        other = looked.tags[tag]
        reason = f"{tag} is step {other.step} of {other.url}"
        return Choice(steps=frozenset(), other_url=other.url, other_step=other.step, reason=reason)
    if foreign is not None:
        return Choice(steps=frozenset(), other_url=foreign, reason=f"{foreign} is a checkpoint of another kind")
    number = tag.removeprefix(_STEP_TAG)
    if number != tag and number.isdecimal():
        # The folder may have been on a machine that is gone; the snapshot is not.
        return Choice(steps=frozenset({int(number)}), other_url=None, reason=f"{folder} does not name it, {tag} does")
    return Choice(steps=frozenset(), other_url=None, reason=f"{folder} has no {tag}")
