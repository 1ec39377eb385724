"""Networks of namespaces for the tests of this folder. A skip is for machines on which they cannot be made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from examples.netns import can_make_namespaces


@pytest.fixture
def up() -> Iterator[Callable[[Any], Any]]:
    """`up(LeafSpine(...))`: builds a network, which is gone after the test."""
    if not can_make_namespaces():
        pytest.skip("network namespaces can be made by root only, with iproute2 and util-linux")
    with ExitStack() as stack:
        yield stack.enter_context
