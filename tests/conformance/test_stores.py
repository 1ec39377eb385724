"""Every store of the library against the contract: in memory, in folders of three kinds, behind fsspec, and on S3."""

import itertools
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.checkpoint.levels.store import MemoryStore, Store
from tests.conformance.store_contract import StoreContract, machine_for
from tests.s3_server import S3Server, s3_server

__all__ = ["s3_server"]  # a fixture

MIB = 1 << 20


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a disk: the system's folder for temporary files may be in memory, the checkout is not."""
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent, prefix=".disk-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def no_direct_io(tmp_path: Path) -> Iterator[Path]:
    """A file system that refuses O_DIRECT."""
    subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestFileStoreOnADisk(StoreContract):
    @pytest.fixture
    def store(self, disk: Path) -> Store:
        return FileStore(str(disk / "made" / "by the first write"))


class TestFileStoreInSharedMemory(StoreContract):
    @pytest.fixture
    def store(self, shared_memory: Path) -> Store:
        return FileStore(str(shared_memory))


class TestFileStoreWhereDirectInputIsRefused(StoreContract):
    @pytest.fixture
    def store(self, no_direct_io: Path) -> Store:
        return FileStore(str(no_direct_io))


class TestRemoteStoreOnAnObjectStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return RemoteStore(f"memory://{secrets.token_hex(6)}/run", part_bytes=MIB, timeout_s=20)


class TestRemoteStoreOnAFileSystem(StoreContract):
    """The way of services without atomic puts: a temporary name, then a move."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return RemoteStore(f"file://{tmp_path}/run", part_bytes=MIB, timeout_s=20)


class TestRemoteStoreOnS3(StoreContract):
    @pytest.fixture
    def store(self, s3_server: S3Server) -> Store:
        return s3_server.store(part_bytes=5 * MIB, timeout_s=20)


def test_file_store_does_what_the_model_does(disk: Path) -> None:
    numbers = itertools.count()
    machine_for(lambda: FileStore(f"{disk}/{next(numbers)}"), examples=15, steps=15)


def test_remote_store_on_an_object_store_does_what_the_model_does() -> None:
    machine_for(
        lambda: RemoteStore(f"memory://{secrets.token_hex(6)}/run", part_bytes=2000, timeout_s=20),
        examples=15,
        steps=15,
    )


def test_remote_store_on_a_file_system_does_what_the_model_does(tmp_path: Path) -> None:
    numbers = itertools.count()
    machine_for(
        lambda: RemoteStore(f"file://{tmp_path}/{next(numbers)}", part_bytes=2000, timeout_s=20), examples=8, steps=12
    )


def test_remote_store_on_s3_does_what_the_model_does(s3_server: S3Server) -> None:
    machine_for(lambda: s3_server.store(timeout_s=20), examples=4, steps=10)
