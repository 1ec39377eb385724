"""What ranks tell their launcher."""

from pathlib import Path

from resilient.checkpoint.events import Events, read_events


def test_a_launcher_reads_what_each_rank_has_told(tmp_path: Path) -> None:
    first, second = Events(tmp_path, 0), Events(tmp_path, 11)
    first.tell("joined", node="n1")
    first.tell("restored", step=3, levels={"0": "memory"})
    first.saved(4)
    second.saved(5)
    heard = read_events(tmp_path)
    assert {rank: told.step for rank, told in heard.items()} == {0: 4, 11: 5}
    restored = heard[0].last("restored")
    assert restored is not None
    assert (restored["step"], restored["rank"]) == (3, 0)
    assert heard[11].last("joined") is None
    first_at, second_at = heard[0].saved_at_s, heard[11].saved_at_s
    assert first_at is not None
    assert second_at is not None
    assert first_at <= second_at


def test_a_rank_that_has_saved_nothing_has_no_step(tmp_path: Path) -> None:
    Events(tmp_path, 2)
    told = read_events(tmp_path)[2]
    assert (told.step, told.saved_at_s, told.events) == (None, None, ())


def test_a_second_checkpointer_of_a_rank_goes_on_where_the_first_was(tmp_path: Path) -> None:
    first = Events(tmp_path, 0)
    first.saved(7)
    first.tell("joined")
    first.close()
    first.close()
    second = Events(tmp_path, 0)
    assert read_events(tmp_path)[0].step == 7
    second.tell("restored")
    assert [told["event"] for told in read_events(tmp_path)[0].events] == ["joined", "restored"]


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    events = Events(tmp_path, 0)
    events.tell("joined")
    with next(tmp_path.glob("*.jsonl")).open("a") as file:
        file.write('{"event": "rest')
    assert [told["event"] for told in read_events(tmp_path)[0].events] == ["joined"]


def test_without_a_launcher_nothing_is_written_and_nothing_raised(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for events in (Events.of({}, 0), Events(tmp_path / "file" / "below", 0)):
        events.saved(1)
        events.tell("joined")
        events.close()
        events.saved(2)
    assert read_events(tmp_path / "absent") == {}
    assert read_events(tmp_path) == {}
