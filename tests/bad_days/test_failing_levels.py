"""Disks that are full, read-only or hang: that level says so, the others go on, and later saves succeed again."""

import subprocess
import threading
import time
from pathlib import Path

import fsspec
import pytest
from torch import nn

from resilient.errors import LevelFailed, SnapshotSkipped
from tests.bad_days.conftest import Make
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0
WIDE = 200  # 0.97 MB of state in two layers: two images do not fit a disk of 2 MiB


def test_a_full_durable_disk_fails_that_level_by_path_and_recovers_when_there_is_room(
    checkpointer: Make, small_disk: Path
) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1500 << 10))
    training = Training(WIDE)
    saving = checkpointer(small_disk / "run", training.state, durable_every=1, keep_last=1)
    (handle,) = training.run(1, 1, saving)
    with pytest.raises(LevelFailed, match=r"run/step_00000001.*disk is full"):
        handle.durable("durable").result(LONG_S)
    assert handle.durable("memory").result(LONG_S) == 1
    filler.unlink()
    assert training.run(2, 2, saving)[0].durable("durable").result(LONG_S) == 2
    assert [name for name in small_disk.rglob("*") if "part" in name.name] == []
    assert any("disk is full" in line for line in saving.close()) or saving.statistics.failures >= 1


def test_a_full_local_disk_does_not_keep_the_durable_level_from_being_written(
    checkpointer: Make, small_disk: Path, tmp_path: Path
) -> None:
    (small_disk / "filler").write_bytes(bytes(1500 << 10))
    training = Training(WIDE)
    saving = checkpointer(tmp_path / "url", training.state, durable_every=1, local=str(small_disk / "local"))
    (handle,) = training.run(1, 1, saving)
    with pytest.raises(LevelFailed, match=r"local/step_00000001.*disk is full"):
        handle.durable("local").result(LONG_S)
    assert handle.durable("durable").result(LONG_S) == 1
    (small_disk / "filler").unlink()
    assert training.run(2, 2, saving)[0].durable("local").result(LONG_S) == 2


def test_a_disk_that_becomes_read_only_fails_by_name_and_recovers(checkpointer: Make, small_disk: Path) -> None:
    training = Training()
    saving = checkpointer(small_disk / "run", training.state, durable_every=1)
    assert training.run(1, 1, saving)[0].durable("durable").result(LONG_S) == 1
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (handle,) = training.run(2, 2, saving)
    with pytest.raises(LevelFailed, match=r"run/step_00000002.*read-only"):
        handle.durable("durable").result(LONG_S)
    assert handle.durable("memory").result(LONG_S) == 2
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert training.run(3, 3, saving)[0].durable("durable").result(LONG_S) == 3
    again = Training(seed=5)
    saving.close()
    assert checkpointer(small_disk / "run", again.state).restore() == 3
    assert differing(again.tensors(), undisturbed(3)) == []


def test_a_url_that_cannot_be_written_at_all_is_refused_at_the_start(checkpointer: Make, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LevelFailed, match=r"run.*read-only"):
        checkpointer(small_disk / "run", Training().state)


# A file system of somebody else, as fsspec finds it: by an entry point of an installed package. It keeps what it is
# given in a folder, and while the file `stall` is there no write of an image comes back.
STALLING = """
import os, time
from fsspec.implementations.local import LocalFileSystem

class StallingFileSystem(LocalFileSystem):
    protocol = "stalling"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("stalling://"))

    def open(self, path, mode="rb", **kwargs):
        while "safetensors" in path and "w" in mode and os.path.exists(os.environ["STALL_WHILE"]):
            time.sleep(0.02)
        return super().open(path, mode, **kwargs)
"""


