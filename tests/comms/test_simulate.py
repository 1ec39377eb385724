"""The simulation against what can be worked out by hand, and the paper's findings as it reproduces them."""

from statistics import mean

import numpy as np
import pytest

from resilient.comms.certificate import Piece, certify
from resilient.comms.fabric import Fabric, leaf_spine, multi_plane
from resilient.comms.flows import Flow, halving_doubling_all_reduce, ring_all_reduce
from resilient.comms.plan import plan_step
from resilient.comms.rivals import ecmp, ethereal, spraying
from resilient.comms.simulate import fair_rates, simulate
from tests.comms.test_plan import BYTES, PAPER, RANKS, placed_at_random

SEEDS = range(5)


def seconds(fabric: Fabric, flows: tuple[Flow, ...], pieces: list[Piece]) -> float:
    return simulate(fabric, flows, pieces).seconds


def ours(fabric: Fabric, flows: tuple[Flow, ...]) -> float:
    return seconds(fabric, flows, list(plan_step(fabric, flows).pieces))


def test_the_textbook_example_of_fair_rates() -> None:
    # Three links of rates 1, 1 and 2: one flow over the first two, one over each of them, two on the last.
    links = np.array([[1, 2, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0], [3, 0, 0, 0]])
    rates = fair_rates(links, np.array([np.inf, 1.0, 1.0, 2.0]))
    assert rates.tolist() == [0.5, 0.5, 0.5, 1.5]


def test_a_piece_that_ends_leaves_its_rate_to_the_others() -> None:
    fabric = multi_plane(hosts=3, rates=[1.0])
    flows = (Flow(0, 1, 100), Flow(0, 2, 300))
    found = simulate(fabric, flows, [Piece(0, 0, 0, 100), Piece(1, 0, 0, 300)])
    assert found.flows == pytest.approx((200.0, 400.0))


def test_a_tolerance_moves_no_end_by_more_than_a_few_of_it() -> None:
    flows = ring_all_reduce(placed_at_random(3), RANKS * BYTES)[0]
    pieces = ecmp(PAPER, flows, 3, 8)
    exact, rough = (simulate(PAPER, flows, pieces, tolerance=tolerance) for tolerance in (1e-9, 0.005))
    assert rough.flows != exact.flows
    assert rough.flows == pytest.approx(exact.flows, rel=4 * 0.005)


def test_a_plan_takes_the_time_that_its_certificate_says() -> None:
    for flows in (ring_all_reduce(placed_at_random(1), RANKS * BYTES)[0], halving_doubling_all_reduce(RANKS, BYTES)[5]):
        plan = plan_step(PAPER, flows)
        assert ours(PAPER, flows) == pytest.approx(plan.certificate.load_s)


def test_the_finding_that_a_healthy_ring_gains_nothing() -> None:
    """Interfaces as quick as links, one flow a leaf: whatever places it, it has the interface's rate."""
    fabric = leaf_spine(leaves=16, spines=16, hosts=16, rate=1.0, nic=1.0)
    flows = ring_all_reduce(range(RANKS), RANKS * BYTES)[0]
    times = [seconds(fabric, flows, pieces) for pieces in (ecmp(fabric, flows, 0), spraying(fabric, flows))]
    assert [*times, ours(fabric, flows)] == pytest.approx([BYTES] * 3)


@pytest.mark.parametrize(
    "flows",
    [ring_all_reduce(placed_at_random(2), RANKS * BYTES)[0], halving_doubling_all_reduce(RANKS, 128 * BYTES)[6]],
    ids=["ring placed at random", "halving-doubling"],
)
def test_the_finding_that_splitting_equals_spraying_and_hashing_is_far_off(flows: tuple[Flow, ...]) -> None:
    ideal = seconds(PAPER, flows, spraying(PAPER, flows))
    assert ours(PAPER, flows) == pytest.approx(ideal)
    assert seconds(PAPER, flows, ethereal(PAPER, flows)) == pytest.approx(ideal)
    once = mean(seconds(PAPER, flows, ecmp(PAPER, flows, seed)) for seed in SEEDS)
    four = mean(seconds(PAPER, flows, ecmp(PAPER, flows, seed, 4)) for seed in SEEDS)
    assert once > 3 * ideal
    assert 1.5 * ideal < four < once
    assert len(ethereal(PAPER, flows)) > 10 * len(plan_step(PAPER, flows).pieces)


def test_the_finding_that_it_holds_under_a_failed_link() -> None:
    fabric = PAPER.with_rate(3, 5, 0.0)
    flows = halving_doubling_all_reduce(RANKS, 128 * BYTES)[6]
    assert ours(fabric, flows) <= 1.05 * seconds(fabric, flows, spraying(fabric, flows))
    assert ours(fabric, flows) < mean(seconds(fabric, flows, ecmp(fabric, flows, seed, 4)) for seed in SEEDS)


def test_a_slow_link_holds_up_spraying_but_not_us() -> None:
    fabric = PAPER.with_rate(3, 5, 0.25)
    flows = halving_doubling_all_reduce(RANKS, 128 * BYTES)[6]
    assert seconds(fabric, flows, spraying(fabric, flows)) > 2.5 * ours(fabric, flows)


def test_rules_of_others_are_whole_placements_too() -> None:
    flows = halving_doubling_all_reduce(RANKS, 128 * BYTES)[6]
    for pieces in (ecmp(PAPER, flows, 1, 4), spraying(PAPER, flows), ethereal(PAPER, flows)):
        certify(PAPER, flows, pieces)
