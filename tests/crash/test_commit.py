"""A commit to a folder, killed at each of its system calls, and with each of them failing: old or new, never neither.

A first run under strace lists the calls that name the store; then each is met in a run of its own. strace counts the
calls of each kind and thread, so that is how a call is named here.
"""

import errno
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.checkpoint.levels.files import FileStore
from resilient.errors import LevelFailed
from tests.conformance.store_contract import get, put

CHILD = Path(__file__).with_name("commit_child.py")
NAME = "step_00000001/image"
OLD = b"the old bytes"
SIZE = (1 << 20) + 4096 + 100  # one request of the pool, one of the caller, and a tail
NEW = b"N" * SIZE
CALLS = ("openat", "mkdir", "pwrite64", "ftruncate", "fdatasync", "fsync", "rename", "link", "unlink", "close")


def strace(folder: Path, options: list[str], arguments: list[str]) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the child under strace; gives the finished process and the trace."""
    trace = folder / "trace"
    command = ["strace", "-f", "-qq", "-o", str(trace), *options, sys.executable, "-S", "-B", str(CHILD), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return done, trace.read_text()


def commit_lines(trace: str, root: Path) -> list[str]:
    """The trace from the first call that names the store."""
    lines = [re.sub(r"^\d+\s+", "", line) for line in trace.splitlines()]
    start = next(number for number, line in enumerate(lines) if str(root) in line and not line.startswith("execve"))
    return lines[start:]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_return(root: Path, tmp_path: Path) -> None:
    done, trace = strace(tmp_path, ["-y", "-e", f"trace={','.join(CALLS)}"], [str(root), NAME, str(SIZE)])
    assert done.stdout == "done\n", done.stderr
    lines = commit_lines(trace, tmp_path)
    synced = [number for number, line in enumerate(lines) if line.startswith("fdatasync(") and ".part>" in line]
    renamed = [number for number, line in enumerate(lines) if line.startswith("rename(") and NAME in line]
    written = [number for number, line in enumerate(lines) if line.startswith(("pwrite64(", "ftruncate("))]
    folder = [
        number for number, line in enumerate(lines) if line.startswith("fsync(") and f"<{root}/step_00000001>)" in line
    ]
    assert len(synced) == len(renamed) == len(folder) == 1
    assert max(written) < synced[0] < renamed[0] < folder[0]


def test_new_folders_reach_the_disk_up_to_the_one_that_was_there(root: Path, tmp_path: Path) -> None:
    _, trace = strace(tmp_path, ["-y", "-e", f"trace={','.join(CALLS)}"], [f"{root}/a", f"b/{NAME}", str(SIZE)])
    lines = commit_lines(trace, tmp_path)
    for made in (root, root / "a", root / "a/b", root / "a/b/step_00000001"):
        mkdir = next(number for number, line in enumerate(lines) if line.startswith(f'mkdir("{made}"'))
        assert any(line.startswith("fsync(") and f"<{made.parent}>)" in line for line in lines[mkdir:]), made


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.timeout(180)
def test_a_kill_at_any_system_call_leaves_the_old_or_the_new_bytes(root: Path, tmp_path: Path, call: str) -> None:
    exclusive = call in ("link", "unlink")
    for when in calls_of(call, root, tmp_path, exclusive):
        store = prepared(root, exclusive)
        options = ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={when}"]
        done, _ = strace(tmp_path, options, arguments(root, exclusive))
        assert done.returncode != 0, f"{call} number {when} was not reached"
        assert "done" not in done.stdout
        names = store.list()
        assert names in ([[], [NAME]] if exclusive else [[NAME]])
        if names:
            assert get(store, NAME) in ([NEW] if exclusive else [OLD, NEW])
        put(FileStore(str(root)), NAME, b"later")
        assert get(store, NAME) == b"later"
        assert os.listdir(root / "step_00000001") == ["image"], "the killed process left a file behind"
        store.delete([NAME])


@pytest.mark.parametrize("call", ["openat", "pwrite64", "ftruncate", "fdatasync", "fsync", "rename", "link"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EROFS"])
@pytest.mark.timeout(180)
def test_an_error_of_any_system_call_is_told_and_leaves_the_old_or_the_new_bytes(
    root: Path, tmp_path: Path, call: str, error: str
) -> None:
    exclusive = call == "link"
    for when in calls_of(call, root, tmp_path, exclusive):
        store = prepared(root, exclusive)
        options = ["-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"]
        done, _ = strace(tmp_path, options, arguments(root, exclusive))
        assert done.stdout.startswith(f"LevelFailed {getattr(errno, error)} "), (when, done.stdout, done.stderr)
        assert str(root) in done.stdout
        if not exclusive:
            assert get(store, NAME) in (OLD, NEW)
        assert [name for name in os.listdir(root / "step_00000001") if name != "image"] == []
        store.delete([NAME])


def test_where_direct_writes_are_refused_in_the_middle_ordinary_ones_go_on(root: Path, tmp_path: Path) -> None:
    for when in (1, 2, 3):
        options = ["-e", "trace=pwrite64", "-e", f"inject=pwrite64:error=EINVAL:when={when}"]
        done, _ = strace(tmp_path, options, [str(root), NAME, str(SIZE)])
        assert done.stdout == "done\n", done.stderr
        assert get(FileStore(str(root)), NAME) == NEW


def test_without_hard_links_an_exclusive_write_is_still_exclusive(root: Path, tmp_path: Path) -> None:
    options = ["-e", "trace=link", "-e", "inject=link:error=EPERM"]
    done, _ = strace(tmp_path, options, [str(root), NAME, str(SIZE), "exclusive"])
    assert done.stdout == "done\n", done.stderr
    assert get(FileStore(str(root)), NAME) == NEW
    done, _ = strace(tmp_path, options, [str(root), NAME, str(SIZE), "exclusive"])
    assert "FileExistsError" in done.stderr
    assert os.listdir(root / "step_00000001") == ["image"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_what_was_there_stays(small_disk: Path) -> None:
    store = FileStore(str(small_disk / "run"))
    put(store, NAME, OLD)
    for _ in range(2):
        with pytest.raises(LevelFailed, match="disk is full") as caught:
            store.write(NAME, [memoryview(bytes(4 << 20))] * 4)
        assert caught.value.errno == errno.ENOSPC
        assert get(store, NAME) == OLD
    assert os.listdir(small_disk / "run/step_00000001") == ["image"]
    store.write(NAME, [memoryview(bytes(4 << 20))])
    assert store.size(NAME) == 4 << 20


def test_a_file_system_that_turns_read_only_is_told_and_can_be_read(small_disk: Path) -> None:
    store = FileStore(str(small_disk / "run"))
    put(store, NAME, OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LevelFailed, match="read-only") as caught:
        put(store, NAME, b"new")
    assert caught.value.errno == errno.EROFS
    with pytest.raises(LevelFailed, match="read-only"):
        put(store, "step_00000002/image", b"new")
    with pytest.raises(LevelFailed, match="read-only"):
        store.delete([NAME])
    assert get(store, NAME) == OLD
    assert store.list() == [NAME]


def prepared(root: Path, exclusive: bool) -> FileStore:
    store = FileStore(str(root))
    put(store, NAME, OLD)
    if exclusive:
        os.unlink(root / NAME)
    return store


def arguments(root: Path, exclusive: bool) -> list[str]:
    return [str(root), NAME, str(SIZE), *(["exclusive"] if exclusive else [])]


def calls_of(call: str, root: Path, tmp_path: Path, exclusive: bool) -> list[int]:
    """The numbers, within their thread, of the calls of one kind that a commit makes on the store."""
    prepared(root, exclusive)
    done, trace = strace(tmp_path, ["-y", "-e", f"trace={call}"], arguments(root, exclusive))
    assert done.stdout == "done\n", done.stderr
    FileStore(str(root)).delete([NAME])
    counts: Counter[str] = Counter()
    numbers: set[int] = set()
    for line in trace.splitlines():
        thread, _, text = line.partition(" ")
        if text.lstrip().startswith(f"{call}("):
            counts[thread] += 1
            if str(root) in text:
                numbers.add(counts[thread])
    assert numbers, f"a commit makes no {call} on the store"
    return sorted(numbers)
