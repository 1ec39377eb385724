"""`resilient repair` and `prune`: damage is mended from elsewhere, and no more is deleted than was asked."""

import json
import shutil
from pathlib import Path

import pytest

from resilient.checkpoint.levels.claim import Claim
from resilient.checkpoint.levels.files import FileStore
from tests.launch.conftest import Resilient
from tests.launch.snapshots import STEPS, contents, flip, image, record


def break_everything(run: Path) -> None:
    """Rank 0's image has two bad blocks, and rank 1's record and digests are gone."""
    flip(image(run, 4, 0), 50_000)
    flip(image(run, 4, 0))
    record(run, 4, 1).unlink()
    image(run, 4, 1).with_suffix(".digests").unlink()


def test_a_snapshot_is_made_whole_from_another_level(durable: Path, local: Path, script: Resilient) -> None:
    before = contents(durable)
    break_everything(durable)
    dry = script("repair", durable, "--from", local, "--step", "4", "--dry-run", "--json")
    assert dry.code == 1
    assert [one["outcome"] for one in dry.json["steps"][0]["ranks"]] == ["repairable", "repairable"]
    assert contents(durable) != before
    assert not record(durable, 4, 1).exists()
    done = script("repair", durable, "--from", local, "--json")
    assert done.code == 0, done
    (step,) = done.json["steps"]
    assert [one["outcome"] for one in step["ranks"]] == ["repaired", "repaired"]
    assert step["ranks"][0]["from"] == [str(local)]
    assert step["ranks"][0]["blocks"] == 2
    assert contents(durable) == before


def test_blocks_come_from_whoever_has_them_whole(
    durable: Path, local: Path, tmp_path: Path, resilient: Resilient
) -> None:
    before = contents(durable)
    shutil.copytree(local, tmp_path / "third")
    for run, offset in ((durable, 50_000), (durable, -100), (local, 50_000), (tmp_path / "third", -100)):
        flip(image(run, 4, 0), offset)
    assert resilient("repair", durable, "--from", local).code == 1
    ended = resilient("repair", durable, "--from", local, "--from", tmp_path / "third")
    assert ended.code == 0, ended
    assert contents(durable) == before


def test_what_nobody_has_is_said_and_nothing_is_touched(durable: Path, local: Path, resilient: Resilient) -> None:
    for run in (durable, local):
        flip(image(run, 4, 0))
    before = contents(durable, local)
    ended = resilient("repair", durable, "--from", local)
    assert ended.code == 1
    assert "rank 0: lost" in ended.out
    assert "no place has 1 of its" in ended.out
    assert contents(durable, local) == before


def test_a_record_of_another_life_is_not_taken_for_the_snapshots(
    durable: Path, local: Path, resilient: Resilient
) -> None:
    from resilient.checkpoint.digest import digest

    rest = record(local, 4, 1).read_text().split("\n", 1)[1]
    life = json.loads("{" + rest)["life"]
    rest = rest.replace(life, "f" * len(life), 1)
    record(local, 4, 1).write_text(f'{{"digest":"{digest(rest.encode())}",\n{rest}')
    record(durable, 4, 1).unlink()
    ended = resilient("repair", durable, "--from", local)
    assert ended.code == 1
    assert "rank 1: lost: its record is not there; 1 of 2 ranks" in ended.out
    assert not record(durable, 4, 1).exists()


def test_a_step_that_is_gone_is_fetched_as_a_whole(durable: Path, local: Path, resilient: Resilient) -> None:
    before = contents(durable)
    shutil.rmtree(durable / "step_00000002")
    assert resilient("repair", durable, "--from", local, "--step", "2").code == 0
    assert contents(durable) == before
    assert resilient("verify", durable, "--all").code == 0


def test_all_steps_are_looked_at_when_asked(durable: Path, local: Path, resilient: Resilient) -> None:
    flip(image(durable, 2, 1))
    assert resilient("repair", durable, "--from", local).code == 0  # the newest one only
    assert resilient("verify", durable, "--step", "2").code == 1
    assert resilient("repair", durable, "--from", local, "--all").code == 0
    assert resilient("verify", durable, "--all").code == 0


def test_old_steps_are_pruned(durable: Path, script: Resilient) -> None:
    dry = script("prune", durable, "--keep", "1", "--keep-every", "2", "--dry-run", "--json")
    assert dry.json["steps"] == [1, 3]
    assert dry.json["kept"] == [2, 4]
    assert sorted(path.name for path in durable.iterdir()) == [f"step_{step:08d}" for step in STEPS]
    done = script("prune", durable, "--keep", "1", "--keep-every", "2", "--yes", "--json")
    assert done.code == 0
    assert done.json["deleted"]
    assert sorted(path.name for path in durable.iterdir()) == ["step_00000002", "step_00000004"]


def test_nobody_can_be_asked_in_a_script(durable: Path, script: Resilient) -> None:
    before = contents(durable)
    ended = script("prune", durable, "--keep", "1")
    assert ended.code == 2
    assert "--yes" in ended.err
    assert contents(durable) == before


def test_the_newest_step_that_is_really_whole_stays(durable: Path, resilient: Resilient) -> None:
    flip(record(durable, 4, 0), 300)  # its name still says that it is complete
    ended = resilient("prune", durable, "--keep", "1", "--yes", "--json")
    assert ended.code == 0
    assert ended.json["kept"] == [3, 4]
    assert resilient("verify", durable, "--step", "3").code == 0


def test_a_step_that_is_still_arriving_stays(durable: Path, resilient: Resilient) -> None:
    record(durable, 4, 1).unlink()
    assert resilient("prune", durable, "--keep", "1", "--yes", "--json").json["kept"] == [3, 4]
    assert image(durable, 4, 0).exists()


def test_files_of_others_stay(durable: Path, resilient: Resilient) -> None:
    (durable / "step_00000001" / "notes.txt").write_text("mine")
    (durable / "readme").write_text("mine")
    assert resilient("prune", durable, "--keep", "1", "--yes").code == 0
    assert [path.name for path in (durable / "step_00000001").iterdir()] == ["notes.txt"]
    assert (durable / "readme").exists()


def test_prune_leaves_a_place_alone_while_a_job_writes_there(
    durable: Path, resilient: Resilient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    claim = Claim(FileStore(str(durable)), "a job")
    claim.take()
    before = [path.name for path in sorted(durable.glob("step_*"))]
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.5):
            claim.beat()

    job = threading.Thread(target=beat)
    job.start()
    try:
        refused = resilient("prune", durable, "--keep", "1", "--yes")
        assert refused.code == 2
        assert "'a job'" in refused.err
        assert [path.name for path in sorted(durable.glob("step_*"))] == before
        assert resilient("prune", durable, "--keep", "1", "--yes", "--force").code == 0
    finally:
        over.set()
        job.join()
    assert [path.name for path in sorted(durable.glob("step_*"))] == before[-1:]
    assert (durable / "claim.json").exists()
