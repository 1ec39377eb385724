"""Engines: the native one is there on this machine, and none is trusted that computes something else."""

from collections.abc import Sequence

import pytest

from resilient.ec import engine as engines
from resilient.ec.engine import Isal, Tables, default_engine
from resilient.ec.field import Bytes


def test_the_native_engine_is_found_where_its_wheel_is_installed() -> None:
    assert default_engine().name.startswith("isa-l")


def test_without_a_library_the_tables_serve_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "_libraries", lambda: iter(["libc.so.6", "/nowhere/libisal.so"]))
    assert isinstance(default_engine.__wrapped__(), Tables)
    assert "install pyeclib" in caplog.text


def test_a_library_that_lies_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lying(Isal):
        def combine(self, coefficients: Bytes, sources: Sequence[int], targets: Sequence[int], nbytes: int) -> None:
            super().combine(coefficients, sources, targets, nbytes - 1)

    path = default_engine().name.removeprefix("isa-l (").removesuffix(")")
    Isal(path)
    with pytest.raises(RuntimeError, match="something else than the tables"):
        Lying(path)
