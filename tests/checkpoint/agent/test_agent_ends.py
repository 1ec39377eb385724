"""The agent in a thread: its claim on the url, whom it refuses, and how it ends."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilient.checkpoint.agent.address import address_of
from resilient.checkpoint.levels.store import MemoryStore, Store
from resilient.checkpoint.names import complete_steps
from resilient.errors import AgentLost, LevelFailed, OverBudget, PolicyError, UrlInUse, UsageError
from resilient.policy import Policy
from tests.checkpoint.agent.conftest import DURABLE_URL, Served
from tests.checkpoint.agent.trainer import GatedStore, Trainer, both_saved, image_of
from tests.conformance.store_contract import get, put

SMALL = 1000

Eventually = Callable[..., None]


# --- the claim, the policy, the ends


def claim_in(store: Store) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(get(store, "claim.json"))
    return told


def test_rank_0_holds_a_claim_on_the_url_until_all_have_ended(served: Served, durable: MemoryStore) -> None:
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    assert "claim.json" in durable.list()
    trainer.client.close(keep=False)
    served.wait_ended()
    assert "claim.json" not in durable.list()


def test_a_url_that_cannot_be_claimed_fails_the_hello_of_rank_0(served: Served) -> None:
    served.stores[DURABLE_URL] = store = MemoryStore(DURABLE_URL)
    store.write("claim.json", [memoryview(b"something else")])
    served.start(url=DURABLE_URL)
    with pytest.raises(Exception, match="claim.json is no claim of this library"):
        Trainer(url=DURABLE_URL)
    store.delete(["claim.json"])
    assert Trainer(url=DURABLE_URL).client.status()["slots"] == []


def test_a_store_that_cannot_be_opened_fails_the_hello_of_rank_0(served: Served) -> None:
    served.start(url="memory://unknown")
    with pytest.raises(LevelFailed, match="could not be claimed: KeyError"):
        Trainer(url="memory://unknown")


def test_the_agent_ends_when_all_ranks_close_and_want_nothing_kept(served: Served, eventually: Eventually) -> None:
    agent = served.start()
    first, second = Trainer(0, 2), Trainer(1, 2)
    for each in (first, second):
        each.plan(SMALL)
    first.client.close(keep=False)
    assert second.client.status()["pid"]
    second.client.close(keep=False)
    served.wait_ended()
    assert not agent.address.folder.exists()


def test_the_agent_stays_when_one_rank_wants_its_images_kept(served: Served) -> None:
    served.start()
    first, second = both_saved(SMALL)
    first.wait_for("complete", 1)
    first.client.close(keep=False)
    second.client.close(keep=True)
    assert Trainer(0, 2).image(1, 1) == image_of(1, 1, SMALL)


def test_pending_writes_are_finished_before_the_agent_ends(served: Served) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = durable = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    trainer.save(1, levels=["durable"], size=SMALL)
    trainer.wait_for("sealed", 1)
    trainer.client.close(keep=False)
    gate.set()
    served.wait_ended()
    assert complete_steps(durable.list()) == {1: 1}


def test_an_idle_agent_ends_when_its_time_is_over_and_not_before(served: Served, eventually: Eventually) -> None:
    agent = served.start()
    trainer = Trainer(policy=Policy(agent_idle_s=100))
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    served.clock.now += 1000
    for _ in range(3):
        trainer.client.status()
    trainer.vanish()
    served.clock.now += 50
    again = Trainer(policy=Policy(agent_idle_s=100))
    assert again.image(0, 1) == image_of(0, 1, SMALL)
    again.vanish()
    eventually(lambda: not agent._node.by_rank, "the agent notices that the trainer is gone; its time counts from then")
    served.clock.now += 101
    served.wait_ended()
    assert not agent.address.folder.exists()


def test_a_client_that_was_closed_says_so(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    trainer.client.close(keep=True)
    trainer.client.close(keep=True)
    with pytest.raises(AgentLost, match="was closed"):
        trainer.client.take_free_slot(1)
    with pytest.raises(AgentLost, match="was closed"):
        trainer.client.images()
    assert trainer.lost == [], "it is not lost, it was closed"


def test_a_mistake_in_the_handler_of_an_event_does_not_end_the_listening_thread(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL)
    del trainer.events
    trainer.save(1, size=SMALL)
    trainer.client.flush(20)
    assert trainer.client.status()["images"] == 1
    assert "handling the event" in caplog.text


def test_an_impossible_hello_is_refused_with_the_reason(served: Served) -> None:
    served.start()
    with pytest.raises(UsageError, match="rank 3 of 2 does not fit"):
        Trainer(3, 2)
    with pytest.raises(PolicyError):
        Policy(retries=0)


def test_the_address_is_the_same_for_all_ranks_and_differs_by_run_url_and_node(runtime_dir: Path) -> None:
    addresses = {
        address_of("run", None, "a").folder,
        address_of("run", "s3://b", "a").folder,
        address_of("run", None, "b").folder,
        address_of("other", None, "a").folder,
    }
    assert len(addresses) == 4
    assert address_of("run", None, "a") == address_of("run", None, "a")


def test_a_claim_that_another_job_took_stops_the_writes_until_rank_0_has_it_again(served: Served) -> None:
    """The claim is beaten every ten seconds of real time, so its loss is brought about on the agent's own loop."""
    served.stores[DURABLE_URL] = MemoryStore(DURABLE_URL)
    agent = served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL)
    trainer.plan(SMALL)
    keeper = agent._node.tenure.keeper
    assert keeper is not None
    agent._loop.post(lambda: agent._node.tenure.lose(keeper, UrlInUse("run 'other' took it over")))
    trainer.client.status()
    trainer.save(1, levels=["durable"], size=SMALL)
    assert "run 'other' took it over" in trainer.wait_for("failed", 1, "durable")["error"]
    trainer.vanish()
    again = Trainer(url=DURABLE_URL)
    again.plan(SMALL)
    again.save(2, levels=["durable"], size=SMALL)
    again.wait_for("complete", 2, "durable")


