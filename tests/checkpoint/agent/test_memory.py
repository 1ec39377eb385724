"""Shared memory: page-aligned, of fixed size, readable by others without being writable, and given back."""

import mmap
import os
from pathlib import Path

import pytest

from resilient.checkpoint.agent.huge_pages import HUGE_BYTES, huge_file
from resilient.checkpoint.agent.memory import (
    PAGE_BYTES,
    Memory,
    address_of_view,
    available_bytes,
    check_room,
    prefault,
    whole_pages,
)
from resilient.errors import OverBudget

CAPACITY = 3 * PAGE_BYTES


def test_a_mapping_of_the_file_sees_what_was_written_and_begins_on_a_page() -> None:
    memory = Memory(CAPACITY, "test")
    memory.view[:5] = b"hello"
    with mmap.mmap(memory.fd, CAPACITY) as other:
        assert other[:5] == b"hello"
    assert address_of_view(memory.view) % PAGE_BYTES == 0
    memory.drop()


def test_nobody_can_take_pages_away_or_write_through_the_descriptor_for_readers() -> None:
    memory = Memory(CAPACITY, "test")
    for size in (0, 2 * CAPACITY):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    reading = memory.read_only_fd()
    with pytest.raises(PermissionError):
        mmap.mmap(reading, CAPACITY)
    with mmap.mmap(reading, CAPACITY, prot=mmap.PROT_READ) as view:
        assert view[:1] == b"\0"
    os.close(reading)
    memory.drop()


def test_large_memory_is_in_huge_pages_where_the_kernel_gives_them_and_reads_the_same() -> None:
    memory = Memory(2 * HUGE_BYTES + PAGE_BYTES, "test")
    memory.view[HUGE_BYTES] = 7
    made = 2 * HUGE_BYTES + PAGE_BYTES - memory.missing_bytes()
    assert made == (HUGE_BYTES if huge_file("probe") is not None else PAGE_BYTES)
    prefault(memory.view, lambda: False)
    assert memory.missing_bytes() == 0
    reading = memory.read_only_fd()
    with pytest.raises(PermissionError):
        mmap.mmap(reading, memory.capacity)
    assert os.pread(reading, 2, HUGE_BYTES) == b"\x07\0"
    os.close(reading)
    memory.drop()


def test_dropping_it_closes_the_file_but_leaves_a_reader_its_view() -> None:
    memory = Memory(CAPACITY, "test")
    fd, view = memory.fd, memory.view
    view[:5] = b"hello"
    memory.drop()
    memory.drop()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert bytes(view[:5]) == b"hello"


def test_prefaulting_makes_all_pages_and_changes_no_byte() -> None:
    memory = Memory(CAPACITY, "test")
    memory.view[PAGE_BYTES] = 7
    assert memory.missing_bytes() == 2 * PAGE_BYTES
    prefault(memory.view, lambda: True)
    assert memory.missing_bytes() == 2 * PAGE_BYTES, "it was told to stop"
    prefault(memory.view, lambda: False)
    assert memory.missing_bytes() == 0
    assert bytes(memory.view) == bytes(PAGE_BYTES) + b"\x07" + bytes(2 * PAGE_BYTES - 1)
    memory.drop()


def test_a_size_that_no_system_can_map_is_over_the_budget() -> None:
    with pytest.raises(OverBudget, match="no room for"):
        Memory(1 << 61, "test")


def test_memory_that_the_node_does_not_have_is_refused_before_it_is_used() -> None:
    check_room(100, 100)
    with pytest.raises(OverBudget, match="101 bytes of memory are wanted for images and this node has 100 left"):
        check_room(101, 100)


def test_what_is_available_is_the_machines_or_the_containers_whichever_is_less(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes(meminfo, tmp_path / "none") == 1000 << 10
    group = tmp_path / "group"
    group.mkdir()
    for name, text in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "anon 1\ninactive_file 20\n")):
        (group / name).write_text(text + "\n")
    assert available_bytes(meminfo, group) == 1000 << 10
    (group / "memory.max").write_text("105\n")
    assert available_bytes(meminfo, group) == 120
    assert available_bytes() > 0


def test_sizes_are_rounded_up_to_pages() -> None:
    assert [whole_pages(size) for size in (1, PAGE_BYTES, PAGE_BYTES + 1)] == [PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES]
