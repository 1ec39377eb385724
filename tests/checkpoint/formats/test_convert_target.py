"""What is at the target is refused, taken up again or replaced, as promised; after a failure nothing is in the way."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.folder import JOURNAL
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import open_source
from resilient.checkpoint.formats.source import Reference
from resilient.errors import LevelFailed, NotACheckpoint, UsageError
from tests.checkpoint.formats.conversions import failing_after, files, to_safetensors, written
from tests.checkpoint.formats.made import made_source, open_made


def test_what_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="out: something is there already.*--force"):
        to_safetensors(reference, tmp_path / "out")
    assert files(tmp_path / "out") == {"notes.txt": b"mine"}


def test_one_file_that_is_there_already_is_not_overwritten_and_its_neighbours_do_not_matter(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    to_safetensors(reference, tmp_path / "new.safetensors")
    before = files(tmp_path)
    for name in ("other", "new"):
        with pytest.raises(UsageError, match=f"{name}.safetensors: something is there already"):
            to_safetensors(reference, tmp_path / f"{name}.safetensors")
    assert files(tmp_path) == before
    assert set(load_file(tmp_path / "new.safetensors")) == {"a"}
    to_safetensors(reference, tmp_path / "other.safetensors", force=True)
    assert set(load_file(tmp_path / "other.safetensors")) == {"a"}


def test_many_files_are_one_conversion_as_well(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {f"model.{n}": torch.full((2,), float(n)) for n in range(70)})
    report = to_safetensors(reference, tmp_path / "out", options=SinkOptions(shard_bytes=8))
    assert report.files == len(files(tmp_path / "out")) == 71
    assert all(torch.equal(written(tmp_path / "out")[str(n)], torch.full((2,), float(n))) for n in (0, 69))


def test_force_replaces_a_model_so_that_nothing_of_the_old_one_is_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    large = made_source(tmp_path / "large", {f"model.{n}": torch.ones(50) for n in range(4)})
    to_safetensors(large, out, options=SinkOptions(shard_bytes=250))
    (out / "config.json").write_text("{}")
    small = made_source(tmp_path / "small", {"model.x": torch.ones(5)})
    to_safetensors(small, out, force=True)
    assert sorted(files(out)) == ["config.json", "model.safetensors"]
    with open_source(Reference(url=str(out), format="safetensors")) as source:
        assert list(source.catalog.tensors) == ["model.x"]


def test_force_does_not_keep_an_old_file_of_the_same_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    to_safetensors(made_source(tmp_path / "one", {"model.a": torch.ones(5)}), out)
    report = to_safetensors(made_source(tmp_path / "two", {"model.a": torch.zeros(5)}), out, force=True)
    assert report.skipped == 0
    assert torch.equal(written(out)["a"], torch.zeros(5))


@pytest.mark.parametrize("where", [".", "below", "below/deeper"])
def test_a_target_within_the_source_is_refused_even_with_force(tmp_path: Path, where: str) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    before = files(tmp_path)
    with pytest.raises(UsageError, match=r"is, or lies in, the source"):
        to_safetensors(reference, tmp_path / "source" / where, force=True)
    assert files(tmp_path) == before


def test_a_link_does_not_hide_that_the_target_is_the_source(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(UsageError, match=r"is, or lies in, the source"):
        to_safetensors(reference, tmp_path / "link" / "out", force=True)


def test_a_source_of_one_file_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    for target in (path, tmp_path):
        with pytest.raises(UsageError, match="give another place"):
            convert(Reference(url=str(path), format="safetensors"), str(target), to="safetensors", force=True)
    assert set(load_file(path)) == {"a"}


def test_a_format_that_is_not_written_is_refused(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    for name in ("megatron", "zip"):
        with pytest.raises(UsageError, match=f"'{name}' is no format that is written; those are native, dcp"):
            convert(reference, str(tmp_path / "out"), to=name, open_source=open_made)


def test_a_conversion_that_failed_goes_on_where_it_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tensors = {f"model.w{n}": torch.full((20,), float(n)) for n in range(4)}
    reference = made_source(tmp_path / "source", tensors, cuts=0)
    options = SinkOptions(shard_bytes=80)
    with pytest.raises(LevelFailed, match=r"cannot write tensor 'model\.w2' into .*model-00003-of-00004.*disk is gone"):
        to_safetensors(reference, out, options=options, open_source=failing_after(2))
    assert sorted(files(out)) == [JOURNAL, "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    with pytest.raises(NotACheckpoint, match="interrupted conversion"):
        open_source(Reference(url=str(out)))
    report = to_safetensors(reference, out, options=options)
    assert (report.skipped, report.files) == (2, 3)
    assert JOURNAL not in files(out)
    for name, value in tensors.items():
        assert torch.equal(written(out)[name.removeprefix("model.")], value)


def test_an_output_of_the_wrong_size_is_written_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = made_source(tmp_path / "source", {f"model.w{n}": torch.ones(20) for n in range(3)}, cuts=0)
    options = SinkOptions(shard_bytes=80)
    with pytest.raises(LevelFailed):
        to_safetensors(reference, out, options=options, open_source=failing_after(2))
    os.truncate(out / "model-00001-of-00003.safetensors", 100)
    report = to_safetensors(reference, out, options=options)
    assert report.skipped == 1
    assert len(written(out)) == 3


def test_files_from_before_the_machine_started_anew_are_not_trusted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = made_source(tmp_path / "source", {f"model.w{n}": torch.ones(20) for n in range(3)}, cuts=0)
    options = SinkOptions(shard_bytes=80)
    with pytest.raises(LevelFailed):
        to_safetensors(reference, out, options=options, open_source=failing_after(2))
    journal = json.loads((out / JOURNAL).read_text())
    (out / JOURNAL).write_text(json.dumps(journal | {"boot": "an earlier one"}))
    report = to_safetensors(reference, out, options=options)
    assert report.skipped == 0
    assert len(written(out)) == 3


def test_another_conversion_does_not_go_on_with_an_interrupted_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = made_source(tmp_path / "source", {f"model.w{n}": torch.ones(20) for n in range(3)}, cuts=0)
    with pytest.raises(LevelFailed):
        to_safetensors(reference, out, options=SinkOptions(shard_bytes=80), open_source=failing_after(2))
    before = files(out)
    with pytest.raises(UsageError, match=r"another conversion was interrupted there \(.*options: .*--force"):
        to_safetensors(reference, out)
    assert files(out) == before
    to_safetensors(reference, out, force=True)
    assert sorted(files(out)) == ["model.safetensors"]


def test_a_source_that_changed_meanwhile_is_another_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference = made_source(tmp_path / "source", {f"model.w{n}": torch.ones(20) for n in range(3)}, cuts=0)
    options = SinkOptions(shard_bytes=80)
    with pytest.raises(LevelFailed):
        to_safetensors(reference, out, options=options, open_source=failing_after(2))
    os.utime(tmp_path / "source" / "0.raw", ns=(1, 1))
    with pytest.raises(UsageError, match=r"another conversion was interrupted there \(changed: "):
        to_safetensors(reference, out, options=options)


def test_a_journal_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL).write_text('{"identity": 1')
    with pytest.raises(UsageError, match="is no journal of a conversion: remove it"):
        to_safetensors(reference, tmp_path / "out", force=True)


def test_a_failure_before_anything_is_finished_leaves_no_trace(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)}, cuts=0)
    with pytest.raises(LevelFailed):
        to_safetensors(reference, tmp_path / "new" / "out", open_source=failing_after(0))
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_no_empty_folders_that_would_be_in_the_way(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)}, cuts=0)
    (tmp_path / "out").mkdir()
    how: dict[str, Any] = {"to": "deepspeed-universal", "workers": 1}
    with pytest.raises(LevelFailed):
        convert(reference, str(tmp_path / "out"), open_source=failing_after(0), **how)
    assert list((tmp_path / "out").iterdir()) == []
    convert(reference, str(tmp_path / "out"), open_source=open_made, **how)


def test_two_conversions_into_one_place_at_the_same_time_are_refused(tmp_path: Path) -> None:
    reference = made_source(tmp_path / "source", {"model.a": torch.ones(2)})
    tried: list[str] = []

    def meanwhile(_: int) -> None:
        with pytest.raises(UsageError, match="another process is converting into") as refused:
            to_safetensors(reference, tmp_path / "out")
        tried.append(str(refused.value))

    to_safetensors(reference, tmp_path / "out", total=meanwhile)
    assert tried
    assert sorted(files(tmp_path / "out")) == ["model.safetensors"]


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    path, size = tmp_path / "source.safetensors", 1 << 42
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, path.stat().st_size + size)  # a hole
    with pytest.raises(LevelFailed, match=r"would take \d+ bytes, and its disk has \d+ left"):
        convert(Reference(url=str(path), format="safetensors"), str(tmp_path / "out"), to="safetensors")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A place in fsspec's memory file system, which all of this process shares."""
    url = f"memory://{random.randbytes(6).hex()}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_a_remote_target_is_streamed_resumed_and_not_overwritten(tmp_path: Path, memory_url: str) -> None:
    tensors = {f"model.w{n}": torch.full((20,), float(n)) for n in range(3)}
    reference = made_source(tmp_path / "source", tensors, cuts=0)
    options = SinkOptions(shard_bytes=80)
    memory = fsspec.filesystem("memory")
    with pytest.raises(LevelFailed, match="disk is gone"):
        to_safetensors(reference, memory_url, options=options, open_source=failing_after(1), workers=None)
    names = {path.rsplit("/", 1)[-1] for path in memory.find(memory_url)}
    assert names == {JOURNAL, "model-00001-of-00003.safetensors"}
    report = to_safetensors(reference, memory_url, options=options, workers=None)
    assert report.skipped == 1
    index = json.loads(memory.cat_file(f"{memory_url}/model.safetensors.index.json"))["weight_map"]
    for name, value in tensors.items():
        fqn = name.removeprefix("model.")
        assert torch.equal(load(memory.cat_file(f"{memory_url}/{index[fqn]}"))[fqn], value)
    with pytest.raises(UsageError, match="something is there already"):
        to_safetensors(reference, memory_url, options=options)
