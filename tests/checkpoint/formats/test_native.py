"""Snapshots of ours as a source, verified in ranges of any size, and as a sink whose snapshots `restore` takes."""

import json
import math
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import resilient
from resilient.checkpoint.catalog.catalog import Tensor
from resilient.checkpoint.checkpointer import Checkpointer
from resilient.checkpoint.digest import digest
from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.native import plan
from resilient.checkpoint.formats.native_image import Kept, VerifiedImage
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import open_source, recognise
from resilient.checkpoint.formats.source import Reference, Source
from resilient.checkpoint.levels.image_io import read_record
from resilient.checkpoint.levels.open import open_store
from resilient.checkpoint.levels.store import Store
from resilient.errors import DamagedImage, NotACheckpoint, RestoreError, UsageError
from tests.checkpoint.jobs import Job, assert_same, checkpointing, facts, train
from tests.multiprocess import distributed_jobs as jobs
from tests.multiprocess.ranks import run

GOLDEN = Path(__file__).parents[2] / "golden" / "snapshot_version_1"
STEPS = 2
LARGE = "model.large.weight"


def save(url: str, compression: Literal["zstd"] | None) -> dict[str, Any]:
    """On every rank: save, and tell what all ranks together hold, as numpy arrays."""
    job = jobs.made(jobs.fsdp, 1)
    checkpointer = Checkpointer(url, job.state, resilient.Policy(durable_every=1, durable_compression=compression))
    for step in range(1, STEPS + 1):
        job.step()
        checkpointer.save(step).durable("durable").result(60)
    assert checkpointer.close() == []
    return {name: value.full_tensor().detach().numpy() for name, value in job.state["model"].named_parameters()}


