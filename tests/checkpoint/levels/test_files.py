"""What a store in a folder does beyond the contract: left-over files, odd places, errors that say what to do."""

import errno
import mmap
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient.checkpoint.levels.direct import ALIGN, PIECE_BYTES, address_of
from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.process import this_process
from resilient.errors import LevelFailed
from tests.conformance.store_contract import get, put

NAME = "step_00000001/image"


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(str(tmp_path / "run"))


def left_over(folder: Path, host_tag: str, pid: int, started: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".image.{host_tag}-{pid}-{started}-0.part"
    path.write_bytes(b"half")
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_big_aligned_image_is_written_and_read_in_pieces(store: FileStore) -> None:
    memory = mmap.mmap(-1, 2 * PIECE_BYTES + 3 * ALIGN)
    for start in range(0, len(memory), ALIGN):
        memory[start : start + 8] = start.to_bytes(8, "little")
    view = memoryview(memory)
    store.write(NAME, [view[: PIECE_BYTES + ALIGN], view[PIECE_BYTES + ALIGN :]])
    into = mmap.mmap(-1, len(memory))
    store.read(NAME, 0, memoryview(into))
    assert into[:] == memory[:]


def test_the_address_of_read_only_memory_is_known_too() -> None:
    data = bytes(100)
    assert address_of(memoryview(data)[7:]) - address_of(memoryview(data)) == 7
    assert address_of(memoryview(mmap.mmap(-1, ALIGN))) % ALIGN == 0


def test_what_a_dead_process_left_is_removed_by_the_next_write_to_the_folder(store: FileStore, dead_pid: int) -> None:
    path = left_over(Path(store.root) / "step_00000001", this_process().host_tag, dead_pid, 1)
    assert store.list() == []
    put(store, NAME, b"1")
    assert not path.exists()


def test_what_a_dead_process_left_goes_with_the_folder(store: FileStore, dead_pid: int) -> None:
    put(store, NAME, b"1")
    path = left_over(Path(store.root) / "step_00000001", this_process().host_tag, dead_pid, 1)
    store.delete([NAME])
    assert not path.parent.exists()
    assert Path(store.root).is_dir()


def test_a_sweep_removes_what_is_left_over_and_nothing_else(store: FileStore, dead_pid: int) -> None:
    me = this_process()
    put(store, NAME, b"1")
    folder = Path(store.root) / "step_00000001"
    gone = [
        left_over(folder, me.host_tag, dead_pid, 1),
        left_over(folder / "deep", me.host_tag, me.pid, me.started - 1),
    ]
    stays = [
        left_over(folder, me.host_tag, me.pid, me.started),
        left_over(folder, "0123abcd", dead_pid, 1),
        folder / ".hidden.part",
    ]
    stays[-1].write_bytes(b"")
    assert store.sweep() == 2
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stays)


def test_what_another_host_left_goes_after_a_day(store: FileStore) -> None:
    path = left_over(Path(store.root), "0123abcd", 1, 1)
    assert store.sweep() == 0
    os.utime(path, (0, 0))
    assert store.sweep() == 1


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(store: FileStore, name: str) -> None:
    with pytest.raises(ValueError, match="no name for a store"):
        put(store, name, b"x")
    assert not Path(store.root).exists()


def test_a_write_where_the_root_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LevelFailed, match=re.escape(str(tmp_path / "file"))):
        put(FileStore(str(tmp_path / "file")), NAME, b"x")


def test_a_folder_that_refuses_new_files_is_told(store: FileStore) -> None:
    put(store, NAME, b"old")
    folder = f"{store.root}/step_00000001"
    subprocess.run(["chattr", "+i", folder], check=True)
    try:
        with pytest.raises(LevelFailed, match="check its owner, mode and attributes") as caught:
            put(store, NAME, b"new")
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert caught.value.errno == errno.EPERM
    assert get(store, NAME) == b"old"


def test_a_name_too_long_for_the_file_system_is_told(store: FileStore) -> None:
    put(store, "n" * 200, b"1")
    assert store.list() == ["n" * 200]
    with pytest.raises(LevelFailed, match="shorter") as caught:
        put(store, "n" * 300, b"1")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_an_error_of_the_iterator_is_not_taken_for_one_of_the_disk(store: FileStore) -> None:
    def chunks() -> Iterator[memoryview]:
        yield memoryview(b"1")
        raise FileNotFoundError(errno.ENOENT, "the caller's own")

    with pytest.raises(FileNotFoundError, match="own"):
        store.write(NAME, chunks())
    assert os.listdir(Path(store.root) / "step_00000001") == []


def test_writing_to_a_folder_while_a_thread_empties_and_removes_it_always_works(store: FileStore) -> None:
    events = threading.Event(), threading.Event()
    write_while(threading.Thread(target=remove_again_and_again, args=(store.root, *events)), *events, store)


def test_writing_to_a_folder_while_a_process_empties_and_removes_it_always_works(store: FileStore) -> None:
    context = multiprocessing.get_context("spawn")
    events = context.Event(), context.Event()
    write_while(context.Process(target=remove_again_and_again, args=(store.root, *events)), *events, store)


def write_while(remover: Any, started: Any, stop: Any, store: FileStore) -> None:
    """Write, read and delete, again and again, while a thread or process runs."""
    remover.start()
    try:
        assert started.wait(60)
        for number in range(100):
            put(store, NAME, bytes([number]))
            assert get(store, NAME) == bytes([number])
            store.delete([NAME])
    finally:
        stop.set()
        remover.join()


def remove_again_and_again(root: str, started: threading.Event, stop: threading.Event) -> None:
    other = FileStore(root)
    started.set()
    while not stop.is_set():
        other.delete(["step_00000001/other"])
        time.sleep(0.0001)  # hundreds of times as often as anything real; without any pause nobody else could win


def test_a_listing_does_not_follow_links_to_folders(store: FileStore) -> None:
    put(store, NAME, b"1")
    os.symlink(store.root, f"{store.root}/loop")
    assert store.list() == [NAME]
