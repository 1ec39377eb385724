"""`resilient convert`: every way through it that a script may take, on disks and in object stores."""

import os
import pty
import secrets
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.launch.conftest import Resilient
from tests.launch.snapshots import RANKS, contents, flip, image
from tests.s3_server import BUCKET, KEY, SECRET, S3Server, s3_server

__all__ = ["s3_server"]  # a fixture


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL in a real object store, as a user has it: with credentials and endpoint in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_server.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return f"s3://{BUCKET}/{secrets.token_hex(6)}"


def test_a_snapshot_becomes_safetensors_that_others_open(durable: Path, tmp_path: Path, script: Resilient) -> None:
    before = contents(durable)
    ended = script("convert", durable, tmp_path / "hf", "--to", "safetensors", "--dtype", "bf16", "--json")
    assert ended.code == 0, ended
    assert ended.json["format"] == "safetensors"
    assert any("optimizer" in note for note in ended.json["notes"])
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as found:
        assert found.get_tensor("large.weight").dtype == torch.bfloat16
        assert found.get_tensor("large.weight").shape == (1200, 600)
    assert contents(durable) == before
    compared = script("diff", durable, tmp_path / "hf", "--select", "model.*", "--rtol", "0.01", "--json")
    whats = {one["name"]: one["what"] for one in compared.json["differences"]}
    assert whats["model.large.weight"] == "dtype"


@pytest.mark.parametrize("to", ["native", "torch", "dcp", "deepspeed-universal"])
def test_nothing_is_lost_on_the_way_to_other_formats(
    to: str, durable: Path, tmp_path: Path, resilient: Resilient
) -> None:
    assert resilient("convert", durable, tmp_path / "to", "--to", to).code == 0
    (listed,) = resilient("ls", tmp_path / "to", "--json").json["checkpoints"]
    assert listed["format"] == to
    assert listed["complete"]
    assert resilient("verify", tmp_path / "to").code == 0
    parameters = resilient("diff", durable, tmp_path / "to", "--json").json["differences"]
    known = {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}
    assert [one for one in parameters if one["what"] != "only in B" and one["name"] not in known] == []


def test_patterns_shards_and_ranks_are_as_asked(durable: Path, tmp_path: Path, resilient: Resilient) -> None:
    shards = ("--to", "safetensors", "--shard-size", "100kB", "--select", "*.weight")
    assert resilient("convert", durable, tmp_path / "hf", *shards).code == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    tensors = resilient("inspect", tmp_path / "hf", "--json").json["tensors"]
    assert all(tensor["name"].endswith(".weight") for tensor in tensors)
    assert resilient("convert", durable, tmp_path / "three", "--to", "native", "--ranks", "3").code == 0
    (listed,) = resilient("ls", tmp_path / "three", "--json").json["checkpoints"]
    assert (listed["world_size"], listed["complete"]) == (3, True)


def test_the_step_that_is_named_is_converted(durable: Path, tmp_path: Path, resilient: Resilient) -> None:
    assert resilient("convert", durable, tmp_path / "two", "--to", "native", "--step", "2").code == 0
    assert resilient("diff", durable, tmp_path / "two", "--step", "2").code == 0
    assert resilient("diff", durable, tmp_path / "two").code == 1


def test_nothing_is_overwritten_without_force(durable: Path, tmp_path: Path, resilient: Resilient) -> None:
    arguments = ("convert", durable, tmp_path / "to", "--to", "safetensors")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "model.safetensors").write_text("precious")
    refused = resilient(*arguments)
    assert refused.code == 2
    assert str(tmp_path / "to") in refused.err
    assert contents(tmp_path / "to") == {str(tmp_path / "to" / "model.safetensors"): b"precious"}
    assert resilient(*arguments, "--force").code == 0
    assert resilient("verify", tmp_path / "to").code == 0


def test_damage_is_not_converted(durable: Path, tmp_path: Path, resilient: Resilient) -> None:
    flip(image(durable, 4, 1), 4 << 20)
    ended = resilient("convert", durable, tmp_path / "to", "--to", "torch")
    assert ended.code == 1
    assert "rank 1" in ended.err
    assert [path for path in (tmp_path / "to").rglob("*") if path.suffix in (".pt", ".pth", ".bin")] == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--to", "native", "--shard-size", "huge"), "is no size"),
        (("--to", "native", "--shard-size", "0"), "is no size"),
        (("--to", "native", "--set", "key"), "KEY=VALUE"),
        (("--to", "torch", "--ranks", "2"), "--to native"),
        (("--to", "megatron"), "'megatron'"),
        (("--to", "native", "--spec", "no-such"), "no preset; those are gpt-neox"),
        ((), "--to"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[str, ...], word: str, durable: Path, tmp_path: Path, resilient: Resilient
) -> None:
    ended = resilient("convert", durable, tmp_path / "to", *arguments)
    assert ended.code == 2
    assert word in ended.err
    assert not (tmp_path / "to").exists()


def test_object_stores_are_places_like_others(
    durable: Path, local: Path, tmp_path: Path, s3: str, resilient: Resilient
) -> None:
    assert resilient("repair", s3, "--from", durable, "--step", "3").code == 0
    assert resilient("repair", s3, "--from", durable, "--step", "4").code == 0
    found = resilient("ls", s3, "--json").json["checkpoints"]
    assert [(one["step"], one["world_size"], one["complete"]) for one in found] == [(3, RANKS, True), (4, RANKS, True)]
    assert all(one["modified"] for one in found)
    assert resilient("verify", s3).code == 0
    assert resilient("diff", s3, local).code == 0
    assert resilient("convert", s3, tmp_path / "to", "--to", "safetensors").code == 0
    assert resilient("convert", s3, f"{s3}-to", "--to", "native", "--ranks", "1").code == 0
    assert resilient("diff", f"{s3}-to", local, "--select", "large.*").code == 0
    assert resilient("prune", s3, "--keep", "1", "--yes").code == 0
    assert [one["step"] for one in resilient("ls", s3, "--json").json["checkpoints"]] == [4]
    assert resilient("ls", f"{s3}-nothing").code == 3


def test_a_place_in_memory_works_within_a_process(durable: Path, resilient: Resilient) -> None:
    place = f"memory://{secrets.token_hex(6)}"
    assert resilient("convert", durable, place, "--to", "native").code == 0
    assert resilient("verify", place).code == 0
    assert resilient("diff", durable, place, "--select", "large.*").code == 0


def test_progress_is_shown_on_a_terminal_and_only_there(durable: Path, tmp_path: Path, script: Resilient) -> None:
    assert script("verify", durable).err == ""
    ours, theirs = pty.openpty()
    path = Path(sysconfig.get_path("scripts")) / "resilient"
    done = subprocess.run([path, "verify", durable], stdout=subprocess.PIPE, stderr=theirs, text=True, check=True)
    os.close(theirs)
    assert "verifying 8." in os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.stdout.count("\n") == 1
