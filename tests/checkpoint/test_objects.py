"""The codec against generated values: what it takes comes back equal, with the same types, down to the bits."""

import collections
import contextlib
import datetime
import enum
import json
import math
import pathlib
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from resilient.checkpoint.objects import decode, encode
from resilient.errors import DamagedImage, NewerFormat, RestoreError, StateError


def round_trip(value: object) -> Any:
    encoded = encode(value, "state")
    assert encoded.text.isascii()
    return decode(encoded.text, encoded.tensors, "state")


def same(left: Any, right: Any) -> bool:
    """Equal with the same types all the way down; NaN equals itself bit by bit, and the order of keys counts."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, (set, frozenset)):
        kinds = [sorted(type(item).__name__ for item in items) for items in (left, right)]
        return bool(left == right) and kinds[0] == kinds[1]
    if isinstance(left, datetime.datetime):
        return repr(left) == repr(right)  # the time zone's name and the fold do not count in ==
    if isinstance(left, collections.deque) and left.maxlen != right.maxlen:
        return False
    if isinstance(left, collections.defaultdict) and left.default_factory is not right.default_factory:
        return False
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple, collections.deque)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, types.SimpleNamespace):
        return same(vars(left), vars(right))
    if isinstance(left, slice):
        return same([left.start, left.stop, left.step], [right.start, right.stop, right.step])
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes())
    if isinstance(left, np.generic):
        return bool(left.dtype == right.dtype) and left.tobytes() == right.tobytes()
    if isinstance(left, torch.Tensor):
        return left is right
    return bool(left == right)


TEXTS = st.text(st.characters(exclude_categories=[])) | st.sampled_from(["$type", "", "a/b", "~1", "\ud800\udc00"])
FLOATS = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("d", struct.pack("Q", bits))[0])
HASHABLE_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**80), 2**80),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    TEXTS,
    st.binary(),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.sampled_from([datetime.UTC, datetime.timezone(datetime.timedelta(hours=-3), "here")])),
    st.timedeltas(),
    st.builds(range, st.integers(), st.integers(), st.integers(1, 9)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda:3"), torch.Size([2, 0])]),
    st.builds(pathlib.PurePosixPath, st.text(st.characters(exclude_characters="\0"))),
    st.builds(pathlib.PureWindowsPath, st.text("ab:/\\.")),
    st.builds(np.float32, st.floats(width=32, allow_nan=False)),
)
HASHABLE = st.recursive(
    HASHABLE_LEAVES,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
LEAVES = st.one_of(
    HASHABLE,
    FLOATS,
    st.complex_numbers(),
    st.binary().map(bytearray),
    st.builds(lambda: torch.zeros(2)),
    npst.arrays(
        npst.scalar_dtypes() | npst.unicode_string_dtypes() | npst.byte_string_dtypes(),
        npst.array_shapes(min_dims=0, min_side=0, max_side=3),
    ),
    npst.scalar_dtypes().flatmap(npst.from_dtype),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(TEXTS, inner),
        st.dictionaries(HASHABLE, inner, max_size=4),
        st.dictionaries(TEXTS, inner).map(collections.OrderedDict),
        st.dictionaries(HASHABLE, inner, max_size=4).map(lambda items: collections.defaultdict(list, items)),
        st.dictionaries(HASHABLE, st.integers(), max_size=4).map(collections.Counter),
        st.builds(lambda items, more: collections.deque(items, len(items) + more), st.lists(inner), st.integers(0, 3)),
        st.sets(HASHABLE, max_size=4),
        st.builds(slice, inner, inner, inner),
        st.dictionaries(st.text("abc", min_size=1), inner).map(lambda items: types.SimpleNamespace(**items)),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_every_value_it_takes_comes_back_equal_with_the_same_types(value: object) -> None:
    assert same(round_trip(value), value)


@settings(max_examples=100, deadline=None)
@given(st.lists(npst.array_dtypes(max_size=3), min_size=1, max_size=1), st.data())
def test_structured_arrays_come_back_bit_by_bit(dtypes: list[Any], data: Any) -> None:
    value = data.draw(npst.arrays(dtypes[0], npst.array_shapes(max_side=3)))
    assert same(round_trip(value), value)
    assert same(round_trip(value.reshape(-1)[0]), value.reshape(-1)[0])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abcdef$ \u00e9"), inner),
)


@given(JSON_VALUES)
def test_what_json_can_say_comes_out_as_plain_json(value: object) -> None:
    assert json.loads(encode(value, "state").text) == value


def test_a_readable_example() -> None:
    generator = torch.zeros(3, dtype=torch.uint8)
    value = {"epoch": 3, "best": float("inf"), "seen": (1, 2), "sampler": {"generator": generator}, 7: None}
    encoded = encode(value, "loader")
    assert encoded.text == (
        '{"$type":"dict","items":[["epoch",3],["best",{"$type":"float","value":"inf"}],'
        '["seen",{"$type":"tuple","items":[1,2]}],'
        '["sampler",{"generator":{"$type":"tensor","path":"loader/sampler/generator"}}],[7,null]]}'
    )
    assert encoded.tensors == {"loader/sampler/generator": generator}


@pytest.mark.parametrize(
    "value",
    [
        {"$type": "tuple", "items": [1]},
        {"$type": {"$type": None}},
        [{"$type": "tensor", "path": "state"}],
        {"$typ": 1},
        {"$type\ud800": 1},
    ],
)
def test_a_dictionary_that_looks_like_a_tag_stays_a_dictionary(value: object) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        0.0,
        -0.0,
        5e-324,
        math.nan,
        -math.nan,
        [math.inf, -math.inf, 1.0],
        [1.0, 2.0],
        10**30_000,
        -(2**63) - 1,
        [1, 2**63],
        [2**63 - 1, -(2**63)],
        [True, False],
        [1, True],
        "\ud800",
        "\ud800\udc00",
        "\U00010000",
        {"\ud800\udc00": 1, "\U00010000": 2},
        ["a", "\ud83d\ude00", "\udc00\ud800"],
        {1: "int", "1": "str", 1.5: "float", None: 0, (1, ("a",)): [], frozenset({2}): {}},
        complex(-0.0, math.nan),
        datetime.datetime(2024, 10, 27, 2, 30, fold=1),
        datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(microseconds=1))),
        pathlib.Path("/data/\udcff"),
        collections.deque([1, 2], maxlen=2),
        collections.deque(),
        collections.defaultdict(None, {1: 2}),
        collections.OrderedDict([(2, 1), (1, 2)]),
        {"z": 1, "a": 2},
        slice(None, (1,), None),
        torch.Size([]),
        np.float16("nan"),
        np.str_("a\0\ud800"),
        np.bytes_(b"a\0"),
        np.datetime64("NaT", "ns"),
        np.void(b"abc"),
        np.array([b"abc", b"\0\0\0"], dtype="V3"),
        np.longdouble("0.1"),
        np.array("abc"),
        np.array([[1, 2], [3, 4]], dtype=">i4").T,
        np.arange(10)[::-2],
        np.zeros((0, 3), dtype="f4"),
        np.zeros(1, dtype="f4")[:0],
        np.broadcast_to(np.float32(0), (0,)),
        np.broadcast_to(np.arange(3), (2, 3)),
        np.array([(1, (2.0, [3, 4]))], dtype=[("a", "i1"), ("b", [("c", "f8"), ("d", "u2", (2,))])]),
        np.zeros(2, dtype=np.dtype([("a", "i1"), ("b", "f8")], align=True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_awkward_values_come_back_bit_by_bit(value: object) -> None:
    assert same(round_trip(value), value)


def test_a_set_of_nans_keeps_its_size() -> None:
    assert len(round_trip({float("nan"), float("nan")})) == 2


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8_e4m3fn", "bool", "complex128", "uint64", "complex32"])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors_pass_as_they_are(name: str, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=getattr(torch, name))
    parameter = torch.nn.Parameter(torch.zeros(2))
    encoded = encode([tensor, parameter, tensor], "x")
    assert list(encoded.tensors) == ["x/0", "x/1", "x/2"]
    assert encoded.tensors["x/0"] is tensor
    restored = decode(encoded.text, {**encoded.tensors, "other": torch.zeros(1)}, "x")
    assert isinstance(restored, list)
    assert restored[0] is tensor
    assert restored[1] is parameter


def test_a_lazy_conjugate_is_made_real() -> None:
    tensor = torch.tensor([1 + 2j]).conj()
    stored = encode(tensor, "x").tensors["x"]
    assert not stored.is_conj()
    assert torch.equal(stored, tensor)


def test_a_distributed_tensor_passes_as_it_is() -> None:
    from torch.distributed.tensor import DTensor

    tensor = torch.Tensor._make_subclass(DTensor, torch.zeros(2))
    assert encode({"ema": tensor}, "x").tensors["x/ema"] is tensor


def test_every_tensor_has_a_path_of_its_own_whatever_the_keys() -> None:
    keys = ["a/b", "a~1b", "a~b", "a", 1, "1", "1~2", 1.0 + 1e-9, None, "None", b"1", (1,), "(1,)", "", "\ud800"]
    value: dict[Any, Any] = {key: torch.tensor(index) for index, key in enumerate(keys)}
    value["a"] = {"b": torch.tensor(-1), "": {"": torch.tensor(-2)}}
    encoded = encode(value, "x")
    assert len(encoded.tensors) == len(keys) + 1
    assert all(path.encode() for path in encoded.tensors)
    assert same(decode(encoded.text, encoded.tensors, "x"), value)
    assert {"x/a~1b", "x/1", "x/1~2", "x/a/b"} <= set(encoded.tensors)


def test_a_numpy_array_lies_in_the_image_as_numbers_where_torch_has_the_dtype() -> None:
    array = np.arange(6, dtype="f4").reshape(2, 3)
    stored = encode({"a": array, "b": array.astype(">f4")}, "x").tensors
    assert torch.equal(stored["x/a"], torch.arange(6.0).reshape(2, 3))
    assert stored["x/b"].dtype == torch.uint8


def test_a_restored_array_does_not_share_the_memory_that_it_was_read_from() -> None:
    encoded = encode(np.arange(3), "x")
    restored = decode(encoded.text, encoded.tensors, "x")
    encoded.tensors["x"].fill_(9)
    assert isinstance(restored, np.ndarray)
    assert restored.tolist() == [0, 1, 2]
    assert restored.flags.writeable


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 1


class Pair(NamedTuple):
    a: int
    b: int


@dataclass
class Config:
    rate: float = 0.1


class Mine:
    pass


class MyDict(dict[str, int]):
    pass


class WithState:
    def state_dict(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    ("value", "named", "advised"),
    [
        (lambda: 1, "function .*lambda", "code is not saved"),
        (print, "builtin_function_or_method builtins.print", "code is not saved"),
        (Mine, "class .*Mine", "code is not saved"),
        (json, "module json", "code is not saved"),
        (iter([1]), "list_iterator", "how far it has come"),
        (sys.stdout, "a .*", ""),
        (Mine(), "a .*Mine", "load_state_dict"),
        (Colour.RED, "a .*Colour", ".name"),
        (Level.HIGH, "a .*Level", ".name"),
        (Pair(1, 2), "a .*Pair", "_asdict"),
        (Config(), "a .*Config", "asdict"),
        (MyDict(), "a .*MyDict", r"dict\(value\)"),
        (WithState(), "a .*WithState", "state_dict()"),
        (threading.Lock(), "a _thread.lock", "plain values"),
        (collections.defaultdict(lambda: 1), "factory is the function .*lambda", "int, float"),
        (np.array([object()], dtype=object), "dtype", "another dtype"),
        (np.ma.masked_array([1], [True]), "MaskedArray", ""),
        (np.random.default_rng(0), "Generator", ""),
        (torch.zeros(2, dtype=torch.float32).to_sparse(), "sparse", "to_dense"),
        (torch.empty(2, device="meta"), "meta", "materialise"),
        (torch.empty(2, dtype=torch.bits8), "bits8", "another dtype"),
        (torch.nn.Linear(1, 1), "Linear", "state_dict"),
        ({(torch.zeros(1),): 1}, "key", "name"),
        (datetime.datetime(2024, 1, 1, tzinfo=type("Zone", (datetime.tzinfo,), {})()), "Zone", "astimezone"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_saved_is_refused_with_its_path_its_type_and_what_to_do(
    value: object, named: str, advised: str
) -> None:
    with pytest.raises(StateError, match=rf"'loader/hooks/0.*{named}.*{advised}"):
        encode({"epoch": 1, "hooks": [value]}, "loader")


def test_an_open_file_is_refused(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "x").open("w") as file, pytest.raises(StateError, match="'x/log' cannot be saved: a _io.Text"):
        encode({"log": file}, "x")


def test_a_value_that_contains_itself_is_refused() -> None:
    value: dict[str, Any] = {"list": [1]}
    value["list"].append(value)
    with pytest.raises(StateError, match="'x/list/1' cannot be saved: this dict contains itself"):
        encode(value, "x")
    around: types.SimpleNamespace = types.SimpleNamespace()
    around.me = (around,)
    with pytest.raises(StateError, match="contains itself"):
        encode(around, "x")


def test_one_list_in_two_places_is_no_cycle() -> None:
    shared = [1, "x"]
    assert round_trip([shared, {"a": shared}, (shared, shared)]) == [shared, {"a": shared}, (shared, shared)]


def nested(depth: int, around: Callable[[object], object]) -> object:
    value: object = None
    for _ in range(depth):
        value = around(value)
    return value


@pytest.mark.parametrize(
    "around",
    [lambda value: [value], lambda value: {1: value}, lambda value: slice(value), lambda value: {"a": (value,)}],
)
def test_what_is_too_deep_to_be_read_back_is_refused_when_saving(around: Callable[[object], object]) -> None:
    value = nested(49, around)
    assert same(round_trip(value), value)
    with pytest.raises(StateError, match="more than 100 containers deep"):
        encode(nested(5000, around), "x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nan",
        "NaN",
        "[Infinity]",
        "[1] 2",
        '{"a":1,"a":2}',
        "[" * 100_000,
        "1" * 5000,
        '{"$type":"tuple"}',
        '{"$type":"tuple","items":{}}',
        '{"$type":"tuple","items":[],"more":1}',
        '{"$type":"int","hex":"xyz"}',
        '{"$type":"int","hex":7}',
        '{"$type":"float","value":"0"}',
        '{"$type":"float","value":"nan "}',
        '{"$type":"bytes","base64":"?"}',
        '{"$type":"str","hex":"ff"}',
        '{"$type":"dict","items":[1]}',
        '{"$type":"dict","items":[[1,2],[1,3]]}',
        '{"$type":"dict","items":[[[],2]]}',
        '{"$type":"set","items":[1,1]}',
        '{"$type":"set","items":[[]]}',
        '{"$type":"deque","maxlen":-1,"items":[]}',
        '{"$type":"defaultdict","factory":"eval","items":[]}',
        '{"$type":"range","start":0,"stop":1,"step":0}',
        '{"$type":"range","start":true,"stop":1,"step":1}',
        '{"$type":"date","iso":"2024-13-01"}',
        '{"$type":"datetime","iso":"2024-01-01","fold":2,"zone":[]}',
        '{"$type":"datetime","iso":"2024-01-01","fold":0,"zone":[1]}',
        '{"$type":"timedelta","days":9999999999,"seconds":0,"microseconds":0}',
        '{"$type":"path","kind":"Popen","path":"ls"}',
        '{"$type":"torch.Size","items":["a"]}',
        '{"$type":"torch.device","name":"toaster"}',
        '{"$type":"tensor","path":"absent"}',
        '{"$type":"ndarray","dtype":"O","shape":[3],"path":"x"}',
        '{"$type":"ndarray","dtype":"|O","shape":[3],"path":"x"}',
        '{"$type":"ndarray","dtype":[["a","|O"]],"shape":[3],"path":"x"}',
        '{"$type":"ndarray","dtype":"<f4","shape":[4],"path":"x"}',
        '{"$type":"ndarray","dtype":"<f4","shape":[-1,-3],"path":"x"}',
        '{"$type":"ndarray","dtype":"<f4","shape":["3"],"path":"x"}',
        '{"$type":"ndarray","dtype":"nonsense","shape":[3],"path":"x"}',
        '{"$type":"ndarray","dtype":"<f4","shape":[99999999999999],"path":"x"}',
        '{"$type":"numpy","dtype":"O","base64":"AAAAAAAAAAA="}',
        '{"$type":"numpy","dtype":"<f4","base64":""}',
        '{"$type":"numpy","dtype":"<U0","base64":""}',
    ],
    ids=lambda text: text[:70],
)
def test_malformed_text_is_refused_as_damage(text: str) -> None:
    with pytest.raises(DamagedImage, match="'x'"):
        decode(text, {"x": torch.zeros(3)}, "x")


def test_an_array_of_objects_is_never_read() -> None:
    for dtype in ('"|O"', '[["a","|O"]]'):
        text = f'{{"$type":"ndarray","dtype":{dtype},"shape":[1],"path":"x"}}'
        with pytest.raises(DamagedImage, match="arrays of objects are never read"):
            decode(text, {"x": torch.zeros(1, dtype=torch.int64)}, "x")


@pytest.mark.parametrize("tag", ['"os.system"', '"builtins.eval"', "null", "[]", '"object"'])
def test_an_unknown_type_is_refused_as_that_of_a_later_version(tag: str) -> None:
    with pytest.raises(NewerFormat, match="upgrade"):
        decode(f'[{{"$type":{tag},"items":["ls"]}}]', {}, "x")


def test_a_dtype_that_this_torch_lacks_is_refused_by_name() -> None:
    with pytest.raises(RestoreError, match="'float3'"):
        decode('{"$type":"torch.dtype","name":"float3"}', {}, "x")


@settings(max_examples=200, deadline=None)
@given(VALUES, st.data())
def test_changed_text_is_refused_or_read_but_never_raises_anything_else(value: object, data: Any) -> None:
    encoded = encode(value, "x")
    at = data.draw(st.integers(0, max(0, len(encoded.text) - 1)))
    changed = encoded.text[:at] + data.draw(st.text(max_size=3)) + encoded.text[at + data.draw(st.integers(0, 4)) :]
    with contextlib.suppress(RestoreError):
        decode(changed, encoded.tensors, "x")


def test_small_leaves_cost_a_few_times_what_plain_json_costs() -> None:
    value = {f"layer.{index}": {"rate": 0.1, "step": index, "name": "w", "on": True} for index in range(2500)}
    ours = plain = math.inf
    for _ in range(10):
        begin = time.thread_time()
        json.dumps(value)
        middle = time.thread_time()
        encode(value, "x")
        plain, ours = min(plain, middle - begin), min(ours, time.thread_time() - middle)
    assert ours < 6 * plain  # a ratio, since the machine may be busy; alone, 10,000 leaves take less than 10 ms
