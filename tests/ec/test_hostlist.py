"""Short forms of many names, as SLURM writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.ec.hostlist import expand


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("login", "login"),
        ("a,b", "a b"),
        ("n[1-3,07-09]", "n1 n2 n3 n07 n08 n09"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("n[5]", "n5"),
        ("r[1-2]c[0,3]-ib,x", "r1c0-ib r1c3-ib r2c0-ib r2c3-ib x"),
        (" a , n[1, 3] ", "a n1 n3"),
    ],
)
def test_all_names_come_in_order(expression: str, names: str) -> None:
    assert expand(expression) == names.split()


@given(st.integers(0, 9999), st.integers(0, 300), st.integers(1, 6))
def test_a_range_keeps_the_zeros_of_its_first_number(first: int, count: int, width: int) -> None:
    low = f"{first:0{width}d}"
    assert expand(f"n[{low}-{first + count}]") == [f"n{first + more:0{len(low)}d}" for more in range(count + 1)]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("n[1-3", "not closed"),
        ("n1-3]", "does not match"),
        ("n[[1]]", "does not match"),
        ("n[3-1]", "'3-1' runs backwards"),
        ("n[a]", "'a' is neither a number nor a range"),
        ("n[]", "neither a number"),
        ("a,,b", "an empty name"),
        ("", "an empty name"),
        ("n[0-99999999999]", "more than 65536 names"),
        ("n[1-999]x[1-999]", "more than 65536 names"),
        ("n[1-50000],m[1-50000]", "more than 65536 names"),
    ],
)
def test_what_is_wrong_is_quoted(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand(expression)
