"""A trainer that is killed, again and again, at any moment: nothing that was complete is lost, and no bit differs."""

import random
import time
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
        child.until_told(f"saved {reached + 1}" if reached == promised else child_start(child))
        time.sleep(chance.uniform(0.0, 0.25))  # the moment of the kill, not a wait
        child.kill()
        told = child.told
        word, start, _, level = told[0].split()
        assert (word, int(start) >= promised) == ("restored", True), f"{promised} was complete: {told}"
        assert level == ("memory" if promised else "nothing"), told
        promised = max([promised, *numbers(told, "complete")])
        reached = max([int(start), *numbers(told, "saved")])
        killed_in_capture += reached > promised
    assert killed_in_capture >= 1, "no kill fell into a capture: the test shows nothing"
    steps = reached + 3
    last = trainers.start("train", steps=steps, **common).value()
    assert last["start"] >= promised
    assert last["problems"] == []
    assert last["digest"] == trainers.start("calm", steps=steps, width=WIDTH, layers=LAYERS).value()
    assert agents.pids() == []
