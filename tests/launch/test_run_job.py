"""One launcher of `resilient run` from its arguments to its exit code, as far as that goes without a job."""

import os
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import drop_lock, take_lock
from resilient.launch.cli.command import main
from resilient.launch.run.job import run

MEMORY = Path("/dev/shm")


def left_by_a_launcher(name: str) -> Path:
    folder = MEMORY / f"resilient-run-{name}-{os.getpid()}"
    folder.mkdir()
    (folder / "alive").touch()
    os.utime(folder, (0, 0))
    return folder


def test_what_a_killed_launcher_left_in_memory_goes_with_the_next_and_a_living_ones_stays(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dead, living = left_by_a_launcher("dead"), left_by_a_launcher("living")
    lock = take_lock(living / "alive")
    assert lock is not None
    try:
        with pytest.raises(SystemExit) as ended:
            run(["--help"], {})
        assert ended.value.code == 0
        assert not dead.exists()
        assert living.exists()
    finally:
        drop_lock(lock)
        (living / "alive").unlink()
        living.rmdir()
    assert "--nnodes" in (help_text := capsys.readouterr().out)
    assert "options of resilient" in help_text


def test_a_missing_script_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "absent.py", "--help"]) == 2  # --help is the script's here
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith("resilient: absent.py: there is no such script")
