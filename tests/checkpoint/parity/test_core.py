"""One node's decisions: messages that are lost, late, doubled or foreign, agents that start again, rows that fail."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

from resilient.checkpoint.digest import digest
from resilient.checkpoint.parity.actions import Action, Arrived, Expect, Failed, Free, Send, StartRow, StopRow
from resilient.checkpoint.parity.core import HELD, REFRESH_S, Core
from resilient.checkpoint.parity.facts import Sealed
from resilient.checkpoint.parity.layout import layout_of
from resilient.checkpoint.parity.snapshot import LONGEST_PAUSE_S, State
from resilient.errors import LevelFailed, UsageError

BLOCK = 16
GROUP = ("a", "b", "c")
KEY = ("x", 3)
Message = dict[str, Any]
T = TypeVar("T")


def image(rank: int, nbytes: int = 40, pieces: str = "p") -> Sealed:
    count = -(-nbytes // BLOCK)
    blocks = "".join(digest(b"%d" % block) for block in range(count))
    return Sealed(rank=rank, nbytes=nbytes, blocks=blocks, pieces=pieces, head={})


def only(kind: type[T], actions: Iterable[Action]) -> list[T]:
    return [one for one in actions if isinstance(one, kind)]


def core(node: str = "a") -> Core:
    made = Core(node, f"agent-{node}", BLOCK)
    made.configure(GROUP, 1)
    return made


def message(node: str, *facts: Message, agent: str | None = None, group: Sequence[str] = GROUP) -> Message:
    return {"agent": agent or f"agent-{node}", "group": list(group), "m": 1, "facts": list(facts)}


def images(rank: int, step: int = 3, nbytes: int = 40, pieces: str = "p") -> Message:
    one = image(rank, nbytes, pieces).to_json()
    return {"kind": "images", "life": "x", "step": step, "world_size": 3, "images": [one]}


def done(row: int, digests: list[str], agents: Sequence[str] = ("agent-a", "agent-b", "agent-c")) -> Message:
    return {"kind": "done", "life": "x", "step": 3, "row": row, "agents": list(agents), "digests": digests}


def seal(one: Core, step: int = 3) -> list[Action]:
    return one.sealed("x", step, 3, [image(GROUP.index(one.node))], {"p": "[]"})


def formed() -> tuple[Core, StartRow]:
    """Node a, which knows all images of step 3 and encodes its row."""
    one = core()
    seal(one)
    one.heard("b", message("b", images(1)))
    _, actions = one.heard("c", message("c", images(2)))
    assert [type(each) for each in actions if not isinstance(each, Send)] == [Expect, StartRow]
    return one, only(StartRow, actions)[0]


def digests_of(start: StartRow, row: int) -> list[str]:
    return [digest(b"parity") * layout_of(start.stripe).blocks(row)]


def test_a_group_that_cannot_be_is_refused() -> None:
    for group, m in ((("b", "c"), 1), (("a", "a"), 1), (("a", "b"), 2), (("a", "b"), 0)):
        with pytest.raises(UsageError, match="cannot be in a group"):
            Core("a", "1", BLOCK).configure(group, m)


def test_a_snapshot_arrives_when_all_rows_are_done_and_not_before() -> None:
    one, start = formed()
    assert start.row == 0
    assert not only(Arrived, one.row_done(KEY, digests_of(start, 0)))
    assert not only(Arrived, one.heard("b", message("b", done(1, digests_of(start, 1))))[1])
    _, actions = one.heard("c", message("c", done(2, digests_of(start, 2))))
    assert only(Arrived, actions) == [Arrived(KEY)]
    assert not only(Arrived, one.heard("c", message("c", done(2, digests_of(start, 2))))[1])


def test_rows_may_be_done_before_the_last_image_is_known() -> None:
    _, start = formed()
    late = core()
    seal(late)
    late.heard("b", message("b", images(1), done(1, digests_of(start, 1))))
    late.heard("c", message("c", done(2, digests_of(start, 2))))
    _, actions = late.heard("c", message("c", images(2)))
    assert only(StartRow, actions)
    assert only(Arrived, late.row_done(KEY, digests_of(start, 0))) == [Arrived(KEY)]


def test_a_row_of_somebody_else_does_not_count() -> None:
    one, start = formed()
    one.row_done(KEY, digests_of(start, 0))
    one.heard("b", message("b", done(1, digests_of(start, 1)), done(2, digests_of(start, 2))))
    snapshot = one.get(KEY)
    assert snapshot is not None
    assert sorted(snapshot.done) == [0, 1]


def test_a_row_that_was_encoded_from_images_of_another_agent_fails_the_snapshot() -> None:
    one, start = formed()
    fact = done(1, digests_of(start, 1), ("agent-a", "agent-b", "former-c"))
    _, actions = one.heard("b", message("b", fact))
    assert "started again while row 1 was encoded" in only(Failed, actions)[0].reason
    assert only(StopRow, actions) == [StopRow(KEY)]
    assert only(Free, actions) == [Free(KEY)]


def test_digests_that_do_not_fit_fail_the_snapshot() -> None:
    one, _ = formed()
    assert "do not fit" in only(Failed, one.heard("b", message("b", done(1, ["00"])))[1])[0].reason


def answer_all(one: Core, actions: Iterable[Action], **agents: str) -> list[Message]:
    """Answer whatever is sent, and what follows from that; the facts that were told, by peer."""
    told: list[Message] = []
    queue = only(Send, actions)
    while queue:
        send = queue.pop(0)
        told += [{"peer": send.peer, **fact} for fact in send.message["facts"]]
        answer = {"agent": agents.get(send.peer, f"agent-{send.peer}"), "ok": True}
        queue += only(Send, one.answered(send.peer, answer))
    return told


def test_everything_is_told_to_everybody_once() -> None:
    one = core()
    hello = one.tick(0)
    assert not hello, "the questions of configure are still under way"
    told = answer_all(one, Core("a", "agent-a", BLOCK).configure(GROUP, 1))
    told += answer_all(one, seal(one))
    assert [(fact["peer"], fact["kind"]) for fact in told] == [("b", "images"), ("c", "images")]
    assert not only(Send, one.tick(0.5))


def test_what_was_not_answered_is_told_again_after_a_pause() -> None:
    one = core()
    one.answered("b", {"agent": "agent-b", "ok": True})
    sent = [send for send in only(Send, seal(one)) if send.peer == "b"]
    assert [fact["kind"] for fact in sent[0].message["facts"]] == ["images"]
    assert not one.unanswered("b")
    assert not [send for send in only(Send, one.tick(0.01)) if send.peer == "b"]
    again = [send for send in only(Send, one.tick(0.1)) if send.peer == "b"]
    assert again == sent


def test_a_clock_that_is_set_back_does_not_stop_anything() -> None:
    one = core()
    one.tick(1e6)
    one.unanswered("b")
    assert [send.peer for send in only(Send, one.tick(5.0))] == ["b"]


def test_pauses_grow_and_end_with_the_first_answer() -> None:
    one = core()
    now, pauses = 0.0, []
    for _ in range(10):
        one.unanswered("b")
        begin = now
        while not only(Send, one.tick(now)):
            now += 0.01
        pauses.append(round(now - begin, 2))
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert LONGEST_PAUSE_S - 0.1 < pauses[-1] < LONGEST_PAUSE_S + 0.1


def test_pieces_are_sent_to_who_asks_for_them_and_to_nobody_else() -> None:
    one = core()
    answer_all(one, only(Send, one.tick(0)))
    one.answered("b", {"agent": "agent-b", "ok": True})
    one.answered("c", {"agent": "agent-c", "ok": True})
    sent = only(Send, seal(one))
    following = only(Send, one.answered("b", {"agent": "agent-b", "ok": True, "wants": ["p", "unknown"]}))
    assert [fact for send in following for fact in send.message["facts"]] == [
        {"kind": "pieces", "digest": "p", "text": "[]"}
    ]
    assert len(sent) == 2
    assert not only(Send, one.answered("b", {"agent": "agent-b", "ok": True}))


def test_no_row_is_begun_before_the_pieces_of_all_records_are_known() -> None:
    one = core()
    seal(one)
    one.heard("b", message("b", images(1)))
    answer, actions = one.heard("c", message("c", images(2, pieces="q")))
    assert answer["wants"] == ["q"]
    assert not only(StartRow, actions)
    _, actions = one.heard("c", message("c", {"kind": "pieces", "digest": "q", "text": "[1]"}))
    assert only(StartRow, actions)


def test_a_message_of_an_agent_that_is_not_known_to_be_the_peers_is_not_taken() -> None:
    one = core()
    one.answered("b", {"agent": "agent-b", "ok": True})
    one.answered("c", {"agent": "agent-c", "ok": True})
    answer, actions = one.heard("b", message("b", images(1), agent="former"))
    assert not answer["ok"]
    assert one.get(KEY) is None
    assert [send.peer for send in only(Send, actions)] == ["b"], "it is asked who it is"


def test_a_peer_that_answers_as_another_fails_what_it_had_told_of() -> None:
    one, _ = formed()
    one.answered("b", {"agent": "agent-b", "ok": True})
    one.tick(2 * REFRESH_S)
    actions = one.answered("b", {"agent": "new", "ok": True})
    assert "agent of node b has started again" in only(Failed, actions)[0].reason
    answer, _ = one.heard("b", message("b", images(1, step=4), agent="new"))
    assert answer["ok"]


def test_a_new_agent_is_told_all_that_is_open() -> None:
    one = core()
    answer_all(one, [Send("b", {"facts": []}), Send("c", {"facts": []})])
    answer_all(one, seal(one))
    asked = [send for send in only(Send, one.tick(2 * REFRESH_S)) if send.peer == "b"]
    assert [send.message["facts"] for send in asked] == [[]]
    told = answer_all(one, one.answered("b", {"agent": "new", "ok": True}), b="new")
    assert [(fact["peer"], fact["kind"]) for fact in told] == [("b", "images")]


def test_an_answer_that_was_under_way_when_another_agent_spoke_decides_nothing() -> None:
    one = core()  # both peers have been asked who they are
    seal(one)
    one.heard("b", message("b", images(1), agent="new"))
    actions = one.answered("b", {"agent": "former", "ok": True})
    assert not only(Failed, actions)
    assert [send.peer for send in only(Send, actions)] == ["b"]
    assert not only(Failed, one.answered("b", {"agent": "new", "ok": True}))


def test_what_is_whole_does_not_fail_when_a_peer_starts_again() -> None:
    one, start = formed()
    one.row_done(KEY, digests_of(start, 0))
    one.heard("b", message("b", done(1, digests_of(start, 1))))
    one.heard("c", message("c", done(2, digests_of(start, 2))))
    one.answered("b", {"agent": "agent-b", "ok": True})
    one.tick(2 * REFRESH_S)
    one.unanswered("b")
    one.tick(10)
    actions = one.answered("b", {"agent": "new", "ok": True})
    assert not only(Failed, actions)
    assert not [fact for send in only(Send, actions) if send.peer == "b" for fact in send.message["facts"]]


def test_while_a_snapshot_is_open_peers_are_asked_who_they_are() -> None:
    one, start = formed()
    answer_all(one, [Send("b", {"facts": []}), Send("c", {"facts": []})])
    assert not only(Send, one.tick(REFRESH_S / 2))
    assert [send.peer for send in only(Send, one.tick(1.5 * REFRESH_S))] == ["b", "c"]
    assert start.row == 0


def test_a_row_that_failed_is_tried_again_and_one_that_cannot_be_fails_the_snapshot() -> None:
    one, start = formed()
    assert not only(StartRow, one.row_failed(KEY, "slow"))
    assert not only(Failed, one.tick(0.01))
    assert only(StartRow, one.tick(1.0)) == [start]
    actions = one.row_failed(KEY, "damaged", final=True)
    assert only(Failed, actions) == [Failed(KEY, "damaged")]


def test_the_oldest_snapshot_is_encoded_first_and_one_at_a_time() -> None:
    one, start = formed()
    seal(one, 4)
    one.heard("b", message("b", images(1, step=4)))
    _, actions = one.heard("c", message("c", images(2, step=4)))
    assert only(Expect, actions)
    assert not only(StartRow, actions)
    assert [each.stripe.step for each in only(StartRow, one.row_done(KEY, digests_of(start, 0)))] == [4]


def test_a_failure_is_told_to_all_and_taken_from_all() -> None:
    one, _ = formed()
    answer_all(one, [Send("b", {"facts": []}), Send("c", {"facts": []})])
    fact = {"kind": "failed", "life": "x", "step": 3, "reason": "no room"}
    _, actions = one.heard("b", message("b", fact))
    assert only(Failed, actions) == [Failed(KEY, "no room")]
    assert [(each["peer"], each["kind"]) for each in answer_all(one, actions)] == [("c", "failed")]
    assert only(Failed, seal(one)) == [Failed(KEY, "no room")]


def test_what_is_dropped_is_told_but_not_reported() -> None:
    one, _ = formed()
    answer_all(one, [Send("b", {"facts": []}), Send("c", {"facts": []})])
    actions = one.dropped(*KEY)
    assert not only(Failed, actions)
    assert only(StopRow, actions)
    assert {each["peer"] for each in answer_all(one, actions) if each["kind"] == "failed"} == {"b", "c"}
    assert not only(StartRow, one.heard("b", message("b", images(1)))[1])


def test_images_that_do_not_fit_together_fail_the_snapshot() -> None:
    for other in (
        images(0),
        {**images(2), "world_size": 4},
        {**images(2), "images": [image(2).to_json() | {"bytes": 99}]},
    ):
        one = core()
        seal(one)
        one.heard("b", message("b", images(1)))
        _, actions = one.heard("c", message("c", other))
        assert "do not fit together" in only(Failed, actions)[0].reason


def test_an_image_that_is_sealed_twice_fails_the_snapshot() -> None:
    one = core()
    seal(one)
    one.heard("b", message("b", images(1)))
    assert not only(Failed, one.heard("b", message("b", images(1)))[1])
    assert (
        "node b has sealed step 3 twice" in only(Failed, one.heard("b", message("b", images(1, nbytes=8)))[1])[0].reason
    )


def test_messages_of_another_group_are_not_taken() -> None:
    one = core()
    for peer, group in (("b", ("a", "b")), ("z", GROUP)):
        answer, _ = one.heard(peer, message(peer, images(1), group=group))
        assert not answer["ok"]
    assert one.get(KEY) is None


def test_what_is_open_fails_with_its_group_and_what_is_whole_stays() -> None:
    one, start = formed()
    one.row_done(KEY, digests_of(start, 0))
    one.heard("b", message("b", done(1, digests_of(start, 1))))
    one.heard("c", message("c", done(2, digests_of(start, 2))))
    seal(one, 4)
    actions = one.configure(("a", "b"), 1)
    assert [each.key[1] for each in only(Failed, actions)] == [4]
    snapshot = one.get(KEY)
    assert snapshot is not None
    assert snapshot.state is State.WHOLE
    assert not one.configure(("a", "b"), 1)
    assert only(Failed, one.configure((), 0)) == []
    assert "no parity group" in only(Failed, seal(one, 5))[0].reason


def test_only_what_is_whole_and_not_needed_is_freed() -> None:
    one, start = formed()
    seal(one, 4)
    assert not one.keep(set())
    one.row_done(KEY, digests_of(start, 0))
    one.heard("b", message("b", done(1, digests_of(start, 1))))
    one.heard("c", message("c", done(2, digests_of(start, 2))))
    assert not one.keep({KEY})
    assert one.keep({("x", 4)}) == [Free(KEY)]
    assert not one.keep({("x", 4)})


def test_what_is_remembered_is_bounded() -> None:
    one = core()
    for step in range(10, 10 + 3 * HELD):
        one.heard("b", message("b", images(1, step=step)))
        if step % 2:
            one.dropped("x", step)
    assert len(one.snapshots()) <= HELD
    seal(one, 9999)
    assert any(each.key == ("x", 9999) for each in one.snapshots())


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"agent": "x", "group": None, "m": 1, "facts": []},
        message("b", {"kind": "images", "life": "x"}),
        message("b", {"kind": "?", "life": "x", "step": 1}),
        message("b", {**images(1), "images": [{}]}),
        message("b", {"kind": "done", "life": "x", "step": 1, "row": 77, "agents": [], "digests": []}),
    ],
)
def test_what_is_no_message_is_refused(raw: Message) -> None:
    with pytest.raises(LevelFailed, match="node b told node a what is no"):
        core().heard("b", raw)
