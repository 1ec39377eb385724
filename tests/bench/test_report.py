"""The arithmetic of the benchmarks' reports; what they measure is not tested here."""

import json
from pathlib import Path

from bench.call_and_stall import OURS, cost_of, scatter
from bench.plot import draw
from bench.processes import Place
from bench.report import Report, Rounds, Target, add, figure, least, ratio, target_line, write_json
from bench.settings import Settings


def test_a_ratio_is_the_median_of_the_ratios_within_each_round() -> None:
    assert ratio([1.0, 10.0, 300.0], [2.0, 5.0, 300.0]) == 1.0  # the ratio of the medians would be 2


def test_a_round_without_one_side_does_not_count() -> None:
    assert ratio([1.0, None, 4.0], [1.0, 1.0, None]) == 1.0
    assert ratio([None], [1.0]) is None
    assert ratio([], []) is None


def test_the_least_and_the_sum_are_taken_round_by_round() -> None:
    assert least([[1.0, 5.0, None], [2.0, 3.0, None]]) == [1.0, 3.0, None]
    assert add([1.0, None], [2.0, 3.0]) == [3.0, None]


def test_a_method_that_failed_in_one_round_keeps_its_other_rounds_in_place() -> None:
    rounds = Rounds()
    rounds.begin()
    rounds.add("steady", {"call": 1.0})
    rounds.failed("shaky", "the disk was full")
    rounds.begin()
    rounds.add("steady", {"call": 2.0})
    rounds.add("shaky", {"call": 8.0})
    rounds.begin()
    rounds.add("steady", {"call": 3.0})
    assert rounds.series("shaky", "call") == [None, 8.0, None]
    assert ratio(rounds.series("shaky", "call"), rounds.series("steady", "call")) == 4.0
    assert rounds.series("absent", "call") == [None, None, None]


def test_a_stall_lost_in_the_noise_counts_as_the_noise_for_us_and_as_none_for_a_peer() -> None:
    rounds = Rounds()
    rounds.begin()
    for method in (OURS[0], "a peer"):
        rounds.add(method, {"call": 1.0, "stall": -0.5, "noise": 0.25})
    assert cost_of(rounds, OURS[0]) == [1.25]
    assert cost_of(rounds, "a peer") == [1.0]


def test_a_stall_above_the_noise_counts_as_it_is() -> None:
    rounds = Rounds()
    rounds.begin()
    rounds.add(OURS[0], {"call": 1.0, "stall": 2.0, "noise": 0.25})
    assert cost_of(rounds, OURS[0]) == [3.0]


def test_one_outlier_does_not_move_the_scatter() -> None:
    assert scatter([1.0, 1.1, 0.9, 1.0, 1.1]) == scatter([1.0, 1.1, 0.9, 1.0, 50.0])


def test_a_target_is_reached_on_its_bound_and_missed_beyond_it() -> None:
    assert Target(what="cost", value=1.1, bound=1.1).reached is True
    assert Target(what="cost", value=1.2, bound=1.1).reached is False
    assert Target(what="speed", value=0.9, bound=0.9, at_most=False).reached is True
    assert Target(what="speed", value=0.8, bound=0.9, at_most=False).reached is False


def test_a_target_that_was_not_measured_is_neither_reached_nor_missed() -> None:
    target = Target(what="cost", value=None, bound=1.1)
    assert target.reached is None
    assert "NOT MEASURED" in target_line(target)


def test_figures_have_three_digits_and_no_exponent() -> None:
    assert [figure(value) for value in (0.0, 0.00123, 0.25, 3.14159, 1234.5)] == [
        "0",
        "0.00123",
        "0.250",
        "3.14",
        "1234",
    ]


def test_each_round_begins_with_another_method() -> None:
    place = Place(scratch=Path("scratch"), logs=Path("logs"))
    settings = Settings(place=place, rounds=3, quick=False, smoke=False, say=print)
    assert settings.turned(("a", "b", "c"), 1) == ["b", "c", "a"]
    assert settings.turned(("a", "b", "c"), 3) == ["a", "b", "c"]


def test_a_report_goes_to_disk_with_its_verdicts_and_its_picture(tmp_path: Path) -> None:
    report = Report(
        name="x",
        title="X",
        columns=("cost",),
        rows={"one": [2.0], "other": [None]},
        targets=[Target(what="cost", value=2.0, bound=1.0)],
        plotted=("cost",),
        samples={"one": {"call": [2.0]}},
    )
    write_json(report, tmp_path / "deep" / "x.json")
    draw(report, tmp_path / "x.png")
    found = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert found["targets"][0]["reached"] is False
    assert found["samples"] == {"one": {"call": [2.0]}}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
