"""Bytes that are not what was sealed: named, passed over, and never loaded."""

import json
import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.names import image_name, record_name
from resilient.errors import RestoreError
from tests.bad_days.conftest import Agents, Make, Trainers
from tests.bad_days.training import Training, differing, undisturbed

LONG_S = 30.0
Damage = Callable[[bytearray], None]


def begin_of_data(image: bytes | bytearray) -> int:
    return 8 + int.from_bytes(image[:8], "little")


def flip_a_byte(image: bytearray) -> None:
    image[begin_of_data(image) + 777] ^= 0x10


def zero_a_page(image: bytearray) -> None:
    image[begin_of_data(image) : begin_of_data(image) + 4096] = bytes(4096)


def damage_memory(agents: Agents, step: int, rank: int, damage: Damage) -> None:
    """Write into the sealed image in the agent's memory, as a bad memory module would."""
    for path in agents.shared_memory(agents.one()):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            header = memory[8 : begin_of_data(memory[:8])]
            if (
                f'"step":"{step}"'.encode() not in header.replace(b" ", b"")
                or f'"rank":"{rank}"'.encode() not in header
            ):
                continue
            image = bytearray(memory[:])
            damage(image)
            memory[:] = bytes(image)
            return
    pytest.fail(f"no image of rank {rank} at step {step} in memory")


def damage_file(path: Path, damage: Damage) -> None:
    image = bytearray(path.read_bytes())
    damage(image)
    path.write_bytes(image)


def saved(make: Make, tmp_path: Path, **policy: Any) -> Path:
    """A run of some steps, whole at every level, whose agent and memory are still there."""
    url = tmp_path / "url"
    training = Training()
    saving = make(url, training.state, **policy)
    (*_, last) = training.run(1, 4, saving)
    for level in last.levels:
        last.durable(level).result(LONG_S)
    assert saving.close(keep_memory=True) == []
    return url


def restored(make: Make, url: Path, step: int, **policy: Any) -> Checkpointer:
    """Restore into another training, and check every bit of it."""
    training = Training(seed=11)
    loading = make(url, training.state, **policy)
    assert loading.restore() == step
    assert differing(training.tensors(), undisturbed(step)) == []
    training.run(step + 1, step + 2, loading)[-1].durable("memory").result(LONG_S)
    assert differing(training.tensors(), undisturbed(step + 2)) == []
    return loading


