"""DeepSpeed's engines of which each rank has another part of the model: pipelines, experts, tensor slices."""

from pathlib import Path

import pytest

from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from tests.multiprocess import deepspeed_hook_cut_jobs as jobs
from tests.multiprocess.deepspeed_hook_cut_jobs import Held
from tests.multiprocess.ranks import run
from tests.multiprocess.test_deepspeed_formats import _whole

pytestmark = [pytest.mark.timeout(200), pytest.mark.usefixtures("runtime_dir")]

CLOSE = 2e-3  # in 16 bits the same run differs from time to time


def test_a_pipeline_is_fenced_and_goes_on_with_as_many_stages_or_fewer(tmp_path: Path) -> None:
    saved = run(jobs.save, 2, str(tmp_path), "pipeline", 2, 1)
    assert [one.fences for one in saved] == [2, 2]
    same = run(jobs.resume, 2, str(tmp_path), "pipeline", 2, 1)
    for before, after in zip(saved, same, strict=True):
        assert (after.model, after.masters) == (before.model, before.masters)
        assert after.losses == pytest.approx(before.losses, rel=CLOSE)
    one = run(jobs.resume, 1, str(tmp_path), "pipeline", 1, 1)[0]
    assert one.model == saved[0].model | saved[1].model
    assert one.losses == pytest.approx(saved[0].losses, rel=CLOSE)
    _check_on_disk(tmp_path, saved)


@pytest.mark.parametrize(("zero", "ranks", "others"), [(0, 2, 1), (1, 1, 2)])
def test_every_expert_has_a_name_of_its_own_and_is_found_on_whatever_rank_it_is(
    tmp_path: Path, zero: int, ranks: int, others: int
) -> None:
    saved = run(jobs.save, ranks, str(tmp_path), "experts", ranks, zero)
    same = run(jobs.resume, ranks, str(tmp_path), "experts", ranks, zero)
    for before, after in zip(saved, same, strict=True):
        assert (after.model, after.masters) == (before.model, before.masters)
        assert after.losses == pytest.approx(before.losses, rel=CLOSE)
    moved = run(jobs.resume, others, str(tmp_path), "experts", others, zero)
    model = {name: values for one in moved for name, values in one.model.items()}
    assert model == {name: values for one in saved for name, values in one.model.items()}
    assert sum("deepspeed_experts.3." in name for name in model) == 2
    _check_on_disk(tmp_path, saved)
    _check_on_disk(tmp_path, moved)


def test_tensor_slices_go_on_in_as_many_slices(tmp_path: Path) -> None:
    saved = run(jobs.save, 2, str(tmp_path), "slices", 1)
    assert saved[0].model != saved[1].model
    for before, after in zip(saved, run(jobs.resume, 2, str(tmp_path), "slices", 1), strict=True):
        assert (after.model, after.masters) == (before.model, before.masters)
        assert after.losses == pytest.approx(before.losses, rel=CLOSE)


def _check_on_disk(folder: Path, saved: list[Held]) -> None:
    """All that any rank held is in the durable snapshot, as one catalog."""
    with open_source(Reference(url=str(folder / "run"))) as source:
        for held in saved:
            for name, values in held.model.items():
                full = source.catalog.aliases.get(f"model.{name}", f"model.{name}")
                assert _whole(source, source.catalog.tensors[full]).tolist() == values, name
            for name, (begin, numbers) in held.masters.items():
                full = f"optimizer.state.model.{name}.fp32"
                tensor = source.catalog.tensors.get(full, source.catalog.tensors[f"model.{name}"])
                assert _whole(source, tensor).flatten().tolist()[begin : begin + len(numbers)] == numbers, name
