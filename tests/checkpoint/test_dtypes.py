"""Dtype names and codes, held against the safetensors library itself: headers are written here by hand."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from resilient.checkpoint.dtypes import dtype_name, safetensors_dtype, torch_dtype
from resilient.errors import RestoreError, StateError

SAVED = [
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu",
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128 complex32 float4_e2m1fn_x2",
]
NAMES = [name for line in SAVED for name in line.split() if hasattr(torch, name)]
REFUSED = [
    name
    for name in ["quint8", "qint8", "qint32", "quint4x2", "quint2x4", "bits8", "bits16", "int4", "uint4", "int1"]
    if hasattr(torch, name)
]


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 2, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def file_with(path: Path, code: str, shape: list[int], data: bytes) -> Path:
    header = json.dumps({"x": {"dtype": code, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def read(path: Path) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        found = file.get_tensor("x")
    assert isinstance(found, torch.Tensor)
    return found


def element_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_safetensors_library_opens_every_code_and_gives_back_the_same_bytes(name: str, tmp_path: Path) -> None:
    dtype = torch_dtype(name)
    code, extra = safetensors_dtype(dtype)
    data = random_bytes(6 * dtype.itemsize)
    found = read(file_with(tmp_path / "x.safetensors", code, [2, 3, *(extra or ())], data.numpy().tobytes()))
    assert found.shape == (2, 3, *(extra or ()))
    assert element_bytes(found) == data.numpy().tobytes()
    assert (found.dtype == dtype) == (extra is None)


@pytest.mark.parametrize("name", NAMES)
def test_a_scalar_and_an_empty_tensor_of_every_code_open_too(name: str, tmp_path: Path) -> None:
    code, extra = safetensors_dtype(torch_dtype(name))
    size = torch_dtype(name).itemsize
    scalar = read(file_with(tmp_path / "s.safetensors", code, [*(extra or ())], bytes(size)))
    empty = read(file_with(tmp_path / "e.safetensors", code, [0, 4, *(extra or ())], b""))
    assert scalar.numel() * scalar.element_size() == size
    assert empty.shape[:2] == (0, 4)


def test_complex128_is_stored_as_pairs_of_reals(tmp_path: Path) -> None:
    value = torch.tensor([1 + 2j, -3.5 + 0.25j], dtype=torch.complex128)
    assert safetensors_dtype(torch.complex128) == ("F64", (2,))
    data = torch.view_as_real(value).numpy().tobytes()
    found = read(file_with(tmp_path / "x.safetensors", "F64", [2, 2], data))
    assert torch.equal(torch.view_as_complex(found), value)


def test_names_and_dtypes_are_one_to_one_over_all_that_torch_has() -> None:
    for dtype in {found for found in vars(torch).values() if isinstance(found, torch.dtype)}:
        assert torch_dtype(dtype_name(dtype)) is dtype
    assert dtype_name(torch.half) == "float16"
    assert dtype_name(torch.cdouble) == "complex128"


@pytest.mark.parametrize("name", ["float31", "", "Tensor", "load", "torch.float32", "half"])
def test_a_name_that_is_no_dtype_is_refused_when_reading(name: str) -> None:
    with pytest.raises(RestoreError, match="does not have"):
        torch_dtype(name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_dtype_that_cannot_be_saved_is_refused_by_name(name: str) -> None:
    with pytest.raises(StateError, match=f"torch.{name} cannot be saved"):
        safetensors_dtype(getattr(torch, name))
