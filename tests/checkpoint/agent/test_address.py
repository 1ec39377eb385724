"""Where an agent is found, that nobody else can read there, and that one process at a time holds a lock."""

import os
from pathlib import Path

import pytest

from resilient.checkpoint.agent.address import Address, address_of, drop_lock, make_folder, take_lock
from resilient.errors import UsageError


def test_runs_urls_and_nodes_have_addresses_of_their_own() -> None:
    asked = [("run", None, "a"), ("run", "s3://b", "a"), ("run", None, "b"), ("other", None, "a")]
    folders = [address_of(run_id, url, node, {}).folder for run_id, url, node in asked]
    assert len(set(folders)) == 4
    assert address_of("run", None, "a", {}).folder == folders[0]
    assert folders[0].parent == Path(f"/tmp/resilient-{os.getuid()}")


def test_the_environment_names_the_place_and_the_node() -> None:
    both = {"RESILIENT_RUNTIME_DIR": "/run/a", "XDG_RUNTIME_DIR": "/run/b"}
    assert address_of("run", None, "n", both).folder.parts[:3] == ("/", "run", "a")
    assert address_of("run", None, "n", {"XDG_RUNTIME_DIR": "/run/b"}).folder.parts[:3] == ("/", "run", "b")
    assert address_of("run", None, None, {"RESILIENT_NODE": "n"}) == address_of("run", None, "n", {})


def test_a_path_that_is_too_long_for_a_socket_is_refused_with_the_way_out() -> None:
    with pytest.raises(UsageError, match="set RESILIENT_RUNTIME_DIR to a folder with a shorter path"):
        address_of("run", None, "n", {"RESILIENT_RUNTIME_DIR": "/tmp/" + "long/" * 20})


def test_the_folders_are_private_and_can_be_made_again(tmp_path: Path) -> None:
    address = address_of("run", None, "n", {"RESILIENT_RUNTIME_DIR": str(tmp_path / "new")})
    make_folder(address)
    make_folder(address)
    for folder in (address.folder, address.folder.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_read_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    address = Address(folder=tmp_path / "resilient-0" / "run")
    address.folder.parent.mkdir(mode=0o755)
    with pytest.raises(UsageError, match="is not a folder private to user"):
        make_folder(address)
    address.folder.parent.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    address.folder.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is not a folder private to user"):
        make_folder(address)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    address = Address(folder=tmp_path / "resilient-0" / "run")
    address.folder.parent.mkdir(mode=0o700)
    os.chown(address.folder.parent, 12345, -1)
    with pytest.raises(UsageError, match="it has owner 12345"):
        make_folder(address)


def test_a_lock_is_held_by_one_and_free_again_when_dropped(tmp_path: Path) -> None:
    first = take_lock(tmp_path / "lock")
    assert first is not None
    assert take_lock(tmp_path / "lock") is None
    drop_lock(first)
    second = take_lock(tmp_path / "lock")
    assert second is not None
    drop_lock(second)


def test_a_dropped_lock_is_free_even_if_a_forked_child_still_has_the_descriptor(tmp_path: Path) -> None:
    first = take_lock(tmp_path / "lock")
    assert first is not None
    childs_copy = os.dup(first)
    drop_lock(first)
    second = take_lock(tmp_path / "lock")
    assert second is not None
    drop_lock(second)
    os.close(childs_copy)


def test_the_lock_of_a_folder_that_went_away_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        take_lock(tmp_path / "gone" / "lock")
