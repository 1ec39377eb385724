"""What is tried and what is kept: pure decisions, on numbers made up for them."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.kernels.dispatch.cache import Cache, folder
from resilient.kernels.dispatch.costs import Costs, Line, predicted_s
from resilient.kernels.dispatch.decide import PLAIN, Choice, plan, settle
from resilient.kernels.overlap.call import OPERATIONS, Call

CALL = Call(
    operation="matmul_reduce_scatter", rows=4096, inner=2048, columns=2048, dtype="float32", device="cpu", world=2
)
TWO, FOUR = Choice(method="chunked", chunks=2), Choice(method="chunked", chunks=4)


def costs(rate: float = 1e11, bandwidth: float = 1e8, latency_s: float = 1e-4) -> Costs:
    line = Line(latency_s=latency_s, bytes_per_s=bandwidth)
    return Costs(rates={32: rate / 4, 256: rate, 1024: rate}, lines=dict.fromkeys(OPERATIONS, line))


def test_a_call_whose_parts_are_both_long_is_worth_a_try_in_chunks() -> None:
    made = plan(CALL, costs())
    assert made.choices[0] == PLAIN
    assert len(made.choices) > 1
    assert not made.settled
    assert "worth a try" in made.reason


def test_few_rows_are_plain_for_good_whatever_the_costs() -> None:
    made = plan(dataclasses.replace(CALL, rows=1022), costs())
    assert (made.choices, made.settled) == ((PLAIN,), True)
    assert "511 rows" in made.reason


@pytest.mark.parametrize(("given", "said"), [(costs(bandwidth=1e12), "communication"), (costs(rate=1e15), "matmul")])
def test_where_there_is_nothing_to_hide_only_the_plain_way_is_tried(given: Costs, said: str) -> None:
    made = plan(CALL, given)
    assert made.choices == (PLAIN,)
    assert said in made.reason
    assert not made.settled  # its times will say whether the costs were right


def test_a_fused_kernel_is_tried_where_there_is_one_even_with_few_rows() -> None:
    assert Choice(method="fused") in plan(dataclasses.replace(CALL, rows=64), costs(), None).choices


def test_longer_latencies_mean_fewer_chunks() -> None:
    def best(latency_s: float) -> int:
        times = plan(CALL, costs(latency_s=latency_s)).predicted_s
        return min((choice for choice in times if choice != PLAIN), key=lambda choice: times[choice]).chunks

    assert best(1e-5) > best(0.1)


def test_a_backward_has_twice_as_much_to_compute() -> None:
    back = dataclasses.replace(CALL, backward=True)
    given = costs(bandwidth=1e13, latency_s=1e-9)
    assert predicted_s(given, back, 1) == pytest.approx(2 * predicted_s(given, CALL, 1), rel=0.01)
    assert predicted_s(given, back, 2) == pytest.approx(2 * predicted_s(given, CALL, 2), rel=0.01)


def test_the_quickest_way_is_kept() -> None:
    made = plan(CALL, costs())
    found = settle(made, {PLAIN: [1.0, 1.1, 1.0], TWO: [0.8, 0.8, 0.9], FOUR: [0.6, 0.7, 0.6]})
    assert found.choice == FOUR
    assert "600 ms" in found.reason


@pytest.mark.parametrize("times", [[0.99, 0.98, 0.98], [0.9, 1.2, 1.3], [0.99, 0.5, 0.99]])
def test_a_way_that_is_hardly_or_only_at_times_quicker_is_not(times: list[float]) -> None:
    assert settle(plan(CALL, costs()), {PLAIN: [1.0, 1.0, 1.0], TWO: times}).choice == PLAIN


@pytest.mark.parametrize(("factor", "stale"), [(0.2, True), (0.8, False), (1.2, False), (5.0, True)])
def test_costs_are_called_stale_when_they_foretold_something_else(factor: float, stale: bool) -> None:
    made = plan(CALL, costs())
    assert settle(made, {PLAIN: [made.predicted_s[PLAIN] * factor] * 3}).stale == stale


KEY: dict[str, str | int] = {"device": "a processor", "world": 2}


def test_costs_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.find(KEY) is None
    cache.keep(KEY, costs())
    cache.keep(KEY, costs(rate=2e11))
    assert cache.find(KEY) == costs(rate=2e11)
    assert cache.find({**KEY, "world": 3}) is None
    cache.forget(KEY)
    assert cache.find(KEY) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "null", '{"version": 1, "key": {}, "costs": {}}', "[" * 100_000], ids=range(6)
)
def test_a_file_that_holds_something_else_is_none(text: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep(KEY, costs())
    (path,) = tmp_path.iterdir()
    path.write_text(text)
    assert cache.find(KEY) is None


Damage = Callable[[dict[str, Any]], object]  # of what a file holds
DAMAGES: dict[str, Damage] = {
    "another version": lambda file: file.update(version=0),
    "another key": lambda file: file["key"].update(world=3),
    "no rates": lambda file: file["costs"].update(rates={}),
    "rates that are none": lambda file: file["costs"].update(rates=[1]),
    "lines that are none": lambda file: file["costs"].update(lines=[1]),
    "a rate of nothing": lambda file: file["costs"]["rates"].update({"32": 0}),
    "a rate that is not a number": lambda file: file["costs"]["rates"].update({"32": float("nan")}),
    "a rate without end": lambda file: file["costs"]["rates"].update({"32": float("inf")}),
    "a rate beyond numbers": lambda file: file["costs"]["rates"].update({"32": 10**400}),
    "a latency that is not a number": lambda file: file["costs"]["lines"][OPERATIONS[1]].update(latency_s=float("nan")),
    "rows that are none": lambda file: file["costs"]["rates"].update({"0": 1e9}),
    "more rows than there can be": lambda file: file["costs"]["rates"].update({"9" * 3000: 1e9}),
    "too many rates to tell": lambda file: file["costs"]["rates"].update({str(rows): 1e9 for rows in range(1, 101)}),
    "an operation too few": lambda file: file["costs"]["lines"].pop(OPERATIONS[2]),
    "an operation too many": lambda file: file["costs"]["lines"].update(other=file["costs"]["lines"][OPERATIONS[0]]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_or_from_elsewhere_is_none(damage: Damage, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep(KEY, costs())
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole))
    assert cache.find(KEY) is not None
    damage(whole)
    path.write_text(json.dumps(whole))
    assert cache.find(KEY) is None


def test_a_link_in_a_files_place_is_not_followed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.keep(KEY, costs())
    (path,) = (tmp_path / "cache").iterdir()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.find(KEY) is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.keep(KEY, costs())
    assert cache.find(KEY) is None


def test_the_folder_is_where_the_user_says_or_caches_are() -> None:
    assert folder({"RESILIENT_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert folder({"XDG_CACHE_HOME": "/b", "HOME": "/c"}) == Path("/b/resilient")
    assert folder({"HOME": "/c"}) == Path("/c/.cache/resilient")
