"""Files of torch.save: read like torch reads them, without their data and without running their code; and written."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.serialization.config as torch_config
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.checkpoint.formats.folder import Folder
from resilient.checkpoint.formats.output import TensorBytes
from resilient.checkpoint.formats.torch_pickle import Refused
from resilient.checkpoint.formats.torch_zip import Opaque, StoredTensor, read_torch_file, torch_parts
from resilient.errors import DamagedImage, NotACheckpoint, UsageError
from tests.checkpoint.formats.torch_made import FLOATS, MAGIC, archive, box_of, bytes_of, filled, pickled, reduced


def read(path: Path, **options: Any) -> Any:
    return read_torch_file(Folder(str(path.parent)), path.name, **options)


def saved(path: Path, tree: Any, **options: Any) -> Path:
    torch.save(tree, path, **options)
    return path


def bytes_at(path: Path, stored: StoredTensor) -> bytes:
    return path.read_bytes()[stored.offset : stored.offset + stored.nbytes]


@pytest.mark.parametrize("dtype", sorted(ITEMSIZES))
def test_a_tensor_of_each_dtype_is_found_where_its_bytes_are(tmp_path: Path, dtype: str) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).reshape(3, 16).view(getattr(torch, dtype))
    path = saved(tmp_path / "a.pt", {"first": torch.ones(5), "tensor": tensor})
    found = read(path)["tensor"]
    assert (found.dtype, found.shape, found.nbytes) == (dtype, tuple(tensor.shape), 48)
    assert bytes_at(path, found) == bytes_of(tensor)


def test_plain_values_come_back_as_torch_gives_them(tmp_path: Path) -> None:
    tree: dict[str, Any] = {
        "plain": [None, True, 1, -(2**70), 2.5, 1j, "text", b"bytes", bytearray(b"array"), (1, (2,)), {3, 4}],
        "kinds": [collections.OrderedDict(a=1), collections.Counter("aab"), collections.deque([1], 3), frozenset({5})],
        "default": collections.defaultdict(list, {1: [2]}),
        "times": [datetime.datetime(2026, 1, 2, 3, 4), datetime.date(2026, 1, 2), datetime.timedelta(1, 2)],
        "torch": [torch.float16, torch.Size([2, 3]), torch.device("cpu"), torch.strided],
        "random": [random.getstate(), torch.float8_e4m3fn],
    }
    found = read(saved(tmp_path / "a.pt", tree))
    assert found == tree
    assert [type(one) for one in found["kinds"]] == [type(one) for one in tree["kinds"]]


def test_numpy_values_come_back(tmp_path: Path) -> None:
    arrays = [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array(["ab", "c"]), np.zeros((0, 2))]
    scalars = [np.float64(1.5), np.bool_(True), np.str_("text"), np.dtype("int16")]
    state: Any = np.random.get_state()
    for protocol in (2, 4):
        path = saved(tmp_path / "a.pt", [arrays, scalars, (state, arrays[0])], pickle_protocol=protocol)
        found = read(path)
        for got, want in zip(found[0], arrays, strict=True):
            assert (got.dtype, got.shape, got.tolist()) == (want.dtype, want.shape, want.tolist())
        assert found[1] == scalars
        assert [type(one) for one in found[1]] == [type(one) for one in scalars]
        assert (found[2][0][1] == state[1]).all()
        assert found[2][1] is found[0][0]


def test_views_parameters_and_tied_tensors_are_told_by_strides_and_storage(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    path = saved(tmp_path / "a.pt", [base, base.t(), base[1:, 2], base.expand(2, 3, 4), parameter, torch.empty(0, 3)])
    whole, turned, column, expanded, weight, empty = read(path)
    assert whole.is_contiguous
    assert (turned.strides, turned.offset, turned.storage) == ((1, 4), whole.offset, whole.storage)
    assert not turned.is_contiguous
    assert (column.shape, column.strides, column.offset) == ((2,), (4,), whole.offset + 24)
    assert expanded.strides == (0, 4, 1)
    assert bytes_at(path, weight) == bytes_of(parameter)
    assert (empty.shape, empty.nbytes) == ((0, 3), 0)


def test_an_archive_inside_of_a_larger_file_is_read_with_offsets_in_that_file(tmp_path: Path) -> None:
    inner = saved(tmp_path / "inner.pt", {"a": torch.arange(5)}).read_bytes()
    path = tmp_path / "outer"
    path.write_bytes(b"x" * 1000 + inner + b"y" * 10)
    found = read(path, begin=1000, nbytes=len(inner))["a"]
    assert bytes_at(path, found) == bytes_of(torch.arange(5))
    with pytest.raises(DamagedImage, match="the file ends"):
        read(path, begin=1000, nbytes=len(inner) + 11)


class Custom(dict[str, int]):
    def __init__(self, first: int) -> None:
        raise AssertionError("it was made")

    def __reduce__(self) -> Any:
        return Custom, (7,), {"attribute": torch.ones(2)}, None, iter([("key", 1)])


def test_a_class_that_is_called_opaque_is_kept_apart_and_never_made(tmp_path: Path) -> None:
    custom = Custom.__new__(Custom)
    path = saved(tmp_path / "a.pt", [argparse.Namespace(layers=3), custom])
    namespace, other = read(path, opaque={"argparse.Namespace", f"{__name__}.Custom"})
    assert isinstance(namespace, Opaque)
    assert (namespace.name, namespace.state) == ("argparse.Namespace", {"layers": 3})
    assert (other.name, other.args, other.items) == (f"{__name__}.Custom", (7,), [("key", 1)])
    assert other.state["attribute"].shape == (2,)


def test_what_is_not_on_the_list_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = pickled(tmp_path / "a.pt", reduced("os.system", f"touch {mark}"))
    with pytest.raises(Refused, match=r"os\.system.*--trust-pickle"):
        read(path)
    assert not mark.exists()
    read(path, trust=True)
    assert mark.exists()


REFUSED = [
    "builtins.eval",
    "builtins.getattr",
    "builtins.__import__",
    "builtins.open",
    "os.path",
    "torch.load",
    "torch.hub.load",
    "torch.storage._load_from_bytes",
    "functools.partial",
    "operator.attrgetter",
    "copyreg._reconstructor",
    "numpy.load",
    "numpy.core.multiarray.fromfile",
    "resilient.checkpoint.formats.torch_pickle.load_pickle",
]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_lead_to_code_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refused, match=name.replace(".", r"\.")):
        read(pickled(tmp_path / "a.pt", reduced(name, "x")))


def test_a_name_with_dots_reaches_nothing_within_what_is_allowed(tmp_path: Path) -> None:
    data = pickle.dumps(collections.OrderedDict(), protocol=4).replace(b"\x0bOrderedDict", b"\x0bOrderedDict"[:12])
    dotted = b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.__subclasses\x93)R."
    assert read(pickled(tmp_path / "a.pt", data)) == {}
    with pytest.raises(Refused, match="__subclasses"):
        read(pickled(tmp_path / "b.pt", dotted))


def rebuilt(size: bytes, strides: bytes, offset: bytes = b"K\0") -> bytes:
    """A pickle of one tensor in a storage of four floats."""
    return MAGIC + b"ctorch._utils\n_rebuild_tensor_v2\n((" + FLOATS + offset + size + strides + b"\x89}tR."


HOSTILE = {
    "a tensor beyond its storage": rebuilt(b"K\x05\x85", b"K\1\x85"),
    "a tensor that begins beyond its storage": rebuilt(b"K\1\x85", b"K\1\x85", b"K\4"),
    "strides beyond the storage": rebuilt(b"K\2\x85", b"K\7\x85"),
    "a negative stride": rebuilt(b"K\2\x85", b"J\xff\xff\xff\xff\x85"),
    "a negative size": rebuilt(b"J\xff\xff\xff\xff\x85", b"K\1\x85"),
    "a negative offset": rebuilt(b"K\1\x85", b"K\1\x85", b"J\xf0\xff\xff\xff"),
    "a size that overflows": rebuilt(b"\x8a\x08\0\0\0\0\0\0\0\x70K\2\x86", b"K\0K\0\x86"),
    "a storage larger than its member": rebuilt(b"K\1\x85", b"K\1\x85").replace(b"K\4tQ", b"M\0\1tQ"),
    "a storage that is not there": rebuilt(b"K\1\x85", b"K\1\x85").replace(b"X\1\0\0\x000", b"X\1\0\0\x009"),
    "a storage of another kind": rebuilt(b"K\1\x85", b"K\1\x85").replace(b"FloatStorage", b"Size"),
    "state for a class of storages": MAGIC + b"ctorch\nFloatStorage\n]X\1\0\0\0xab.",
    "state for a function": MAGIC + b"ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0x]sb.",
    "slots of a function": MAGIC + b"ctorch._utils\n_rebuild_tensor_v2\nN}X\5\0\0\0_name]s\x86b.",
    "slots of a class": MAGIC + b"cbuiltins\ndict\nN}X\3\0\0\0get]s\x86b.",
    "state for a tensor": rebuilt(b"K\1\x85", b"K\1\x85")[:-1] + b"](X\7\0\0\0float32))K\0X\1\0\0\x000eb.",
    "a large bytearray": reduced("builtins.bytearray", 1 << 40),
    "large bytes": reduced("builtins.bytes", 1 << 40),
    "bytes in another encoding": reduced("_codecs.encode", "x", "zip"),
    "a memo of 64 GiB": MAGIC + b"Nr\xff\xff\xff\xff.",
    "a memo of 512 MiB": MAGIC + b"Nr\0\0\0\2.",
    "bytes of 1 GiB": MAGIC + b"B\0\0\0\x40abc.",
    "a text of 4 GiB": MAGIC + b"X\xff\xff\xff\xffabc.",
    "bytes of 2**60": MAGIC + b"\x8e\0\0\0\0\0\0\0\x10abc.",
    "a frame beyond the end": b"\x80\x04\x95\0\0\0\0\1\0\0\0N.",
    "an opcode of protocol 0": MAGIC + b"I1\n.",
    "a persistent id as text": MAGIC + b"P0\n.",
    "an extension": MAGIC + b"\x82\1.",
    "an array of objects": reduced("numpy.core.multiarray.scalar", "O", b"x" * 8),
    "a numpy dtype of objects": reduced("numpy.dtype", "O8", False, True),
    "a numpy dtype with fields": reduced("numpy.dtype", "V8", False, True),
    "an array of another size": reduced("numpy.core.numeric._frombuffer", b"x" * 8, "f8", (2,), "C"),
    "lists within lists": MAGIC + b"]" * 5000 + b"a" * 4999 + b".",
    "values by the billion": MAGIC
    + b"]q\0"
    + b"".join(b"(h%ch%cl%c%c" % (n, n, ord("q"), n + 1) for n in range(60))
    + b".",
    "a list in itself, as a size": MAGIC + b"ctorch\nSize\n]q\0h\0a\x85R.",
    "nothing": b"",
    "no end": MAGIC + b"N",
    "an empty stack": MAGIC + b".",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_is_refused_and_costs_nothing(tmp_path: Path, what: str) -> None:
    path = pickled(tmp_path / "a.pt", HOSTILE[what])
    tracemalloc.start()
    try:
        with pytest.raises((DamagedImage, NotACheckpoint), match=r"a\.pt"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_hostile_pickle_has_changed_nothing_for_the_next_one(tmp_path: Path) -> None:
    for number, data in enumerate(HOSTILE.values()):
        with pytest.raises((DamagedImage, NotACheckpoint)):
            read(pickled(tmp_path / f"{number}.pt", data))
    found = read(saved(tmp_path / "a.pt", {"a": torch.ones(3), "b": np.float32(2)}))
    assert (found["a"].dtype, found["a"].shape, found["b"]) == ("float32", (3,), np.float32(2))


def test_attributes_of_a_dict_that_hide_its_methods_are_dropped(tmp_path: Path) -> None:
    tree: Any = collections.OrderedDict(a=1)
    tree.get = "hidden"
    tree._metadata = {"": {"version": 1}}
    found = read(saved(tmp_path / "a.pt", tree))
    assert found.get("a") == 1
    assert found._metadata == {"": {"version": 1}}


def test_a_file_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", {"a": torch.ones(50), "b": [1, 2]}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in [*range(100), *range(100, len(whole), 13), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises((DamagedImage, NotACheckpoint), match=r"cut\.pt"):
            read(path)


def test_any_byte_of_the_pickle_or_the_directory_that_was_changed_is_noticed_or_changes_no_more_than_names(
    tmp_path: Path,
) -> None:
    whole = saved(tmp_path / "whole.pt", {"a": torch.ones(5)}).read_bytes()
    path = tmp_path / "changed.pt"
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            found = read(path)
        except (DamagedImage, NotACheckpoint):
            continue
        assert found["a"].nbytes == 20
        assert 0 <= found["a"].offset <= len(whole) - 20


def test_members_that_torch_never_writes_are_refused(tmp_path: Path) -> None:
    good = pickle.dumps({"a": 1}, protocol=2)
    tensor = rebuilt(b"K\4\x85", b"K\1\x85")
    with pytest.raises(DamagedImage, match="compressed"):
        read(archive(tmp_path / "a.pt", {"data.pkl": good}, compressed=["data.pkl"]))
    with pytest.raises(DamagedImage, match=r"data/0 is compressed"):
        read(archive(tmp_path / "b.pt", {"data.pkl": tensor, "data/0": bytes(16)}, compressed=["data/0"]))
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as out:
        out.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("archive/data.pkl", tensor)
    with pytest.raises(DamagedImage, match="two members of one name"):
        read(tmp_path / "c.pt")
    with pytest.raises(NotACheckpoint, match="big-endian"):
        read(archive(tmp_path / "d.pt", {"data.pkl": good, "byteorder": b"big"}))
    with pytest.raises(NotACheckpoint, match="TorchScript"):
        read(archive(tmp_path / "e.pt", {"data.pkl": good, "constants.pkl": good}))
    with pytest.raises(NotACheckpoint, match=r"not one of torch\.save"):
        read(archive(tmp_path / "f.pt", {"other": good}))


def test_a_directory_that_leads_out_of_the_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", {"data.pkl": rebuilt(b"K\4\x85", b"K\1\x85"), "data/0": bytes(16)})
    whole = path.read_bytes()
    at = whole.rindex(b"PK\1\2")
    for field, value in ((42, 0x7FFFFFFF), (20, 0x7FFFFFFF), (42, 5)):  # where its header is, how long it is
        changed = bytearray(whole)
        changed[at + field : at + field + 4] = value.to_bytes(4, "little")
        if field == 20:
            changed[at + 24 : at + 28] = value.to_bytes(4, "little")
        path.write_bytes(changed)
        with pytest.raises(DamagedImage, match=r"a\.pt"):
            read(path)


def test_files_of_other_kinds_are_told_apart(tmp_path: Path) -> None:
    legacy = saved(tmp_path / "old.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(NotACheckpoint, match="before 1.6.*save it anew"):
        read(legacy)
    (tmp_path / "text.pt").write_text("no checkpoint at all")
    with pytest.raises(NotACheckpoint, match="does not begin like a zip"):
        read(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")


TENSORS = {
    "float": torch.arange(15.0).reshape(5, 3),
    "bfloat16": torch.arange(4.0).bfloat16(),
    "float8": torch.ones(3).to(torch.float8_e5m2),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "uint16": torch.arange(7).to(torch.uint16),
    "complex": torch.ones(2, dtype=torch.complex128),
}


def tree_to_write() -> Any:
    model = collections.OrderedDict((name, box_of(name, tensor)) for name, tensor in TENSORS.items())
    model["tied"] = box_of("float", TENSORS["float"])
    values = [1, 2.5, None, True, "text", {"z", "y"}, b"bytes", (1, 2), torch.arange(4), torch.float16, np.float32(2)]
    return {"model": model, "values": values}


def test_what_is_written_torch_loads_with_and_without_its_restricted_reader_and_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(filled(torch_parts(tree_to_write()), TENSORS))
    options: list[dict[str, Any]] = [{}, {"mmap": True}, {"weights_only": False}]
    for option in options:
        found = torch.load(path, **option)
        for name, tensor in TENSORS.items():
            got = found["model"][name]
            assert (got.dtype, got.shape, bytes_of(got)) == (tensor.dtype, tensor.shape, bytes_of(tensor)), name
        assert found["model"]["tied"].data_ptr() == found["model"]["float"].data_ptr()
        assert found["values"][:8] == [1, 2.5, None, True, "text", {"z", "y"}, b"bytes", (1, 2)]
        assert (found["values"][8].tolist(), found["values"][9:]) == ([0, 1, 2, 3], [torch.float16, 2.0])
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None


def test_torch_finds_the_storages_without_looking_where_its_own_writer_would_have_put_them(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(filled(torch_parts(tree_to_write()), TENSORS))
    torch_config.load.calculate_storage_offsets = True
    try:
        found = torch.load(path, mmap=True)
    finally:
        torch_config.load.calculate_storage_offsets = False
    for name, tensor in TENSORS.items():
        assert bytes_of(found["model"][name]) == bytes_of(tensor), name


def test_what_is_written_is_read_again_with_each_storage_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(filled(torch_parts(tree_to_write()), TENSORS))
    found = read(path)["model"]
    for name, tensor in TENSORS.items():
        assert bytes_at(path, found[name]) == bytes_of(tensor)
        assert found[name].offset % 64 == 0


def test_the_same_tree_makes_the_same_bytes_under_any_hash_seed() -> None:
    code = (
        "from resilient.checkpoint.formats.torch_zip import torch_parts; import hashlib;"
        "tree = {'set': {'a', 'b', 'c', 'd'}, 'text': ['x' * 3, 'xxx', ''.join(['x'] * 3)]};"
        "print(hashlib.sha256(b''.join(torch_parts(tree))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_file_of_more_than_4_gib_is_laid_out_as_torch_expects(tmp_path: Path) -> None:
    large = TensorBytes("large", (0,), (5 << 30,), "uint8")
    parts = torch_parts({"large": large, "small": torch.arange(5)})
    path = tmp_path / "a.pt"
    with path.open("wb") as out:  # what is not written takes no room
        for part in parts:
            if isinstance(part, bytes):
                out.write(part)
            else:
                out.seek(part.nbytes, os.SEEK_CUR)
    found = torch.load(path, mmap=True)
    assert (found["large"].shape, found["small"].tolist()) == ((5 << 30,), [0, 1, 2, 3, 4])
    stored = read(path)
    assert stored["large"].nbytes == 5 << 30
    assert bytes_at_large(path, stored["small"]) == bytes_of(torch.arange(5))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(TREES)
def test_any_tree_of_plain_values_comes_back_from_ours_and_from_torchs_files(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours.pt"), Path(folder, "theirs.pt")
        ours.write_bytes(filled(torch_parts(tree), {}))
        torch.save(tree, theirs)
        assert torch.load(ours, weights_only=True) == read(ours) == read(theirs) == tree


def bytes_at_large(path: Path, stored: StoredTensor) -> bytes:
    with path.open("rb") as file:
        file.seek(stored.offset)
        return file.read(stored.nbytes)


def test_what_torchs_restricted_reader_would_refuse_is_made_plain_or_refused_with_its_path(tmp_path: Path) -> None:
    tree = {
        "path": pathlib.Path("/a/b"),
        "namespace": argparse.Namespace(),
        "deque": collections.deque([1, 2]),
        "array": np.arange(3, dtype=">i4"),
        "day": datetime.date(2026, 1, 2),
    }
    with pytest.raises(UsageError, match=r"namespace is a argparse\.Namespace"):
        torch_parts(tree)
    del tree["namespace"]
    path = tmp_path / "a.pt"
    path.write_bytes(filled(torch_parts(tree), {}))
    found = torch.load(path)
    assert (found["path"], found["deque"], found["day"]) == ("/a/b", [1, 2], "2026-01-02")
    assert found["array"].tolist() == [0, 1, 2]
    inside: list[Any] = []
    inside.append(inside)
    with pytest.raises(UsageError, match="containing itself"):
        torch_parts(inside)