Saved = dict[str | None, tuple[Path, dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A snapshot of two ranks, plain and compressed, with the values that it holds; not to be changed."""
    folder = tmp_path_factory.mktemp("snapshots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESILIENT_RUNTIME_DIR", str(tmp_path_factory.mktemp("r")))
        found: Saved = {}
        kinds: tuple[Literal["zstd"] | None, ...] = (None, "zstd")
        for compression in kinds:
            place = folder / str(compression)
            held = run(save, 2, str(place), compression)[0]
            found[compression] = place, {name: torch.from_numpy(array) for name, array in held.items()}
        return found


@pytest.fixture
def snapshot(saved: Saved, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    shutil.copytree(saved[None][0], tmp_path / "run")
    return tmp_path / "run"


def opened(place: Path, step: int | None = None) -> Source:
    return open_source(Reference(url=str(place), step=step))


def value(source: Source, tensor: Tensor, *box: tuple[int, ...]) -> torch.Tensor:
    sizes = box[1] if box else tensor.shape
    found = torch.empty(sizes, dtype=getattr(torch, tensor.dtype))
    fetch(source, tensor, memoryview(found.reshape(-1).view(torch.uint8).numpy().data), *box)
    return found


def file(place: Path, rank: int, ending: str = "safetensors", step: int = STEPS) -> Path:
    return place / f"step_{step:08d}" / f"rank_{rank:05d}-of-00002.{ending}"


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_any_box_of_a_snapshot_of_two_ranks_is_what_the_job_held(compression: str | None, saved: Saved) -> None:
    place, held = saved[compression]
    assert recognise(Folder(str(place))) == "native"
    with opened(place) as source:
        assert (source.catalog.step, source.catalog.world_size) == (STEPS, 2)
        for name, expected in held.items():
            assert torch.equal(value(source, source.catalog.tensors[f"model.{name}"]), expected), name
        tensor, chance = source.catalog.tensors[LARGE], random.Random(1)
        for _ in range(20):
            at = tuple(chance.randrange(size) for size in tensor.shape)
            sizes = tuple(chance.randrange(1, size - begin + 1) for size, begin in zip(tensor.shape, at, strict=True))
            part = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
            assert torch.equal(value(source, tensor, at, sizes), held["large.weight"][part])
        assert list(source.verify(lambda _: None)) == []


def test_groups_have_their_hyperparameters_and_objects_are_each_ranks(snapshot: Path) -> None:
    with opened(snapshot) as source:
        (group,) = source.catalog.groups["optimizer"]
        assert group["lr"] == pytest.approx(0.01)
        assert LARGE in group["params"]
        states = [source.objects(rank)["resilient.rng"]["torch"] for rank in (0, 1, 7)]
        assert not torch.equal(states[0], states[1])
        assert torch.equal(states[0], states[2])


def test_the_newest_complete_step_is_opened_or_the_one_that_is_named(snapshot: Path) -> None:
    with opened(snapshot, 1) as source:
        assert source.catalog.step == 1
    with opened(snapshot / "step_00000001") as source:
        assert source.catalog.step == 1
    file(snapshot, 1, "json").unlink()
    with opened(snapshot) as source:
        assert source.catalog.step == 1
    with pytest.raises(NotACheckpoint, match="records of 1 of 2 ranks are missing"):
        opened(snapshot, STEPS)
    with pytest.raises(NotACheckpoint, match="complete are: 1"):
        opened(snapshot, 77)


def test_ranks_of_two_lives_are_no_snapshot(snapshot: Path) -> None:
    record = file(snapshot, 1, "json")
    rest = record.read_text().split("\n", 1)[1]
    life = json.loads("{" + rest)["life"]
    rest = rest.replace(life, "0" * len(life), 1)
    record.write_text(f'{{"digest":"{digest(rest.encode())}",\n{rest}')
    with pytest.raises(DamagedImage, match="two lives"):
        opened(snapshot)


@pytest.mark.parametrize("fine", [True, False])
def test_a_damaged_byte_is_never_given_and_bytes_far_from_it_are(fine: bool, snapshot: Path) -> None:
    if not fine:
        file(snapshot, 1, "digests").unlink()  # whole blocks remain
    with opened(snapshot) as source:
        pieces = list(source.catalog.tensors[LARGE].pieces.pieces(source.catalog.tensors[LARGE].shape))
    (piece,) = [one for one in pieces if one.file == 1]
    flip(file(snapshot, 1), piece.offset + 300_000)
    row = piece.piece.offsets[0]
    with opened(snapshot) as source:
        tensor = source.catalog.tensors[LARGE]
        with pytest.raises(DamagedImage, match=r"65536 bytes.*rank 1.*'model\.large\.weight'" if fine else "rank 1"):
            value(source, tensor)
        value(source, tensor, (0, 0), (row, 600))  # of rank 0
        if fine:
            value(source, tensor, (row + 400, 0), (10, 600))
        else:
            with pytest.raises(DamagedImage):
                value(source, tensor, (row + 400, 0), (10, 600))
        (found,) = [one for one in source.verify(lambda _: None) if one.file.endswith(".safetensors")]
        assert found.file == f"step_0000000{STEPS}/{file(snapshot, 1).name}"
        assert LARGE in found.tensors
        assert (found.tensors == (LARGE,)) == fine


@pytest.mark.parametrize("harm", ["gone", "short"])
def test_an_image_that_is_not_as_its_record_says_is_damage(harm: str, snapshot: Path) -> None:
    image = file(snapshot, 1)
    if harm == "gone":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:100_000])
    with opened(snapshot) as source, pytest.raises(DamagedImage, match="rank_00001"):
        value(source, source.catalog.tensors[LARGE])


HOSTILE: tuple[Any, ...] = (None, -1, 1 << 62, 1 << 70, "../../x", [], {}, [1 << 40], "float4096", 0, True, [[[[]]]])


def paths(value: Any, *at: Any) -> Iterable[list[Any]]:
    yield list(at)
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in rows:
        yield from paths(inner, *at, key)


def test_a_record_that_lies_is_refused_whatever_it_says(tmp_path: Path) -> None:
    """Its digest fits: somebody made it so. One member after the other becomes something that it should not be."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    (record,) = (tmp_path / "run").rglob("*.json")
    honest = json.loads(record.read_text())
    honest.pop("digest")
    chance, tried = random.Random(1), 0
    every = [path for path in paths(honest) if path]
    for path in [path for path in every if len(path) < 3] + chance.sample(every, 100):
        lying = json.loads(json.dumps(honest))
        held = lying
        *way, last = path
        for key in way:
            held = held[key]
        held[last] = chance.choice(HOSTILE)
        rest = json.dumps(lying, separators=(",", ":"))[1:] + "\n"
        record.write_text(f'{{"digest":"{digest(rest.encode())}",\n{rest}')
        tried += 1
        try:
            with opened(tmp_path / "run") as source:
                for tensor in source.catalog.tensors.values():
                    value(source, tensor) if math.prod(tensor.shape) < 1000 else pytest.fail(f"{path}: {tensor.shape}")
                list(source.verify(lambda _: None))
        except RestoreError:
            continue
    assert tried > 100


class Counting(Store):
    """Counts what is read of another store."""

    def __init__(self, inner: Store) -> None:
        self.inner, self.url = inner, inner.url
        self.reads: list[int] = []

    def write(self, name: str, chunks: Iterable[memoryview], *, exclusive: bool = False) -> None:
        self.inner.write(name, chunks, exclusive=exclusive)

    def read(self, name: str, offset: int, into: memoryview) -> None:
        self.inner.read(name, offset, into)
        if name.endswith(".safetensors"):
            self.reads.append(into.nbytes)

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def list(self, folder: str = "") -> list[str]:
        return self.inner.list(folder)

    def delete(self, names: Iterable[str]) -> None:
        self.inner.delete(names)


def test_small_ranges_cost_little_and_neighbours_nothing(snapshot: Path) -> None:
    store = Counting(open_store(str(snapshot)))
    image = VerifiedImage(store, read_record(store, STEPS, 0, 2), Kept())
    expected = file(snapshot, 0).read_bytes()
    room = memoryview(bytearray(1000))
    image.read(1_000_100, room)
    assert bytes(room) == expected[1_000_100:1_001_100]
    assert store.reads == [64 << 10]
    image.read(1_001_100, room)
    assert store.reads == [64 << 10]
    large = memoryview(bytearray(1 << 20))
    image.read(1_500_000, large)
    assert bytes(large) == expected[1_500_000 : 1_500_000 + len(large)]
    assert sum(store.reads[1:]) <= 1.1 * len(large)
    everything = memoryview(bytearray(len(expected)))
    image.read(0, everything)
    assert bytes(everything) == expected
    for chunk in (1_000_003, 4_300_007, 10_007):
        store.reads.clear()
        for begin in range(0, len(expected), chunk):
            part = everything[begin : begin + chunk]
            part[:] = bytes(part.nbytes)
            image.read(begin, part)
        assert bytes(everything) == expected
        assert sum(store.reads) == len(expected), "one after the other: nothing is read twice"
    with pytest.raises(DamagedImage, match="was asked for those from"):
        image.read(len(expected) - 10, memoryview(bytearray(11)))


@pytest.mark.parametrize(
    ("begin", "length"), [(0, 1), (65_535, 2), (65_536, 65_536), (4_100_000, 100_000), (3, 4_300_000)]
)
def test_ranges_at_all_sorts_of_borders_are_right(begin: int, length: int, snapshot: Path) -> None:
    store = open_store(str(snapshot))
    image = VerifiedImage(store, read_record(store, STEPS, 0, 2))
    data = file(snapshot, 0).read_bytes()
    assert begin + length <= len(data)
    for _ in range(2):
        assert bytes(image.span(begin, begin + length)) == data[begin : begin + length]


def plain() -> Job:
    model = jobs.Network()
    return jobs.trained(model, jobs.adamw(model.parameters()))


def test_what_two_ranks_saved_is_restored_by_one_after_a_conversion(
    snapshot: Path, tmp_path: Path, runtime_dir: Path, saved: Saved
) -> None:
    convert(Reference(url=str(snapshot)), str(tmp_path / "one"), to="native")
    job = plain()
    with checkpointing(tmp_path / "one", job) as checkpointer:
        assert checkpointer.restore() == STEPS
        assert checkpointer.last_restore is not None
        assert checkpointer.last_restore.notes == ()
    for name, parameter in job.state["model"].named_parameters():
        assert torch.equal(parameter, saved[None][1][name]), name
        state = job.state["optimizer"].state[parameter]
        assert float(state["step"]) == STEPS
        parts = [load_file(file(snapshot, rank))[f"optimizer.state.model.{name}.exp_avg"] for rank in (0, 1)]
        assert torch.equal(state["exp_avg"], torch.cat(parts)), name
    train(job, 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_images_for_any_number_of_ranks_hold_everything_once(ranks: int, snapshot: Path, tmp_path: Path) -> None:
    convert(Reference(url=str(snapshot)), str(tmp_path / "to"), to="native", options=SinkOptions(ranks=ranks))
    with opened(snapshot) as source, opened(tmp_path / "to") as target:
        assert target.catalog.world_size == ranks
        assert list(target.verify(lambda _: None)) == []
        assert target.catalog.groups == source.catalog.groups
        for name, tensor in source.catalog.tensors.items():
            assert torch.equal(value(source, tensor), value(target, target.catalog.tensors[name])), name
            assert target.catalog.tensors[name].kind == tensor.kind
        if ranks == 2:  # what ranks had for themselves they have again
            for name, own in source.catalog.own.items():
                for rank, tensor in own.items():
                    assert torch.equal(value(source, tensor), value(target, target.catalog.own[name][rank])), name
            assert not torch.equal(
                *(value(target, own) for own in target.catalog.own["model.norm.running_mean"].values())
            )
        sizes = [file_.nbytes for file_ in target.catalog.files]
        assert max(sizes) - min(sizes) < 300_000
    for image in (tmp_path / "to").rglob("*.safetensors"):
        load_file(image)


def test_the_same_conversion_gives_the_same_bytes(snapshot: Path, tmp_path: Path) -> None:
    """Or one that is taken up again would mix the images of two snapshots."""
    for name in ("a", "b"):
        convert(Reference(url=str(snapshot)), str(tmp_path / name), to="native", options=SinkOptions(ranks=2))
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    assert len(files) == 6
    assert files == {path: (tmp_path / "b" / path).read_bytes() for path in files}


def job_of_all_sorts(*, buffer: bool = True) -> Job:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2).double())
    if buffer:
        model.register_buffer("small", torch.arange(5, dtype=torch.bfloat16))
    groups: Any = [
        {"params": model[0].parameters(), "lr": 0.3},
        {"params": [*model[1].parameters(), *model[2].parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, amsgrad=True)

    def step() -> None:
        optimizer.zero_grad()
        model[2](model[1](model[0](torch.randn(8, 4))).double()).square().mean().backward()
        optimizer.step()

    return Job({"model": model, "optimizer": optimizer}, step)


@pytest.mark.parametrize("to", ["native", "torch"])
def test_a_job_goes_on_from_a_converted_snapshot_as_if_nothing_had_been(
    to: str, tmp_path: Path, runtime_dir: Path
) -> None:
    torch.manual_seed(1)
    job = job_of_all_sorts()
    with checkpointing(tmp_path / "run", job) as checkpointer:
        for step in (1, 2, 3):
            job.step()
            checkpointer.save(step).durable("durable").result(60)
    before = facts(job.state)
    convert(Reference(url=str(tmp_path / "run")), str(tmp_path / "other"), to=to)
    convert(Reference(url=str(tmp_path / "other")), str(tmp_path / "back"), to="native")
    torch.manual_seed(2)
    fresh = job_of_all_sorts()
    with checkpointing(tmp_path / "back", fresh) as checkpointer:
        assert checkpointer.restore() == (3 if to == "native" else 0)
    after = facts(fresh.state)
    if to == "torch":  # such a file knows of no generators but those that were put into it
        del before["rng"], after["rng"]
    assert_same(before, after)
    for one in (job, fresh):
        torch.manual_seed(3)
        train(one, 2)
    assert_same(facts(job.state)["model"], facts(fresh.state)["model"])


def test_parameters_are_converted_and_optimizer_state_is_not(snapshot: Path, tmp_path: Path) -> None:
    convert(Reference(url=str(snapshot)), str(tmp_path / "to"), to="native", options=SinkOptions(dtype="bfloat16"))
    with opened(snapshot) as source, opened(tmp_path / "to") as target:
        half = value(target, target.catalog.tensors[LARGE])
        assert torch.equal(half, value(source, source.catalog.tensors[LARGE]).bfloat16())
        assert target.catalog.tensors[f"optimizer.state.{LARGE}.exp_avg"].dtype == "float32"
        assert target.catalog.tensors["model.norm.num_batches_tracked"].dtype == "int64"


def test_a_snapshot_is_no_single_file_and_has_a_rank(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        convert(Reference(url=str(snapshot)), str(tmp_path / "to"), to="native", options=SinkOptions(ranks=0))
    with opened(snapshot) as source, pytest.raises(UsageError, match="a folder of several files"):
        plan(source, SinkOptions(into="model.safetensors"))


def test_the_golden_snapshot_is_read_and_converted(tmp_path: Path) -> None:
    convert(Reference(url=str(GOLDEN)), str(tmp_path / "to"), to="native")
    (image,) = GOLDEN.rglob("*.safetensors")
    with opened(tmp_path / "to") as target:
        for name, stored in load_file(image).items():
            if name in target.catalog.tensors:
                tensor = target.catalog.tensors[name]
                found = value(target, tensor)
                assert torch.equal(torch.view_as_real(found) if found.is_complex() else found, stored), name
        assert math.prod(target.catalog.tensors["model.0.weight"].shape) == 30
        assert target.objects()["notes"]["seen"] == [1, 2, (3, None)]


def test_a_file_of_torch_becomes_a_snapshot_that_a_job_goes_on_from(tmp_path: Path, runtime_dir: Path) -> None:
    """Without a buffer of its own: in such a file nothing tells it from a parameter."""
    torch.manual_seed(1)
    job = job_of_all_sorts(buffer=False)
    train(job, 3)
    torch.save({name: held.state_dict() for name, held in job.state.items()}, tmp_path / "job.pt")
    convert(Reference(url=str(tmp_path / "job.pt"), format="torch"), str(tmp_path / "run"), to="native")
    torch.manual_seed(2)
    fresh = job_of_all_sorts(buffer=False)
    with checkpointing(tmp_path / "run", fresh) as checkpointer:
        assert checkpointer.restore() == 0
        assert checkpointer.last_restore is not None
        assert [note for note in checkpointer.last_restore.notes if "random state" not in note] == []
    for one in (job, fresh):
        torch.manual_seed(3)
        train(one, 2)
    before, after = facts(job.state), facts(fresh.state)
    assert_same(before["model"], after["model"])
    assert_same(before["optimizer"], after["optimizer"])


def test_master_weights_say_more_than_the_parameters(tmp_path: Path) -> None:
    master = torch.randn(30, 4)
    state = {"w": {"fp32": master, "step": 7}}
    optimizer = {"state": state, "param_groups": [{"params": ["w"], "lr": 0.5}]}
    torch.save({"model": {"w": master.bfloat16()}, "optimizer": optimizer}, tmp_path / "job.pt")
    reference = Reference(url=str(tmp_path / "job.pt"), format="torch")
    convert(reference, str(tmp_path / "run"), to="native", options=SinkOptions(dtype="float32", ranks=2))
    with opened(tmp_path / "run") as source:
        assert torch.equal(value(source, source.catalog.tensors["model.w"]), master)
        assert source.catalog.groups["optimizer"] == [{"params": ["model.w"], "lr": 0.5}]
        step = source.objects()["optimizer"]["state"]["model.w"]["step"]
        assert torch.equal(step, torch.tensor(7.0))  # as torch's optimizers have it
