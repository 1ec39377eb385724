"""Checkpoints of torch's DCP as a source and a sink, against DCP itself; several ranks: tests/multiprocess."""

import itertools
import pickle
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from resilient.checkpoint.formats.convert import convert
from resilient.checkpoint.formats.dcp_source import DcpSource
from resilient.checkpoint.formats.fetch import fetch
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import SinkOptions
from resilient.checkpoint.formats.registry import format_of, open_source
from resilient.checkpoint.formats.source import Reference
from resilient.errors import DamagedImage, NotACheckpoint, UsageError
from tests.checkpoint.formats.made import made_source, open_made
from tests.checkpoint.formats.torch_jobs import OPTIMIZERS, Job
from tests.checkpoint.formats.torch_made import bytes_of

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed.*:UserWarning", "ignore::FutureWarning")


def saved(folder: Path, state: Mapping[str, Any], **options: Any) -> Path:
    if options:
        dcp.save(dict(state), storage_writer=FileSystemWriter(folder, **options), no_dist=True)
    else:
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def opened(folder: Path, **options: Any) -> DcpSource:
    source = open_source(Reference(url=str(folder), format="dcp", **options))
    assert isinstance(source, DcpSource)
    return source


def value(source: DcpSource, name: str) -> bytes:
    tensor = source.catalog.tensors[name]
    data = bytearray(tensor.nbytes)
    fetch(source, tensor, memoryview(data))
    return bytes(data)


def loaded(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def converted(source: Path, target: Path, **options: Any) -> Path:
    reference = Reference(url=str(source), format="dcp")
    convert(reference, str(target), to="dcp", options=SinkOptions(**options), workers=1)
    return target


TENSORS = {
    "matrix": torch.arange(60.0).reshape(12, 5),
    "turned": torch.randn(7, 4).t(),
    "scalar": torch.tensor(4.5),
    "empty": torch.empty(0, 3),
    "half": torch.randn(9).bfloat16(),
    "float8": torch.randn(6).to(torch.float8_e4m3fn),
    "count": torch.arange(5),
}


@pytest.mark.parametrize("form", [{}, {"thread_count": 3}, {"single_file_per_rank": False}])
def test_tensors_of_dcp_are_found_in_its_blobs_whatever_files_it_makes(tmp_path: Path, form: dict[str, Any]) -> None:
    source = opened(saved(tmp_path / "a", {"model": TENSORS}, **form))
    assert {name.removeprefix("model."): one.dtype for name, one in source.catalog.tensors.items()} == {
        name: str(one.dtype).removeprefix("torch.") for name, one in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        assert value(source, f"model.{name}") == bytes_of(tensor), name


def test_a_payload_of_safetensors_is_read_too(tmp_path: Path) -> None:
    tensors = {name: one.contiguous() for name, one in TENSORS.items()}
    form = SerializationFormat.SAFETENSORS
    source = opened(saved(tmp_path / "a", {"model": tensors, "step": 3}, serialization_format=form))
    assert source.catalog.step == 3
    assert source.catalog.aliases == {}
    for name, tensor in tensors.items():
        assert value(source, f"model.{name}") == bytes_of(tensor), name
    assert list(source.verify(lambda nbytes: None)) == []


def test_a_slice_of_a_large_tensor_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.arange(16 << 20, dtype=torch.int32).reshape(4096, 4096)
    source = opened(saved(tmp_path / "a", {"model": {"large": large, "w": torch.ones(2)}}))
    counted = Counting(source)
    data = bytearray(1 << 20)
    fetch(source, source.catalog.tensors["model.large"], memoryview(data), (100, 0), (64, 4096))
    assert bytes(data) == bytes_of(large[100:164])
    assert counted.nbytes <= 1.01 * (1 << 20)


class Counting:
    """What a source reads of its files, from now on."""

    def __init__(self, source: DcpSource) -> None:
        self.nbytes = 0
        folder = source.folder
        read = folder.read

        def counted(name: str, offset: int, into: memoryview) -> None:
            self.nbytes += memoryview(into).nbytes
            read(name, offset, into)

        folder.read = counted  # type: ignore[method-assign]


def states(job: Job, flattened: bool = False) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    model, optimizer = get_state_dict(job.model, job.optimizer, options=options)
    return {"app": {"model": model, "optim": optimizer}, "schedule": job.schedule.state_dict(), "step": 3}


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "named"])
def test_training_goes_on_with_the_same_losses_from_dcp_through_ours_to_dcp_and_to_torch(
    tmp_path: Path, kind: str, flattened: bool
) -> None:
    job = Job(kind)
    job.train(3, seed=1)
    converted(saved(tmp_path / "a", states(job, flattened)), tmp_path / "b")
    again, third = Job(kind), Job(kind)
    state = loaded(tmp_path / "b", states(again))
    set_state_dict(
        again.model,
        again.optimizer,
        model_state_dict=state["app"]["model"],
        optim_state_dict=state["app"]["optim"],
    )
    again.schedule.load_state_dict(state["schedule"])
    convert(Reference(url=str(tmp_path / "b"), format="dcp"), str(tmp_path / "c.pt"), to="torch", workers=1)
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    third.load({**found["app"], "optimizer": found["app"]["optim"], "schedule": found["schedule"]})
    losses = job.train(3, seed=2)
    assert again.train(3, seed=2) == losses
    assert third.train(3, seed=2) == losses


