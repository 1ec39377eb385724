"""A trainer that is killed, again and again, at any moment: nothing that was complete is lost, and no bit differs."""

import random
from pathlib import Path

from tests.bad_days.conftest import Agents, Trainers

WIDTH, LAYERS = 1024, 4  # 50 MB of state
ROUNDS = 12


def test_a_trainer_killed_at_any_moment_goes_on_from_the_newest_complete_step_and_ends_with_the_same_bits(
    trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    chance = random.Random(7)
    common = {"url": str(tmp_path / "url"), "width": WIDTH, "layers": LAYERS, "durable_every": 0}
    promised, reached, killed_in_capture = 0, 0, 0
    for _ in range(ROUNDS):
        child = trainers.start("train", steps=10_000, **common)
        child.until_told("restored")
        child.kill_after(chance.uniform(0.0, 0.4))
        _, text, _, level = child.told[0].split()
        start = int(text)
        assert start >= promised, f"step {promised} was complete, and step {start} was restored"
        assert level == ("memory" if start else "nothing")
        promised = max([start, *child.numbers("complete")])
        reached = max([start, *child.numbers("saved")])
        killed_in_capture += reached > promised
    assert killed_in_capture >= 1, "no kill fell into a capture: the test shows nothing"
    steps = reached + 3
    last = trainers.start("train", steps=steps, **common).value()
    assert last["start"] >= promised
    assert last["problems"] == []
    assert last["digest"] == trainers.start("calm", steps=steps, width=WIDTH, layers=LAYERS).value()
    assert agents.pids() == []
