"""Texts that version 1 wrote are read for ever: `tests/golden/objects_version_1.json` is only added to."""

import collections
import datetime
import json
import pathlib
import types
from typing import Any

import numpy as np
import pytest
import torch

from resilient.checkpoint.objects import decode

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "objects_version_1.json"

TEXTS: dict[str, str] = json.loads(GOLDEN.read_text())

TENSORS = {
    "tensor/generator": torch.arange(4, dtype=torch.uint8),
    "ndarray": torch.arange(6.0).reshape(2, 3),
    "structured": torch.tensor([1, 2, 0, 3, 4, 0], dtype=torch.uint8),
}

VALUES: dict[str, Any] = {
    "plain": {"epoch": 3, "rate": 0.1, "name": "é", "on": True, "off": None, "list": [1, -0.5, []], "more": {}},
    "looks_like_a_tag": {"$type": "tuple", "items": [1]},
    "numbers": [2**63, -(2**70), float("inf"), float("-inf"), -0.0, 1 + 2j, complex(0.0, float("-inf"))],
    "strings": ["\ud800", "\ud800\udc00", "\U00010000", b"\x00\xff", bytearray(b"ab")],
    "sequences": [(), (1, (2,)), collections.deque([1, 2], 5), collections.deque(), range(1, 9, 2), slice(None, 3)],
    "mappings": [
        {1: "a", "1": "b", None: "c", (1, 2): "d"},
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter({2: 1, 5: 2}),
        collections.defaultdict(list, {"a": [1]}),
        collections.defaultdict(None, {"a": 1}),
    ],
    "sets": [{1}, set(), frozenset({"a"}), {frozenset({(1, "b")})}],
    "namespace": types.SimpleNamespace(a=1, b=(2,)),
    "times": [
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 10, 27, 2, 30, 0, 5, fold=1),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=-3), "here")),
        datetime.timedelta(-1, 2, 3),
    ],
    "paths": [pathlib.PurePosixPath("/a/b"), pathlib.PureWindowsPath("c:\\a")],
    "torch": [torch.float32, torch.bfloat16, torch.device("cuda:1"), torch.Size([2, 0])],
    "tensor": {"generator": TENSORS["tensor/generator"]},
    "scalars": [np.float32(0.5), np.int64(-1), np.bool_(True), np.str_("a"), np.bytes_(b"b"), np.datetime64(5, "s")],
    "ndarray": np.arange(6, dtype="<f4").reshape(2, 3),
    "structured": np.array([(1, 2), (3, 4)], dtype=[("a", "i1"), ("b", "<u2")]),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_text_of_version_1_is_read(name: str) -> None:
    found, expected = decode(TEXTS[name], TENSORS, name), VALUES[name]
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype  # type: ignore[attr-defined]
        assert np.array_equal(found, expected)  # type: ignore[arg-type]
    else:
        assert found == expected
        assert repr(found) == repr(expected)


def test_every_text_is_held_against_a_value() -> None:
    assert TEXTS.keys() == VALUES.keys()