@pytest.fixture
def stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, stores below `stalling://` take no image."""
    site = tmp_path / "site"
    (site / "stalling-1.0.dist-info").mkdir(parents=True)
    (site / "stalling-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stalling\nVersion: 1.0\n")
    (site / "stalling-1.0.dist-info" / "entry_points.txt").write_text(
        "[fsspec.specs]\nstalling = stalling_file_system.StallingFileSystem\n"
    )
    (site / "stalling_file_system.py").write_text(STALLING)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("STALL_WHILE", str(tmp_path / "stall"))
    fsspec.register_implementation("stalling", "stalling_file_system.StallingFileSystem", clobber=True)
    return tmp_path / "stall"


def test_a_store_that_hangs_fails_within_the_write_timeout_and_memory_goes_on(
    checkpointer: Make, stall: Path, tmp_path: Path
) -> None:
    training = Training()
    saving = checkpointer(f"stalling://{tmp_path}/url", training.state, durable_every=5, write_timeout_s=1.5, retries=1)
    stall.touch()
    began = time.monotonic()
    *_, hanging = training.run(1, 5, saving)
    with pytest.raises(LevelFailed, match=r"1\.5 s"):
        hanging.durable("durable").result(LONG_S)
    assert 1.0 < time.monotonic() - began < 10.0
    assert training.run(6, 9, saving)[-1].durable("memory").result(LONG_S) == 9
    stall.unlink()
    assert training.run(10, 10, saving)[-1].durable("durable").result(LONG_S) == 10
    assert not (tmp_path / "url/step_00000005/rank_00000-of-00001.json").exists(), "a write that was given up published"
    assert saving.close() != []


def test_skip_never_stalls_the_training_when_a_level_is_slow(checkpointer: Make, stall: Path, tmp_path: Path) -> None:
    training = Training()
    saving = checkpointer(f"stalling://{tmp_path}/url", training.state, durable_every=1, on_pressure="skip")
    stall.touch()
    handles = training.run(1, 8, saving)
    skipped = [handle for handle in handles if isinstance(handle.captured.exception(LONG_S), SnapshotSkipped)]
    assert skipped != []
    assert saving.statistics.skipped == len(skipped)
    assert all(isinstance(handle.durable("memory").exception(0), SnapshotSkipped) for handle in skipped)
    assert max(saving.statistics.fence_seconds) < 2.0
    stall.unlink()
    taken = [handle for handle in handles if handle not in skipped]
    assert [handle.durable("durable").result(LONG_S) for handle in taken] == [handle.step for handle in taken]


def test_wait_stalls_at_the_fence_and_loses_no_snapshot(checkpointer: Make, stall: Path, tmp_path: Path) -> None:
    training = Training()
    saving = checkpointer(f"stalling://{tmp_path}/url", training.state, durable_every=1)
    stall.touch()
    flowing = threading.Timer(1.5, stall.unlink)
    flowing.start()
    handles = training.run(1, 6, saving)
    assert [handle.durable("memory").result(LONG_S) for handle in handles] == [1, 2, 3, 4, 5, 6]
    assert handles[-1].durable("durable").result(LONG_S) == 6
    flowing.join()
    assert max(saving.statistics.fence_seconds) > 0.5, "it did not wait: the test shows nothing"
    assert saving.close() == []


def test_a_state_that_shrinks_while_its_last_images_are_being_written_waits_for_room_and_loses_no_snapshot(
    checkpointer: Make, stall: Path, tmp_path: Path
) -> None:
    model = nn.ModuleList([nn.Linear(300, 300) for _ in range(8)])
    saving = checkpointer(f"stalling://{tmp_path}/url", {"model": model}, durable_every=1)
    stall.touch()
    handles = [saving.save(step) for step in (1, 2)]
    assert [handle.durable("memory").result(LONG_S) for handle in handles] == [1, 2]
    saving.fence()
    del model[6:]
    flowing = threading.Timer(1.5, stall.unlink)
    flowing.start()
    handles.append(saving.save(3))
    assert [handle.durable("durable").result(LONG_S) for handle in handles] == [1, 2, 3]
    flowing.join()
    assert saving.close() == []


def test_the_newest_complete_image_survives_any_pressure(checkpointer: Make, stall: Path, tmp_path: Path) -> None:
    training = Training()
    url = f"stalling://{tmp_path}/url"
    saving = checkpointer(url, training.state, durable_every=1, fence_timeout_s=1.0)
    stall.touch()
    handles = training.run(1, 6, saving)
    settled = [(handle.step, handle.durable("memory")) for handle in handles if handle.durable("memory").done()]
    safe = max(step for step, memory in settled if memory.exception() is None)
    again = Training(seed=7)
    other = checkpointer(url, again.state, durable_every=1)  # the first one goes without a word, as a killed one does
    assert other.restore() == safe
    assert differing(again.tensors(), undisturbed(safe)) == []
