"""From what a user writes to a store, or to an error that helps."""

import os
import subprocess
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


@pytest.mark.parametrize(
    ("url", "package", "told"),
    [("s3://bucket/run", "s3fs", "pip install 'torch-resilient[s3]'"), ("gs://bucket/run", "gcsfs", "install gcsfs")],
)
def test_a_missing_package_is_named_with_what_brings_it(url: str, package: str, told: str) -> None:
    # In a process of its own: fsspec keeps what it has imported.
    code = f"""
import sys
sys.modules[{package!r}] = None
from resilient.checkpoint.levels.open import open_store
from resilient.errors import PolicyError
try:
    open_store({url!r})
except PolicyError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert told in done.stdout, done.stderr


def test_opening_a_folder_imports_neither_torch_nor_fsspec() -> None:
    code = """
import sys
from resilient.checkpoint.levels.image_io import read_record
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.claim import Claim
open_store("/nowhere")
print([name for name in ("torch", "numpy", "fsspec", "s3fs") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "[]\n", done.stderr
