"""From what a user writes to a store, or to an error that helps."""

import sys
from pathlib import Path

import pytest

from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.errors import NotACheckpoint, PolicyError


@pytest.mark.parametrize("form", ["{}", "file://{}", "local://{}", "file://localhost{}"])
def test_a_folder_may_be_written_as_a_path_or_a_url(tmp_path: Path, form: str) -> None:
    store = open_store(form.format(tmp_path / "not-yet-there"))
    assert isinstance(store, FileStore)
    assert store.root == str(tmp_path / "not-yet-there")


def test_a_relative_path_a_tilde_and_an_escaped_space_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    roots = [open_store(url).url for url in ("a b", "~/a b", f"file://{tmp_path}/a%20b")]
    assert roots == [str(tmp_path / "a b")] * 3


def test_an_s3_url_opens_without_a_word_to_the_network() -> None:
    store = open_store("s3://bucket/some/run/", retries=2)
    assert isinstance(store, RemoteStore)
    assert store.url == "s3://bucket/some/run"


def test_a_file_in_place_of_the_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"")
    for url in (str(tmp_path / "model.pt"), f"file://{tmp_path}/model.pt"):
        with pytest.raises(NotACheckpoint, match="not a folder"):
            open_store(url)


@pytest.mark.parametrize("url", ["", "  ", "nonsense://x", "file://host/folder"])
def test_a_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(PolicyError, match="folder"):
        open_store(url)


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr("fsspec.registry._registry", {})
    with pytest.raises(PolicyError, match=r"pip install torch-resilient\[s3\]"):
        open_store("s3://bucket/run")


def test_a_package_that_is_not_of_ours_is_named_as_fsspec_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(PolicyError, match="gcsfs"):
        open_store("gs://bucket/run")
