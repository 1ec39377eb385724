"""Which bytes go into which parity, and what gives lost ones back. Pure; matrices of GF(2^8) as uint8 arrays.

The parity rows are a Cauchy matrix whose columns are scaled so that row 0 is all ones: any k of the k + m shards give
all others (scaling keeps every minor of a Cauchy matrix different from 0), m = 1 is plain XOR, and one lost shard comes
back by XOR as long as parity 0 is there. J. S. Plank, L. Xu: Optimizing Cauchy Reed-Solomon Codes, NCA 2006.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from resilient.ec.field import INVERSE, MULTIPLY, Bytes, invert, product
from resilient.errors import RestoreError, UsageError

MOST_SHARDS = 255


@dataclass(frozen=True, slots=True)
class Recovery:
    """missing[i] = XOR over j of coefficients[i, j] * sources[j]; both are numbers of shards."""

    missing: tuple[int, ...]
    sources: tuple[int, ...]
    coefficients: Bytes


def parity_matrix(k: int, m: int) -> Bytes:
    """The m x k coefficients of the parity shards. Raises UsageError for sizes that the field has no room for."""
    if k < 1 or m < 1 or k + m > MOST_SHARDS:
        raise UsageError(f"{k} data and {m} parity shards: at least 1 of each and at most {MOST_SHARDS} together")
    rows, columns = np.arange(m, dtype=np.uint8), np.arange(m, m + k, dtype=np.uint8)
    cauchy = INVERSE[rows[:, None] ^ columns[None, :]]
    scaled: Bytes = MULTIPLY[cauchy, INVERSE[cauchy[0]][None, :]]
    return scaled


def recovery(parity: Bytes, present: Iterable[int], missing: Sequence[int]) -> Recovery:
    """How to compute shards from others. `parity`: of `parity_matrix`; shards 0 to k - 1 are data, the rest parity.

    Raises RestoreError where fewer than k are present, UsageError for numbers that there are not.
    """
    m, k = parity.shape
    here = sorted(set(present))
    wrong = [number for number in (*here, *missing) if not 0 <= number < k + m]
    if wrong or set(here) & set(missing):
        raise UsageError(f"shards {wrong or sorted(set(here) & set(missing))}: there are {k + m}, each lost or present")
    if len(here) < k:
        raise RestoreError(f"{len(here)} of {k + m} shards are left and {k} are needed: use another snapshot or level")
    sources = here[:k]  # data first: fewer products, and a single loss takes parity 0, which is XOR
    generator = np.concatenate([np.eye(k, dtype=np.uint8), parity])
    from_sources = invert(generator[sources])
    coefficients = product(generator[list(missing)], from_sources)
    needed = np.flatnonzero(coefficients.any(axis=0))
    return Recovery(tuple(missing), tuple(sources[number] for number in needed), coefficients[:, needed])