def test_objects_come_back_through_both_and_lists_with_tensors_too(tmp_path: Path) -> None:
    rest: dict[str, Any] = {
        "step": 9,
        "list": [1, "two", None],
        "mixed": [torch.ones(2), {"inner": 3}],
        "rng": {"cpu": torch.get_rng_state()},
        "pair": (1, 2),
    }
    converted(saved(tmp_path / "a", {"model": {"w": torch.ones(3)}, **rest}), tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        source = opened(folder)
        objects = source.objects()
        assert (objects["step"], objects["list"], objects["pair"]) == (9, [1, "two", None], (1, 2))
        assert (objects["mixed"][0].tolist(), objects["mixed"][1]) == ([1.0, 1.0], {"inner": 3})
        assert torch.equal(objects["rng"]["cpu"], rest["rng"]["cpu"])
        assert source.catalog.step == 9
    dcp_to_torch_save(tmp_path / "b", tmp_path / "c.pt")
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    assert (found["step"], found["list"], found["mixed"][1]) == (9, [1, "two", None], {"inner": 3})


def test_any_pieces_become_chunks_in_several_files_that_dcp_loads(tmp_path: Path) -> None:
    tensors = {f"model.{number}": torch.randn(64, 33) for number in range(6)}
    reference = made_source(tmp_path / "made", tensors, aliases={"model.tied": "model.0"})
    options = SinkOptions(shard_bytes=20_000)
    convert(reference, str(tmp_path / "a"), to="dcp", options=options, workers=1, open_source=open_made)
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 3
    names = [*tensors, "model.tied"]
    found = loaded(tmp_path / "a", {"model": {name.removeprefix("model."): torch.zeros(64, 33) for name in names}})
    for name, tensor in tensors.items():
        assert torch.equal(found["model"][name.removeprefix("model.")], tensor)
    assert torch.equal(found["model"]["tied"], tensors["model.0"])
    source = opened(tmp_path / "a")
    assert source.catalog.aliases == {"model.tied": "model.0"}
    assert list(source.verify(lambda nbytes: None)) == []


def test_large_tensors_are_cut_into_chunks(tmp_path: Path) -> None:
    large = torch.arange(40 << 20, dtype=torch.int32).reshape(20, -1)
    torch.save({"w": large}, tmp_path / "a.pt")
    convert(Reference(url=str(tmp_path / "a.pt"), format="torch"), str(tmp_path / "b"), to="dcp", workers=1)
    source = opened(tmp_path / "b")
    assert len(source.catalog.tensors["model.w"].pieces) == 3
    assert torch.equal(loaded(tmp_path / "b", {"model": {"w": torch.zeros_like(large)}})["model"]["w"], large)


def test_random_boxes_of_random_chunks_are_read_right(tmp_path: Path) -> None:
    drawn = random.Random(1)
    tensor = torch.randn(17, 12)
    folder = saved(tmp_path / "a", {"model": {"w": tensor}})
    rewritten(folder, tensor, [0, 3, 4, 11, 17])
    source = opened(folder)
    for _ in range(30):
        begin = drawn.randrange(17), drawn.randrange(12)
        size = drawn.randrange(1, 18 - begin[0]), drawn.randrange(1, 13 - begin[1])
        data = bytearray(size[0] * size[1] * 4)
        fetch(source, source.catalog.tensors["model.w"], memoryview(data), begin, size)
        assert bytes(data) == bytes_of(tensor[begin[0] : begin[0] + size[0], begin[1] : begin[1] + size[1]])


def metadata_of(folder: Path) -> Metadata:
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def rewritten(folder: Path, tensor: torch.Tensor, bounds: list[int]) -> None:
    """Store `model.w` in other chunks of rows, each in a file of its own."""
    metadata = metadata_of(folder)
    entry: Any = metadata.state_dict_metadata["model.w"]
    entry.chunks = []
    metadata.storage_data = {}
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"__{number}_0.distcp"
        torch.save(tensor[begin:end].clone(), path)
        entry.chunks.append(ChunkStorageMetadata(torch.Size([begin, 0]), torch.Size([end - begin, tensor.shape[1]])))
        index = MetadataIndex("model.w", [begin, 0], number)
        metadata.storage_data[index] = _StorageInfo(path.name, 0, path.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_metadata_that_each_rank_wrote_for_itself_are_put_together(tmp_path: Path) -> None:
    folder, other = (saved(tmp_path / name, {"model": {"w": torch.ones(4, 2)}, "step": 1}) for name in "ab")
    first, second = metadata_of(folder), metadata_of(other)
    for metadata, at in ((first, 0), (second, 4)):
        entry: Any = metadata.state_dict_metadata["model.w"]
        entry.size = torch.Size([8, 2])
        entry.chunks[0].offsets = torch.Size([at, 0])
        metadata.storage_data = {
            MetadataIndex(index.fqn, None if index.offset is None else [at, 0]): info
            for index, info in metadata.storage_data.items()
        }
        for info in metadata.storage_data.values():
            info.relative_path = f"__{at}_0.distcp"
    shutil.move(folder / "__0_0.distcp", folder / "__x")
    shutil.move(other / "__0_0.distcp", folder / "__4_0.distcp")
    shutil.move(folder / "__x", folder / "__0_0.distcp")
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(first))
    (folder / "__4.metadata").write_bytes(pickle.dumps(second))
    assert value(opened(folder), "model.w") == bytes_of(torch.ones(8, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "a", {"model": {"first": torch.ones(40, 3), "second": torch.ones(9)}, "step": 1})


def changes() -> Iterator[tuple[str, str, Any]]:
    """What a stranger may do to the metadata, and what is said of it."""

    def entry(metadata: Metadata) -> Any:
        return metadata.state_dict_metadata["model.first"]

    def info(metadata: Metadata) -> Any:
        return metadata.storage_data[MetadataIndex("model.first", [0, 0])]

    yield "a blob beyond its file", "cut short", lambda m: setattr(info(m), "offset", 1 << 40)
    yield "a negative offset", "cannot be read", lambda m: setattr(info(m), "offset", -5)
    yield "a huge blob", "cut short", lambda m: setattr(info(m), "length", 1 << 50)
    yield "a file outside", "none within", lambda m: setattr(info(m), "relative_path", "../b/__0_0.distcp")
    yield "a file of the system", "none within", lambda m: setattr(info(m), "relative_path", "/etc/passwd")
    yield "a file that is not there", "is not there", lambda m: setattr(info(m), "relative_path", "__7_0.distcp")
    yield "a compressed blob", "extension 'zstd'", lambda m: setattr(info(m), "transform_descriptors", ["zstd"])
    yield "a part that is missing", "have 120 of 240", lambda m: setattr(entry(m), "size", torch.Size([80, 3]))
    yield "a part outside", "lies outside", lambda m: setattr(entry(m), "size", torch.Size([3, 40]))
    yield "a part twice", "have 240 of 120", lambda m: entry(m).chunks.append(entry(m).chunks[0])
    yield "parts of other dimensions", "other dimensions", lambda m: setattr(entry(m), "size", torch.Size([120]))
    yield "a tensor without a place", "does not say where", lambda m: m.storage_data.pop(MetadataIndex("step"))
    yield "two entries at one path", "two entries", lambda m: m.planner_data.update({"step": ("model", "first")})
    yield (
        "a path through a tensor",
        "through another",
        lambda m: m.planner_data.update({"step": ("model", "first", "x")}),
    )
    yield "a path of other things", "is no path", lambda m: m.planner_data.update({"step": (1.5,)})
    yield "a long list", "element number", lambda m: m.planner_data.update({"step": ("l", 1 << 40)})
    yield "a negative size", "is no size", lambda m: setattr(entry(m), "size", torch.Size([-4, 3]))


@pytest.mark.parametrize(("message", "change"), [pytest.param(*rest, id=name) for name, *rest in changes()])
def test_metadata_that_lie_are_refused_by_name(folder: Path, message: str, change: Any) -> None:
    metadata = metadata_of(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((DamagedImage, NotACheckpoint), match=message):
        opened(folder)


def test_a_blob_of_another_shape_or_of_something_else_is_refused_when_it_is_read(folder: Path) -> None:
    metadata = metadata_of(folder)
    stored = metadata.storage_data
    first, second, step = (
        MetadataIndex("model.first", [0, 0]),
        MetadataIndex("model.second", [0]),
        MetadataIndex("step"),
    )
    for info, message in ((stored[second], r"holds float32\(9,\)"), (stored[step], "holds something else")):
        metadata.storage_data = {**stored, first: info}
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(DamagedImage, match=message):
            value(opened(folder), "model.first")


class Code:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_code_in_the_metadata_or_in_an_object_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    metadata = metadata_of(folder)
    whole = (folder / ".metadata").read_bytes()
    metadata.planner_data = Code(mark)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(NotACheckpoint, match=r"getattr|Path.*--trust-pickle"):
        opened(folder)
    (folder / ".metadata").write_bytes(whole)
    with (folder / "__0_0.distcp").open("ab") as file:
        begin = file.tell()
        torch.save(Code(mark), file)
        length = file.tell() - begin
    metadata = metadata_of(folder)
    metadata.storage_data[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", begin, length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(NotACheckpoint, match=r"getattr|Path.*--trust-pickle"):
        opened(folder)
    assert not mark.exists()
    opened(folder, trust_pickle=True)
    assert mark.exists()


def test_classes_of_dcp_are_not_changed_by_what_a_pickle_does_to_them(folder: Path) -> None:
    name = b"torch.distributed.checkpoint.metadata\nBytesStorageMetadata\n"
    hostile = b"\x80\x02c" + name + b"N}X\5\0\0\0dtype]s\x86b."
    (folder / ".metadata").write_bytes(hostile)
    with pytest.raises((DamagedImage, NotACheckpoint)):
        opened(folder)
    opened(saved(folder.parent / "again", {"model": {"w": torch.ones(2)}}))


def test_a_checkpoint_that_was_cut_short_is_refused_whatever_was_cut(folder: Path) -> None:
    metadata = (folder / ".metadata").read_bytes()
    for length in range(0, len(metadata), 37):
        (folder / ".metadata").write_bytes(metadata[:length])
        with pytest.raises((DamagedImage, NotACheckpoint)):
            opened(folder)
    (folder / ".metadata").write_bytes(metadata)
    blobs = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(blobs[:-1])
    with pytest.raises(DamagedImage, match="cut short"):
        opened(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(DamagedImage, match="is not there"):
        opened(folder)


def test_verify_tells_which_tensor_or_object_has_changed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", {"model": {"first": torch.ones(40, 3), "second": torch.ones(9)}, "note": "text"})
    seen: list[int] = []
    assert list(opened(folder).verify(seen.append)) == []
    assert sum(seen) >= (120 + 9) * 4
    path = folder / "__0_0.distcp"
    whole, stored = path.read_bytes(), metadata_of(folder).storage_data
    places = {"model.second": MetadataIndex("model.second", [0]), "note": MetadataIndex("note")}
    for name, held in (("model.second", bytes_of(torch.ones(9))), ("note", b"text")):
        changed = bytearray(whole)
        changed[whole.index(held, stored[places[name]].offset)] ^= 2
        path.write_bytes(changed)
        (finding,) = opened(folder).verify(lambda nbytes: None)
        assert finding.tensors == (name,)
        assert "checksum" in finding.problem


def test_a_checkpoint_is_recognised_by_its_metadata_and_not_taken_for_megatrons(folder: Path) -> None:
    recognise = format_of("dcp").recognise
    assert recognise(Folder(str(folder)))
    (folder / "common.pt").touch()
    assert recognise(Folder(str(folder)))
    (folder / "metadata.json").touch()
    assert not recognise(Folder(str(folder)))
    (folder / ".metadata").unlink()
    with pytest.raises(NotACheckpoint, match="never finished"):
        opened(folder)


def test_the_metadata_that_are_written_have_nothing_of_the_machine_and_are_always_the_same(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", {"model": {"w": torch.ones(40, 3)}, "step": 1})
    first, second = (converted(source, tmp_path / name) for name in "bc")
    data = (first / ".metadata").read_bytes()
    assert data == (second / ".metadata").read_bytes()
    assert b"resilient" not in data
    assert str(tmp_path).encode() not in data


def test_one_file_is_no_place_for_dcp_and_keys_that_would_be_one_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "a.b": 1, "a": {"b": 2}}, tmp_path / "a.pt")
    reference = Reference(url=str(tmp_path / "a.pt"), format="torch")
    with pytest.raises(UsageError, match=r"two entries would both be called 'a\.b'"):
        convert(reference, str(tmp_path / "b"), to="dcp", workers=1)
    with pytest.raises(UsageError, match="not the one file"):
        convert(reference, str(tmp_path / "c"), to="dcp", options=SinkOptions(into="one"), workers=1)
    assert not (tmp_path / "b").exists()
