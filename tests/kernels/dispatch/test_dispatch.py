"""The dispatcher among real ranks: errors, agreement, verdicts, and what is left when a peer dies."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from resilient.kernels.dispatch.decide import Method
from tests.kernels.dispatch import jobs
from tests.multiprocess import ranks

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not there for this platform"
)


def test_wrong_calls_are_the_same_clear_error_on_all_ranks_and_harm_nothing() -> None:
    texts = ranks.run(jobs.wrong_calls, 2)
    assert texts[0] == texts[1]
    causes = [
        "6 is not 5", "two dimensions", "5 rows", "float32, float64", "int32", "not contiguous", "bias must be [8]",
        "'tanh'", "'quick'", "0 chunks", "empty", "6 is not 5",
    ]  # fmt: skip
    assert [cause for cause, text in zip(causes, texts[0], strict=True) if cause not in text] == []
    assert all(text.startswith("UsageError") for text in texts[0])


def test_ranks_that_disagree_all_learn_who_called_what() -> None:
    texts = ranks.run(jobs.differing_calls, 3)
    assert texts[0] == texts[1] == texts[2]
    shapes, chunked, names, one = texts[0]
    assert shapes.startswith("CollectiveMismatch")
    assert "rank 0: matmul_all_reduce of [8, 6]" in shapes
    assert "ranks 1, 2: matmul_all_reduce of [16, 6]" in shapes
    assert "rank 0: all_gather_matmul of [24, 6]" in chunked
    assert "rank 0: matmul_reduce_scatter" in names
    assert one.startswith("UsageError: rank 1: ")


def test_a_shapes_first_calls_try_several_ways_and_all_ranks_come_to_one_verdict(tmp_path: Path) -> None:
    said = ranks.run(jobs.settling, 2, str(tmp_path / "cache"), 40)
    assert said[0] == said[1]
    assert said[0][0].endswith("False")
    assert said[0][39].endswith("True")
    assert "plain" in said[0][-1]
    assert "seen" in said[0][-1]


def test_costs_are_kept_in_a_file_for_this_user_alone(tmp_path: Path) -> None:
    ranks.run(jobs.settling, 2, str(tmp_path / "cache"), 2)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700


def test_costs_that_are_far_from_what_is_seen_are_measured_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ranks.run(jobs.settling, 2, str(cache), 2)
    (kept,) = cache.iterdir()
    costs = json.loads(kept.read_text())
    costs["costs"]["rates"] = dict.fromkeys(costs["costs"]["rates"], 1.0)  # a flop a second
    kept.write_text(json.dumps(costs))
    said = ranks.run(jobs.settling, 2, str(cache), 40)
    assert said[0] == said[1]
    assert "chunked in 2" in said[0][-1]  # though the costs said that there was nothing to hide
    assert not kept.exists()


def test_autocast_inference_and_activation_checkpoints_are_respected() -> None:
    ranks.run(jobs.in_other_modes, 2)


@pytest.mark.parametrize("method", ["plain", "chunked", pytest.param("fused", marks=needs_triton)])
def test_a_compiled_function_has_the_same_gradients(method: Method) -> None:
    ranks.run(jobs.compiled, 2, method)


def test_gradients_are_laid_out_as_a_compiler_is_told() -> None:
    assert ranks.run(jobs.strides, 2) == [[], []]


def test_a_small_shape_is_done_the_plain_way_without_being_timed() -> None:
    said = ranks.run(jobs.small, 2)
    assert said[0] == said[1] == ["plain: 64 rows are too few for two chunks of 256", True, 0]


def test_a_settled_call_enters_few_functions() -> None:
    """After a matmul the caches hold none of their code: each costs a microsecond, of a call of a millisecond."""
    settled, named = (ranks.run(jobs.python_calls, 2, method)[0] for method in (None, "plain"))
    assert settled <= named
    assert settled <= 16


def test_a_shape_with_other_rows_takes_over_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_CACHE_DIR", str(tmp_path))
    said = ranks.run(jobs.rows_that_vary, 2)
    assert said[0] == said[1]
    first, second = said[0]
    assert first.startswith("600: ")
    assert second.startswith("640: ")
    assert "as with 600 rows, where " in second
    assert first.partition(",")[0].removeprefix("600") == second.partition(",")[0].removeprefix("640")


def test_verdicts_are_renewed_when_times_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_CACHE_DIR", str(tmp_path))
    taken = ranks.run(jobs.renewing, 2)
    assert taken[0] == taken[1]
    before, after = taken[0]
    assert before.startswith("chunked")
    assert after == "plain"


def test_a_shape_whose_plain_way_was_the_only_one_is_tried_again_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESILIENT_CACHE_DIR", str(tmp_path))
    assert ranks.run(jobs.renewing_the_only_way, 2) == [["plain", "chunked in 2"]] * 2


@pytest.mark.parametrize("settled_before", [False, True])
def test_a_fused_way_that_fails_on_one_rank_is_done_plainly_on_all_and_not_tried_again(
    settled_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESILIENT_CACHE_DIR", str(tmp_path))
    told = ranks.run(jobs.a_fused_way_that_fails, 2, settled_before)
    assert told[0] == told[1]
    first, taken, verdicts, reasons = told[0]
    assert first == ("fused" if settled_before else "none")
    assert "fused" not in [*taken, *verdicts]
    assert [reason for reason in reasons if "rank 1: UsageError: these two share no memory" not in reason] == []


@needs_triton
def test_a_fused_call_that_failed_before_is_an_error_on_all_ranks_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESILIENT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RESILIENT_RUNTIME_DIR", str(tmp_path))
    told = ranks.run(jobs.a_fused_call_that_failed_before, 2)
    (left, error), (_, same) = told
    assert "rank 1 has not come" in left
    assert error.startswith("rank 0: a fused call before matmul_all_reduce of [300, 512]")
    assert error == same


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose work could be captured")
def test_while_a_graph_is_captured_calls_are_plain_and_nothing_is_timed(tmp_path: Path) -> None:
    taken = ranks.run(jobs.captured, 1, str(tmp_path))[0]
    assert taken == ["plain", "plain"]


def test_a_replicated_matmul_that_is_wrong_on_one_rank_is_an_error_on_all() -> None:
    texts = ranks.run(jobs.one_wrong_replicated_call, 3)
    assert texts[0] == texts[1] == texts[2]
    wrong, rows, columns = texts[0]
    assert wrong.startswith("UsageError: rank 1: ")
    assert "6 is not 5" in wrong
    assert rows.startswith("CollectiveMismatch")
    assert "ranks 0, 2: replicated_matmul of [4, 6]" in rows
    assert columns == "nothing was said"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("operation", ["all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"])
def test_a_peer_that_is_gone_is_the_groups_own_error_on_the_others(operation: str, backward: bool) -> None:
    found = ranks.run(jobs.a_peer_goes, 3, operation, backward)[:2]
    assert [name for name, _, _ in found] == ["RuntimeError"] * 2
    assert max(seconds for _, _, seconds in found) < 30  # the group's timeout is 20


@pytest.mark.parametrize("backward", [False, True])
def test_so_it_is_where_two_ranks_exchange_what_they_have(backward: bool) -> None:
    name, _, seconds = ranks.run(jobs.a_peer_goes, 2, "matmul_all_reduce", backward)[0]
    assert name == "RuntimeError"
    assert seconds < 30
