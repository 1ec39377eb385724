"""The decision what to restore, from facts."""

from resilient.checkpoint.restore.decide import LEVELS, Facts, Place, decide, level_of_other


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


def test_a_newer_snapshot_of_another_world_size_is_reshaped() -> None:
    decision = decide(facts({"durable": (4,)}, {"durable": (4,)}, others={9: 3}))
    assert (decision.action, decision.step) == ("reshape", 9)
    assert decision.places == (Place("durable", ()),) * 3
    assert "made by 3 ranks and taken by 2" in decision.reason


def images_of_others(*ranks: list[tuple[int, int, int, str]], durable: dict[int, int] | None = None) -> list[Facts]:
    return [Facts(rank=rank, others=tuple(others), other_worlds=durable or {}) for rank, others in enumerate(ranks)]


def test_images_of_a_larger_job_are_taken_from_whichever_nodes_have_them() -> None:
    known = images_of_others([(9, 3, 0, "memory"), (9, 3, 1, "memory")], [(9, 3, 2, "local"), (9, 3, 1, "memory")])
    decision = decide(known)
    assert decision.action == "reshape"
    assert decision.places == (Place("memory", (0,)), Place("memory", (0, 1)), Place("local", (1,)))


def test_an_image_that_no_node_has_any_more_leads_to_the_durable_level_or_an_older_step() -> None:
    known = images_of_others([(9, 3, 0, "memory")], [(9, 3, 2, "memory")], durable={4: 3})
    assert (decide(known).action, decide(known).step) == ("reshape", 4)
    known = images_of_others([(9, 3, 0, "memory")], [(9, 3, 2, "memory")], durable={9: 3})
    assert [place.level for place in decide(known).places] == ["memory", "durable", "memory"]


def test_a_damaged_image_of_another_job_is_taken_from_the_next_level() -> None:
    known = images_of_others([(9, 1, 0, "memory")], [], durable={9: 1})
    once = decide(known, frozenset({(9, 0, level_of_other("memory", 1))}))
    assert once.places == (Place("durable", ()),)
    assert decide(known, frozenset({(9, 0, level_of_other(level, 1)) for level in LEVELS})).action == "refuse"


def test_an_older_snapshot_of_another_world_size_does_not_matter() -> None:
    assert decide(facts({"memory": (12,)}, {"memory": (12,)}, others={9: 8})).step == 12


def test_facts_survive_their_journey() -> None:
    one = Facts(rank=3, steps={"memory": (1, 2)}, other_worlds={9: 8}, others=((1, 8, 0, "local"),))
    assert Facts.from_json(one.to_json()) == one


def test_where_only_some_steps_count_the_newest_of_them_is_taken_and_others_are_not_seen() -> None:
    known = [
        Facts(rank=0, steps={"memory": (12,), "durable": (8, 10)}, other_worlds={11: 8}, others=((12, 4, 0, "local"),))
    ]
    assert decide(known).step == 12
    assert decide([one.only({8, 10}) for one in known]).step == 10
    assert decide([one.only(set()) for one in known]).action == "nothing"
