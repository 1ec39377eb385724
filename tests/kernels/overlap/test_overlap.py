"""Matmuls in chunks over real process groups, beside products of the whole."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.kernels.overlap import jobs
from tests.multiprocess import ranks


@pytest.mark.parametrize("world", [2, 3, 4])
def test_chunks_give_the_same_values_as_the_whole(world: int) -> None:
    shapes = [(world * 16, 24, 8), (world * 7, 5, 33), (world, world, 1)]
    ranks.run(jobs.same_values, world, shapes, [torch.float32, torch.float64], [1, 2, 5])


@pytest.mark.parametrize("world", [2, 3])
def test_half_precision_is_summed_as_exactly_as_the_plain_way(world: int) -> None:
    ranks.run(jobs.same_values, world, [(48, 36, 20)], [torch.bfloat16, torch.float16], [1, 4])


@pytest.mark.parametrize("world", [2, 3])
def test_results_are_the_same_bits_at_every_run_and_an_all_reduces_on_every_rank(world: int) -> None:
    results = ranks.run(jobs.same_bits, world, 10)
    assert [counts for counts, _ in results] == ["[1, 1, 1]"] * world
    assert len({said for _, said in results}) == 1


@pytest.mark.parametrize("chunks", [1, 2])
def test_sums_are_taken_in_the_order_of_ranks_on_every_rank(chunks: int) -> None:
    assert ranks.run(jobs.sums, 4, chunks) == [[((1e16 + 1.0) - 1e16) + 1.0] * 2] * 4


def test_lanes_carry_chunks_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By collectives, as any backend would that is not gloo."""
    hosts = [f'host{host} = ["127.3.{host}.1", "127.3.{host}.2"]' for host in range(3)]
    paths = [f'[[paths]]\nname = "plane{path}"\ninterface = "eth{path}"\nrate = "1gbit"' for path in range(2)]
    (tmp_path / "topology.toml").write_text("\n".join(["[addresses]", *hosts, *paths]))
    monkeypatch.setenv("RESILIENT_TOPOLOGY", str(tmp_path / "topology.toml"))
    monkeypatch.setenv("RESILIENT_STRIPE_FROM", "1k")
    nodes = [f"host{host}" for host in range(3)]
    shapes = [(96, 24, 16), (3, 5, 7)]
    kinds = ranks.run(jobs.same_values, 3, shapes, [torch.float32, torch.float64], [1, 3], "resilient", nodes=nodes)
    assert kinds == ["ResilientProcessGroup, collectives"] * 3


def test_gloo_by_another_name_gets_messages() -> None:
    """Which is what the backend "resilient" is on one host."""
    kinds = ranks.run(jobs.same_values, 2, [(8, 4, 4)], [torch.float32], [1, 2], "resilient")
    assert {kind.partition(", ")[2] for kind in kinds} == {"messages"}


@pytest.mark.parametrize(("method", "chunks"), [("plain", 1), ("chunked", 4), (None, 1)])
def test_gradients_are_those_of_the_whole(method: str | None, chunks: int) -> None:
    ranks.run(jobs.gradients, 2, method, chunks)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not there for this platform")
def test_fused_kernels_give_the_same_values_and_gradients() -> None:
    ranks.run(jobs.gradients, 2, "fused", 1, None, torch.float32)


def test_gradients_pass_an_activation_and_more_ranks() -> None:
    ranks.run(jobs.gradients, 4, "chunked", 2, "gelu")
