"""What a matmul with a collective is asked to do, checked before anything is launched: pure.

`Call` is what ranks must agree on, what a cost model needs, and the key under which times are kept. `described` makes
one of shapes, or says in words what is wrong with them; nothing here touches a group or a tensor's numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Operation = Literal["all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce"]
OPERATIONS: tuple[Operation, ...] = ("all_gather_matmul", "matmul_reduce_scatter", "matmul_all_reduce")
ACTIVATIONS = ("relu", "gelu", "silu")
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operation: [rows, inner] times [inner, columns] on each of `world` ranks.

    `rows` are those of all ranks (M); where `inner` or `columns` are cut, they are this rank's. `backward`: its other
    matmul, the weight's gradient, can be hidden behind communication as well. `device`: "cpu", "cuda", ...
    """

    operation: Operation
    rows: int
    inner: int
    columns: int
    dtype: str
    device: str
    world: int
    backward: bool = False

    @property
    def flops(self) -> int:
        """Of the matmul whose operand or result is communicated."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def width(self) -> int:
        """Numbers in a row that is communicated."""
        return self.inner if self.operation == "all_gather_matmul" else self.columns

    @property
    def nbytes(self) -> int:
        """Of the whole tensor that is communicated, [rows, width]."""
        return self.rows * self.width * ITEM_BYTES[self.dtype]

    @property
    def rows_to_cut(self) -> int:
        """Rows of the part that is cut into chunks: a rank's own, or all where every rank has all."""
        return self.rows if self.operation == "matmul_all_reduce" else self.rows // self.world

    def __str__(self) -> str:
        shapes = f"[{self.rows}, {self.inner}] x [{self.inner}, {self.columns}] {self.dtype}"
        return f"{self.operation}{' (backward)' if self.backward else ''} of {shapes} over {self.world} ranks"


def problem(
    operation: Operation,
    input: Sequence[int],
    weight: Sequence[int],
    *,
    dtypes: Sequence[str],
    devices: Sequence[str],
    world: int,
    bias: Sequence[int] | None = None,
    activation: str | None = None,
    contiguous: bool = True,
) -> str | None:
    """What is wrong with a call, in words; None if nothing is. `dtypes` and `devices`: of input, weight and bias."""
    name = "shard" if operation == "all_gather_matmul" else "input"
    if len(input) != 2 or len(weight) != 2:
        return f"{name} and weight must have two dimensions, and have {list(input)} and {list(weight)}"
    if input[1] != weight[0]:
        return f"{name} {list(input)} cannot be multiplied with weight {list(weight)}: {input[1]} is not {weight[0]}"
    if 0 in (*input, *weight):
        return f"{name} {list(input)} or weight {list(weight)} is empty"
    if operation == "matmul_reduce_scatter" and input[0] % world:
        return f"the {input[0]} rows of the result cannot be dealt out to {world} ranks; pad them to a multiple"
    if bias is not None and list(bias) != [weight[1]]:
        return f"bias must be [{weight[1]}], as wide as the result, and is {list(bias)}"
    if len(set(dtypes)) > 1:
        return f"all must have one dtype, and have {', '.join(dtypes)}"
    if dtypes[0] not in ITEM_BYTES:
        return f"dtype {dtypes[0]} cannot be multiplied here; possible are {', '.join(ITEM_BYTES)}"
    if len(set(devices)) > 1:
        return f"all must be on one device, and are on {', '.join(devices)}"
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not known; possible are {', '.join(ACTIVATIONS)} and None"
    if not contiguous:
        return f"{name} is not contiguous; call .contiguous() where that copy is wanted"
    return None
