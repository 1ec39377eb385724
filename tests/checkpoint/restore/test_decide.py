"""The decision what to restore, from facts."""

from resilient.checkpoint.restore.decide import Facts, decide


def facts(*ranks: dict[str, tuple[int, ...]], others: dict[int, int] | None = None) -> list[Facts]:
    return [Facts(rank=rank, steps=steps, other_worlds=others or {}) for rank, steps in enumerate(ranks)]


def test_the_newest_step_that_all_ranks_hold_wins() -> None:
    decision = decide(facts({"memory": (7, 8)}, {"memory": (6, 7)}))
    assert (decision.action, decision.step, decision.levels) == ("restore", 7, ("memory", "memory"))
    assert "8" in decision.reason


def test_each_rank_takes_its_quickest_level() -> None:
    decision = decide(facts({"memory": (8,), "durable": (8,)}, {"local": (8,), "durable": (8,)}))
    assert (decision.step, decision.levels) == (8, ("memory", "local"))


def test_damage_leads_to_the_next_level_and_then_to_an_older_step() -> None:
    known = facts({"memory": (8,), "durable": (8, 4)}, {"memory": (8,), "durable": (8, 4)})
    once = decide(known, frozenset({(8, 1, "memory")}))
    assert (once.step, once.levels) == (8, ("memory", "durable"))
    twice = decide(known, frozenset({(8, 1, "memory"), (8, 1, "durable")}))
    assert (twice.step, twice.levels) == (4, ("durable", "durable"))
    assert "rank 1" in twice.reason


def test_nothing_anywhere_is_not_an_error() -> None:
    assert decide(facts({}, {})).action == "nothing"


def test_a_step_that_one_rank_lacks_is_nothing_to_restore() -> None:
    assert decide(facts({"memory": (3,)}, {})).action == "nothing"


def test_only_damaged_snapshots_are_refused_rather_than_forgotten() -> None:
    decision = decide(facts({"durable": (4,)}), frozenset({(4, 0, "durable")}))
    assert decision.action == "refuse"
    assert "step 4 of rank 0" in decision.reason


def test_a_newer_snapshot_of_another_world_size_is_refused_by_name() -> None:
    decision = decide(facts({"durable": (4,)}, {"durable": (4,)}, others={9: 8}))
    assert decision.action == "refuse"
    assert "step 9" in decision.reason
    assert "8 ranks" in decision.reason


def test_an_older_snapshot_of_another_world_size_does_not_matter() -> None:
    assert decide(facts({"memory": (12,)}, {"memory": (12,)}, others={9: 8})).step == 12


def test_facts_survive_their_journey() -> None:
    one = Facts(rank=3, steps={"memory": (1, 2)}, other_worlds={9: 8})
    assert Facts.from_json(one.to_json()) == one