def test_a_claim_says_at_once_that_rank_0_has_left_or_come_back(served: Served, eventually: Eventually) -> None:
    gate = threading.Event()
    served.stores[DURABLE_URL] = store = GatedStore(gate, DURABLE_URL)
    served.start(url=DURABLE_URL)
    trainers = [Trainer(rank, 2, url=DURABLE_URL) for rank in range(2)]
    trainers[0].plan(SMALL)
    trainers[0].save(1, levels=["durable"], size=SMALL)
    eventually(lambda: store.begun == 1, "the image is being written")
    assert claim_in(store)["rank_0"]
    trainers[0].vanish()  # the image is still being written, so the url is not given back
    eventually(lambda: not claim_in(store)["rank_0"], "the claim says that rank 0 has left", 5)
    again = Trainer(0, 2, url=DURABLE_URL)
    eventually(lambda: claim_in(store)["rank_0"], "the claim says that rank 0 is back", 5)
    gate.set()
    again.vanish()


def test_a_node_that_rank_0_has_moved_away_from_goes_on_writing(served: Served, eventually: Eventually) -> None:
    """The job came back with rank 0 elsewhere: its agent there has the claim, and this one hears of it at a beat."""
    served.stores[DURABLE_URL] = store = MemoryStore(DURABLE_URL)
    agent = served.start(url=DURABLE_URL)
    before = Trainer(0, 2, url=DURABLE_URL)
    stays = Trainer(1, 2, url=DURABLE_URL)
    put(store, "claim.json", json.dumps({**claim_in(store), "token": "of another agent"}).encode())
    before.vanish()
    eventually(lambda: agent._node.tenure.keeper is None, "the claim is let go")
    stays.plan(SMALL)
    stays.save(1, levels=["durable"], size=SMALL)
    eventually(lambda: any(name.endswith("rank_00001-of-00002.json") for name in store.list()), "rank 1 has written")


def test_who_only_reads_claims_nothing_and_does_not_keep_the_agent_for_longer(
    served: Served, durable: MemoryStore, eventually: Eventually
) -> None:
    agent = served.start(url=DURABLE_URL)
    trainer = Trainer(url=DURABLE_URL, policy=Policy(agent_idle_s=30))
    trainer.plan(SMALL)
    trainer.save(1, size=SMALL)
    trainer.wait_for("complete", 1)
    trainer.vanish()
    eventually(lambda: "claim.json" not in durable.list(), "the url is given back")
    reader = Trainer(url=DURABLE_URL, policy=Policy(agent_idle_s=600), reads=True)
    assert reader.image(0, 1) == image_of(0, 1, SMALL)
    assert "claim.json" not in durable.list()
    reader.vanish()
    eventually(lambda: not agent._node.by_rank, "the reader is gone")
    served.clock.now += 31
    served.wait_ended()


def test_a_claim_that_was_given_back_cannot_be_lost_for_the_one_that_followed(served: Served) -> None:
    """A beat that is under way while the url is given back may find the agent's own next claim there."""
    served.stores[DURABLE_URL] = MemoryStore(DURABLE_URL)
    agent = served.start(url=DURABLE_URL)
    first = Trainer(url=DURABLE_URL)
    former = agent._node.tenure.keeper
    assert former is not None
    first.vanish()
    again = Trainer(url=DURABLE_URL)
    assert agent._node.tenure.keeper is not former
    agent._loop.post(lambda: agent._node.tenure.lose(former, UrlInUse("this run took it over")))
    again.plan(SMALL)
    again.save(1, levels=["durable"], size=SMALL)
    again.wait_for("complete", 1, "durable")


def test_a_scratch_slot_that_no_plan_holds_is_given_back_when_it_is_released(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(SMALL, slots=1)
    before = trainer.client.status()["bytes"]
    slot = trainer.client.scratch(50_000, budget_bytes=100_000)
    assert trainer.client.status()["bytes"] > before
    trainer.client.release(slot.id)
    assert trainer.client.status()["bytes"] == before


def test_after_a_plan_was_refused_for_want_of_room_no_slot_of_the_old_one_is_given_out(served: Served) -> None:
    served.start()
    trainer = Trainer()
    trainer.plan(100_000)
    trainer.save(1, size=100_000)
    trainer.wait_for("complete", 1)
    with pytest.raises(OverBudget, match="older images that are still needed take"):
        trainer.plan(150_000, slots=1, budget=200_000)
    assert trainer.client.take_free_slot(0) is None
    assert trainer.image(0, 1) == image_of(0, 1, 100_000)
