"""Where a checkpoint of any format lies."""

import gc
import os
from pathlib import Path

import pytest

from resilient.checkpoint.formats.folder import Folder
from resilient.errors import DamagedImage


def descriptors(path: Path) -> int:
    """How many of this process are of the file."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.exists(link) and os.path.realpath(link) == str(path) for link in links)


def test_a_file_that_nobody_closed_is_closed_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_bytes(b"abc")
    folder = Folder(str(tmp_path))
    found = bytearray(2)
    folder.read("one", 1, memoryview(found))
    assert (bytes(found), descriptors(path)) == (b"bc", 1)
    del folder
    gc.collect()
    assert descriptors(path) == 0


def test_reading_beyond_the_end_and_leaving_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"abc")
    folder = Folder(str(tmp_path))
    with pytest.raises(DamagedImage, match="ends 1 bytes early"):
        folder.read("one", 1, memoryview(bytearray(3)))
    with pytest.raises(DamagedImage, match="no name of a file within"):
        folder.read("../one", 0, memoryview(bytearray(1)))
    folder.close()
