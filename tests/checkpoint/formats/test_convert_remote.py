"""Conversions to and from a real object store, by several processes: nothing half-written is ever there."""

import secrets
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.config import conf
from safetensors.torch import load_file, save_file

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.folder import JOURNAL, Folder
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.source import Reference
from resilient.errors import DamagedImage, UsageError
from tests.checkpoint.formats.made import made_source, open_made
from tests.s3_server import BUCKET, S3Server, s3_server

__all__ = ["s3_server"]  # a fixture


@pytest.fixture
def url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in the bucket, which fsspec reaches by its own settings, in other processes too."""
    monkeypatch.setitem(conf, "s3", s3_server.options())
    for key, value in s3_server.options().items():
        monkeypatch.setenv(f"FSSPEC_S3_{key.upper()}", value)
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


def test_a_model_goes_to_an_object_store_and_comes_back(tmp_path: Path, url: str) -> None:
    tensors = {f"w{n}": torch.randn(1500, 1024, generator=torch.Generator().manual_seed(n)) for n in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    there = convert(
        Reference(url=str(tmp_path / "model.safetensors"), format="safetensors"),
        url,
        to="safetensors",
        options=SinkOptions(shard_bytes=13 << 20),
        workers=2,
    )
    assert (there.workers, there.files) == (2, 3)
    assert Folder(url).names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    with pytest.raises(UsageError, match="something is there already"):
        convert(Reference(url=str(tmp_path / "model.safetensors"), format="safetensors"), url, to="safetensors")
    with pytest.raises(UsageError, match="is, or lies in, the source"):
        convert(Reference(url=url, format="safetensors"), f"{url}/below", to="safetensors", force=True)
    convert(Reference(url=url, format="safetensors"), str(tmp_path / "back.safetensors"), to="safetensors", workers=2)
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_an_upload_that_fails_on_the_way_leaves_no_object(tmp_path: Path, url: str, s3_server: S3Server) -> None:
    value = torch.ones(40 << 20, dtype=torch.uint8)
    reference = made_source(tmp_path / "source", {"model.a": value}, files=1, cuts=0)
    raw = tmp_path / "source" / "0.raw"
    raw.write_bytes(raw.read_bytes()[: 38 << 20])  # beyond the first part of the upload
    with pytest.raises(DamagedImage, match=r"cannot write tensor 'model\.a' into s3://.*ends"):
        convert(reference, url, to="safetensors", workers=2, open_source=open_made)
    with pytest.raises(FileNotFoundError):
        assert not Folder(url).names
    assert s3_server.unfinished_uploads(url.rsplit("/", 1)[-1]) == []
    assert JOURNAL not in fsspec.filesystem("s3", **s3_server.options()).find(url)