@pytest.mark.parametrize("damage", [flip_a_byte, zero_a_page])
def test_damage_in_memory_is_named_and_the_local_file_is_used(
    damage: Damage, checkpointer: Make, agents: Agents, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = {"durable_every": 0, "local": str(tmp_path / "local")}
    url = saved(checkpointer, tmp_path, **policy)
    damage_memory(agents, 4, 0, damage)
    with caplog.at_level(logging.WARNING, "resilient"):
        loading = restored(checkpointer, url, 4, **policy)
    assert loading.last_restore is not None
    assert loading.last_restore.levels == {0: "local"}
    assert "level memory" in caplog.text
    assert "rank 0" in caplog.text
    assert "'model." in caplog.text


@pytest.mark.parametrize("damage", [flip_a_byte, zero_a_page])
def test_damage_in_memory_and_in_the_local_file_leads_to_the_durable_level(
    damage: Damage, checkpointer: Make, agents: Agents, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = {"durable_every": 4, "local": str(tmp_path / "local")}
    url = saved(checkpointer, tmp_path, **policy)
    damage_memory(agents, 4, 0, damage)
    damage_file(tmp_path / "local" / image_name(4, 0, 1), damage)
    with caplog.at_level(logging.WARNING, "resilient"):
        loading = restored(checkpointer, url, 4, **policy)
    assert loading.last_restore is not None
    assert loading.last_restore.levels == {0: "durable"}
    assert "level local" in caplog.text


def cut_off(image: bytearray) -> None:
    del image[len(image) // 2 :]


def cut_to_nothing(image: bytearray) -> None:
    image.clear()


def edit(record: bytearray) -> None:
    record[:] = record.replace(b'"step":4', b'"step":5')


def halve(record: bytearray) -> None:
    del record[len(record) // 2 :]


def forge_a_digest(record: bytearray) -> None:
    """As somebody would who edits a digest and knows nothing of the record's own."""
    raw = json.loads(record)
    block = raw["image"]["blocks"][0].encode()
    record[:] = record.replace(block, block[::-1])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (image_name(4, 0, 1), flip_a_byte),
        (image_name(4, 0, 1), zero_a_page),
        (image_name(4, 0, 1), cut_off),
        (image_name(4, 0, 1), cut_to_nothing),
        (record_name(4, 0, 1), edit),
        (record_name(4, 0, 1), halve),
        (record_name(4, 0, 1), cut_to_nothing),
        (record_name(4, 0, 1), forge_a_digest),
    ],
)
def test_damage_of_the_newest_durable_snapshot_leads_to_the_one_before(
    name: str, damage: Damage, checkpointer: Make, agents: Agents, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = saved(checkpointer, tmp_path, durable_every=2)
    agents.signal(9)
    damage_file(url / name, damage)
    with caplog.at_level(logging.WARNING, "resilient"):
        restored(checkpointer, url, 2, durable_every=2)
    assert "step 4 at level durable" in caplog.text
    assert "rank 0" in caplog.text


def test_a_missing_image_beside_its_record_is_damage(checkpointer: Make, agents: Agents, tmp_path: Path) -> None:
    url = saved(checkpointer, tmp_path, durable_every=2)
    agents.signal(9)
    (url / image_name(4, 0, 1)).unlink()
    restored(checkpointer, url, 2, durable_every=2)


def test_a_flipped_bit_in_a_compressed_snapshot_is_found(checkpointer: Make, agents: Agents, tmp_path: Path) -> None:
    policy = {"durable_every": 2, "durable_compression": "zstd"}
    url = saved(checkpointer, tmp_path, **policy)
    agents.signal(9)
    path = url / image_name(4, 0, 1)
    image = bytearray(path.read_bytes())
    image[len(image) // 2] ^= 1
    path.write_bytes(image)
    restored(checkpointer, url, 2, **policy)


def test_without_an_undamaged_copy_restore_fails_and_the_live_state_is_as_it_was(
    checkpointer: Make, agents: Agents, tmp_path: Path
) -> None:
    url = saved(checkpointer, tmp_path, durable_every=2)
    damage_memory(agents, 4, 0, flip_a_byte)
    for step in (2, 4):
        damage_file(url / image_name(step, 0, 1), flip_a_byte)
    training = Training(seed=11)
    training.run(1, 1)
    before = training.tensors()
    loading = checkpointer(url, training.state, durable_every=2)
    with pytest.raises(RestoreError, match=r"no undamaged snapshot.*step 4 of rank 0 at level"):
        loading.restore()
    assert differing(training.tensors(), before) == []
    assert all(os.path.exists(url / image_name(step, 0, 1)) for step in (2, 4)), "evidence was removed"


def flip_a_late_byte(image: bytearray) -> None:
    image[len(image) * 3 // 4] ^= 0x10


def test_damage_found_after_other_blocks_were_loaded_leads_to_another_copy_of_everything(
    checkpointer: Make, agents: Agents, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Several blocks an image: in a fresh process they are loaded as they are verified."""
    training, policy = Training(width=512, layers=8), {"durable_every": 2, "local": str(tmp_path / "local")}
    saving = checkpointer(tmp_path / "url", training.state, **policy)
    for handle in training.run(1, 4, saving):
        for level in handle.levels:
            handle.durable(level).result(LONG_S)
    saving.close(keep_memory=True)
    damage_memory(agents, 4, 0, flip_a_late_byte)
    damage_file(tmp_path / "local" / image_name(4, 0, 1), flip_a_late_byte)
    again = Training(seed=11, width=512, layers=8)
    loading = checkpointer(tmp_path / "url", again.state, **policy)
    with caplog.at_level(logging.WARNING, "resilient"):
        assert loading.restore() == 4
    assert loading.last_restore is not None
    assert loading.last_restore.levels == {0: "durable"}
    assert "level memory" in caplog.text
    assert "level local" in caplog.text
    assert differing(again.tensors(), training.tensors()) == []
    loading.close(keep_memory=True)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "resilient"):
        assert checkpointer(tmp_path / "url", again.state, **policy).restore() == 4
    assert "level memory" not in caplog.text, "the agent kept the damaged image"


@pytest.mark.parametrize("fresh", [True, False])
def test_without_an_undamaged_copy_only_a_fresh_state_is_partly_overwritten_and_the_error_says_so(
    fresh: bool, checkpointer: Make, agents: Agents, tmp_path: Path
) -> None:
    training = Training(width=512, layers=8)
    saving = checkpointer(tmp_path / "url", training.state, durable_every=4)
    training.run(1, 4, saving)[-1].durable("durable").result(LONG_S)
    saving.close()
    damage_file(tmp_path / "url" / image_name(4, 0, 1), flip_a_late_byte)
    again = Training(seed=11, width=512, layers=8)
    loading = checkpointer(tmp_path / "url", again.state, durable_every=4)
    if not fresh:
        again.run(5, 5, loading)[0].durable("memory").result(LONG_S)
        damage_memory(agents, 5, 0, flip_a_late_byte)
    before = again.tensors()
    with pytest.raises(RestoreError, match="no undamaged snapshot") as caught:
        loading.restore()
    assert (differing(again.tensors(), before) == []) is not fresh
    assert any("do not train on" in note for note in getattr(caught.value, "__notes__", ())) is fresh


@pytest.mark.parametrize("damage", ["memory", "local"])
def test_replicas_that_share_an_image_never_load_the_damaged_copy_of_another_rank(
    damage: str, trainers: Trainers, agents: Agents, tmp_path: Path
) -> None:
    common = {"url": str(tmp_path / "url"), "local": str(tmp_path / "local"), "durable_every": 4}
    first = trainers.ranks("replicas", steps=4, keep=True, **common)
    digests = [child.value()["digest"] for child in first]
    assert digests[0] == digests[1]
    damage_memory(agents, 4, 1, flip_a_byte)
    if damage == "local":
        damage_file(tmp_path / "local" / image_name(4, 1, 2), zero_a_page)
    second = [child.value() for child in trainers.ranks("replicas", steps=4, keep=False, **common)]
    assert [one["start"] for one in second] == [4, 4]
    assert [one["levels"] for one in second] == [["memory", "local" if damage == "memory" else "durable"]] * 2
    assert [one["digest"] for one in second] == digests
