"""Names of torch dtypes, and how the elements of each lie in an image.

An image is a safetensors file, so a dtype that the format knows has its code there and any reader gives it back. One
that it does not know is *stored as* another dtype with the same bytes: complex128 as F64 with a last dimension of 2
(real, imaginary), packed float4 as U8. Its true name stands in the record, and only this library gives it back.

The table is fixed, it does not ask which version of safetensors is installed: the same state always makes the same
file. The codes are those of https://github.com/huggingface/safetensors (enum `Dtype`), 0.8. Not here: any conversion
of values; bytes are never changed.
"""

import torch

from resilient.errors import RestoreError, StateError

__all__ = ["dtype_name", "safetensors_dtype", "torch_dtype"]

# torch name -> (safetensors code, None), or (code of the stored-as dtype, the extra last dimensions).
# float8_e8m0fnu has a code, but `safetensors.torch.load(bytes)` of 0.8 fails on it; files open.
_STORED: dict[str, tuple[str, tuple[int, ...] | None]] = {
    "float64": ("F64", None),
    "float32": ("F32", None),
    "float16": ("F16", None),
    "bfloat16": ("BF16", None),
    "float8_e4m3fn": ("F8_E4M3", None),
    "float8_e5m2": ("F8_E5M2", None),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", None),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", None),
    "float8_e8m0fnu": ("F8_E8M0", None),
    "int64": ("I64", None),
    "int32": ("I32", None),
    "int16": ("I16", None),
    "int8": ("I8", None),
    "uint64": ("U64", None),
    "uint32": ("U32", None),
    "uint16": ("U16", None),
    "uint8": ("U8", None),
    "bool": ("BOOL", None),
    "complex64": ("C64", None),
    "complex128": ("F64", (2,)),
    "complex32": ("F16", (2,)),
    # Two values to the byte: the code F4 counts values where torch counts bytes, so a shape would change meaning.
    "float4_e2m1fn_x2": ("U8", ()),
}

_BY_NAME: dict[str, torch.dtype] = {
    str(found).removeprefix("torch."): found for found in vars(torch).values() if isinstance(found, torch.dtype)
}
_BY_DTYPE: dict[torch.dtype, str] = {dtype: name for name, dtype in _BY_NAME.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name without the prefix: "float32", "bfloat16". The same for aliases (`torch.half` is "float16")."""
    return _BY_DTYPE[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises RestoreError when this torch has none such."""
    found = _BY_NAME.get(name)
    if found is None:
        raise RestoreError(
            f"the checkpoint names the dtype {name!r}, which torch {torch.__version__} does not have; "
            "restore with the torch version that wrote it, or a later one"
        )
    return found


def safetensors_dtype(dtype: torch.dtype) -> tuple[str, tuple[int, ...] | None]:
    """How tensors of `dtype` lie in an image: (code, None), or for a stored-as dtype (code, extra last dimensions).

    The shape in the image's header is the tensor's shape plus those dimensions; `()` adds none, but still says that a
    reader of safetensors sees another dtype than the one that was saved. The bytes are the same in all cases.
    Raises StateError for quantized, bit-field and sub-byte integer dtypes.
    """
    stored = _STORED.get(dtype_name(dtype))
    if stored is None:
        raise StateError(
            f"tensors of dtype {dtype} cannot be saved: safetensors has no such elements; save `tensor.int_repr()` "
            "with its scale and zero point (quantized), or a copy in another dtype"
        )
    return stored
