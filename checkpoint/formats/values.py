"""Values of one floating-point dtype in another: rounded to nearest, and never silently infinite.

A finite value beyond the range of the new dtype becomes its largest (or least) finite value, and is counted. Infinities
and NaN stay what they are; where the dtype has no infinity (float8_e4m3fn) one becomes NaN. Integers, booleans,
complex numbers and packed float4 are never converted.
"""

from typing import TYPE_CHECKING

from resilient.checkpoint.catalog.catalog import ITEMSIZES
from resilient.errors import UsageError

if TYPE_CHECKING:
    import torch

FLOATING = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)
"""The dtypes that are converted, each to any other."""


def is_floating(dtype: str) -> bool:
    return dtype in FLOATING


def check_conversion(name: str, dtype: str, to: str) -> None:
    """Raises UsageError for a tensor whose values are not converted so."""
    if to not in ITEMSIZES:
        raise UsageError(f"there is no dtype {to!r}; floating-point ones are {', '.join(FLOATING)}")
    if dtype != to and not (is_floating(dtype) and is_floating(to)):
        raise UsageError(
            f"tensor {name!r} is {dtype}, which is not converted to {to}: only {', '.join(FLOATING)} are, "
            f"to one another"
        )


def convert_values(data: memoryview, dtype: str, to: str) -> tuple[memoryview, int]:
    """`data`, contiguous elements of `dtype`, as elements of `to`; and how many were beyond its range.

    `data` begins at a multiple of its elements' size. It is not changed. At most 6 times the bytes of `data` (as
    float32, where it is float8) are taken for it.
    """
    import torch  # only where there is something to convert: it takes a second, and 200 MB

    if not data.nbytes:
        return memoryview(b""), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for this little, more of them wait for one another; the workers are the parallelism
    try:
        made, beyond = _converted(torch.frombuffer(data, dtype=getattr(torch, dtype)), getattr(torch, to))
    finally:
        torch.set_num_threads(threads)
    return memoryview(made.view(torch.uint8).numpy().data), beyond


def _converted(values: "torch.Tensor", target: "torch.dtype") -> tuple["torch.Tensor", int]:
    import torch

    if values.element_size() == 1:
        values = values.float()  # torch computes nothing in float8
    beyond = 0
    if torch.finfo(target).max < torch.finfo(values.dtype).max:
        values, beyond = _within(values, target)
    return values.to(target), beyond


def _within(values: "torch.Tensor", target: "torch.dtype") -> tuple["torch.Tensor", int]:
    """The values with finite ones beyond the target's range set to its ends, and how many those were."""
    import torch

    most = torch.finfo(target).max
    low, high = (bound.item() for bound in values.aminmax())
    if -most <= low and high <= most:  # false where there are NaN
        return values, 0
    finite = values.isfinite()
    count = int(((values.abs() > most) & finite).sum())
    if target not in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2):
        values = values.masked_fill(values.isinf(), torch.nan)  # versions of torch differ in what they make of it
    return values.clamp(-most, most).where(finite, values), count
