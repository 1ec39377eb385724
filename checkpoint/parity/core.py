"""What one node decides about parity: what it tells whom, when it encodes its row, when a snapshot is whole. No I/O.

Every call returns what is to be done (`Action`), in order. A snapshot:

    OPEN ──all rows are known to be done──► WHOLE ──the shell needs it no more──► GONE
      └─────────────a failure────────────► FAILED

- *Images*: each member tells all others what it sealed. Who knows of all members' images knows the stripe.
- *Rows*: member r then encodes row r (`StartRow`), and tells all others when its parity is kept. A row that fails is
  tried again after a pause that grows: slowness is back-pressure.
- *Whole*: who knows that all n rows are done knows that any m members may be lost (`Arrived`).
- *Restarts*: an agent that starts again has lost its images, so what was not whole fails. Who a peer is (its agent's
  id) is believed from its answers to our own questions only, since those cannot come late. A row counts only if it was
  encoded from the images of the very agents that this node knows of.
- *Telling*: one message at a time to each peer, made of all that it has not confirmed; nothing is sent when nothing is
  new. While a snapshot is open, peers are asked now and then whether they are still the same.

Values are in `actions.py`, `snapshot.py` and `facts.py`, places of blocks in `layout.py`; `service.py` does it all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.parity.actions import Action, Arrived, Expect, Failed, Free, Send, StartRow, StopRow
from resilient.checkpoint.parity.facts import DIGEST_CHARS, Done, Json, Sealed
from resilient.checkpoint.parity.layout import Key, layout_of
from resilient.checkpoint.parity.snapshot import FIRST_PAUSE_S, LONGEST_PAUSE_S, Images, Snapshot, State, stripe_of
from resilient.errors import LevelFailed, UsageError

HELD = 64  # snapshots remembered at most, besides those that are whole
REFRESH_S = 1.0
_MESSAGE_CHARS = 4 << 20  # a message may be that long, and one fact more
_PIECES_KEPT = 256

FactId = tuple[str, str, int]
"""(kind, life, step), or ("pieces", digest, 0)."""


@dataclass(slots=True, kw_only=True)
class _Peer:
    """`sending` are the facts that are on their way. `unsure`: it has to be asked who it is.

    `guessed`: it told so itself, after the question was asked whose answer is awaited.
    """

    agent: str | None = None
    unsure: bool = True
    sending: tuple[FactId, ...] | None = None
    wants: set[str] = field(default_factory=set)
    quiet_until: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    answered_at: float = 0.0
    guessed: bool = False


class Core:
    """One node's part in its group. Not thread-safe. `agent` is new whenever the node's agent starts."""

    def __init__(self, node: str, agent: str, block_bytes: int) -> None:
        self.node = node
        self.agent = agent
        self.group: tuple[str, ...] = ()
        self.m = 0
        self.pieces: dict[str, str] = {}
        self._block_bytes = block_bytes
        self._peers: dict[str, _Peer] = {}
        self._held: dict[Key, Snapshot] = {}
        self._running: Key | None = None
        self._now = 0.0

    # --- what the shell asks

    def get(self, key: Key) -> Snapshot | None:
        return self._held.get(key)

    def snapshots(self) -> list[Snapshot]:
        return list(self._held.values())

    def peers(self) -> dict[str, str | None]:
        """The id of each peer's agent, as far as it is known."""
        return {name: peer.agent for name, peer in self._peers.items()}

    @property
    def is_busy(self) -> bool:
        """Whether `tick` has anything to do: something is open, or has not reached a peer."""
        if any(each.state is State.OPEN and each.images for each in self._held.values()):
            return True
        return any(peer.unsure or self._untold(name) for name, peer in self._peers.items())

    # --- what the shell tells

    def configure(self, group: Sequence[str], m: int) -> list[Action]:
        """The members of the group, this node among them, in an order that is the same on all. Empty: no parity.

        What is open in another group fails; what is whole stays. Raises UsageError for a group that cannot be.
        """
        names = tuple(group)
        if names and (self.node not in names or len(set(names)) != len(names) or not 1 <= m < len(names)):
            raise UsageError(f"node {self.node} cannot be in a group of {names} with {m} parities")
        if (names, m) == (self.group, self.m):
            for peer in self._peers.values():
                peer.unsure = True  # the job has begun anew: some may have started again
            return self._go_on()
        actions: list[Action] = []
        for snapshot in self._open():
            actions += self._fail(snapshot, "the parity group has changed")
        self.group, self.m = names, m
        self._peers = {name: self._peers.get(name, _Peer()) for name in names if name != self.node}
        return actions + self._go_on()

    def sealed(
        self, life: str, step: int, world_size: int, images: Iterable[Sealed], pieces: Mapping[str, str]
    ) -> list[Action]:
        """All images of this node's ranks are sealed; `pieces` has the text of their pieces, by digest."""
        snapshot = self._held.get((life, step))
        if snapshot is None:
            snapshot = self._begin((life, step))
        if not self.group and snapshot.state is State.OPEN:
            snapshot.state, snapshot.reason = State.FAILED, "this node is in no parity group"
        if snapshot.state is not State.OPEN:
            return [Failed(snapshot.key, snapshot.reason or "it was given up before")]
        self.pieces |= pieces
        mine = Images(agent=self.agent, world_size=world_size, by_rank={one.rank: one for one in images})
        return self._take_images(snapshot, self.node, mine) + self._go_on()

    def row_done(self, key: Key, digests: Sequence[str]) -> list[Action]:
        """All parity of this node's row is kept where it belongs."""
        if self._running == key:
            self._running = None
        snapshot = self._held.get(key)
        if snapshot is None or snapshot.state is not State.OPEN or snapshot.stripe is None:
            return self._go_on()
        row = snapshot.group.index(self.node)
        done = Done(row=row, agents=snapshot.agents, digests=tuple(digests))
        return self._take_done(snapshot, done) + self._go_on()

    def row_failed(self, key: Key, reason: str, *, final: bool = False) -> list[Action]:
        """This node's row could not be encoded; it is tried again unless that would end the same way."""
        if self._running == key:
            self._running = None
        snapshot = self._held.get(key)
        if snapshot is None or snapshot.state is not State.OPEN:
            return self._go_on()
        if final:
            return self._fail(snapshot, reason) + self._go_on()
        snapshot.started = False
        snapshot.retry_at = self._now + snapshot.pause_s
        snapshot.pause_s = min(2 * snapshot.pause_s, LONGEST_PAUSE_S)
        for peer in self._peers.values():
            peer.unsure = True  # one of them may have started again
        return self._go_on()

    def refuse(self, key: Key, reason: str) -> list[Action]:
        """This node cannot do its part in a snapshot."""
        snapshot = self._held.get(key)
        if snapshot is None or snapshot.state is not State.OPEN:
            return []
        return self._fail(snapshot, reason) + self._go_on()

    def dropped(self, life: str, step: int) -> list[Action]:
        """This node's images are gone, or will never be: the others need not wait. What is whole stays."""
        snapshot = self._held.get((life, step)) or self._begin((life, step))
        if snapshot.state is not State.OPEN:
            return []
        reason = f"node {self.node} does not have step {step} any more"
        return [one for one in self._fail(snapshot, reason) if not isinstance(one, Failed)] + self._go_on()

    def keep(self, needed: Iterable[Key]) -> list[Action]:
        """The snapshots whose parity must stay. What is open is not concerned."""
        kept = set(needed)
        actions: list[Action] = []
        for snapshot in self._held.values():
            if snapshot.state is State.WHOLE and snapshot.key not in kept:
                snapshot.state = State.GONE
                _clear(snapshot)
                actions.append(Free(snapshot.key))
        return actions

    def tick(self, now: float) -> list[Action]:
        """Time has come to `now`, of a clock that may jump: whatever waited for it is tried again."""
        self._now = now
        if any(snapshot.state is State.OPEN and self.node in snapshot.images for snapshot in self._held.values()):
            for peer in self._peers.values():
                peer.unsure = peer.unsure or self._is_over(peer.answered_at + REFRESH_S)
        return self._go_on()

    # --- what the peers tell

    def heard(self, peer: str, message: Mapping[str, Any]) -> tuple[Json, list[Action]]:
        """A peer tells facts. The answer says whether they were taken, and who answers. Raises LevelFailed."""
        try:
            agent, group, facts = str(message["agent"]), (tuple(message["group"]), message["m"]), list(message["facts"])
        except (KeyError, TypeError) as error:
            raise LevelFailed(f"node {peer} told node {self.node} what is no message: {error!r}") from error
        known = self._peers.get(peer)
        if known is None or group != (self.group, self.m):
            return self._answer(f"node {self.node} does not know that it is in a group with node {peer}"), []
        if known.agent is None:
            known.agent, known.guessed = agent, known.sending is not None
        if known.agent != agent:
            known.unsure, known.quiet_until = True, self._now
            return self._answer(f"node {self.node} does not know yet that node {peer} has a new agent"), self._go_on()
        known.quiet_until, known.pause_s = self._now, FIRST_PAUSE_S  # it is there
        actions: list[Action] = []
        wants: set[str] = set()
        try:
            for fact in facts:
                actions += self._take_fact(peer, agent, fact, wants)
        except (LookupError, TypeError, ValueError) as error:
            raise LevelFailed(f"node {peer} told node {self.node} what is no fact: {error!r}") from error
        return {**self._answer(""), "wants": sorted(wants)}, actions + self._go_on()

    def answered(self, peer: str, answer: Mapping[str, Any]) -> list[Action]:
        """The answer to the last `Send` to this peer."""
        known = self._peers.get(peer)
        if known is None:
            return []
        told, known.sending = known.sending or (), None
        known.answered_at = self._now
        actions: list[Action] = []
        guessed, known.guessed = known.guessed, False
        if known.agent != (agent := str(answer.get("agent", ""))):
            told = ()
            if guessed:  # one of them is the older, and only another answer tells which
                known.unsure = True
            else:
                actions += self._is_new(peer, known, agent)
        if not answer.get("ok"):
            self._pause(known)
            return actions + self._go_on()
        known.pause_s = FIRST_PAUSE_S
        for kind, life, step in told:
            if kind == "pieces":
                known.wants.discard(life)
            elif snapshot := self._held.get((life, step)):
                snapshot.confirmed.setdefault(peer, set()).add(kind)
        if told:
            known.wants |= {str(want) for want in answer.get("wants", ())} & self.pieces.keys()
        return actions + self._go_on()

    def unanswered(self, peer: str) -> list[Action]:
        """The last `Send` to this peer failed, and is to be repeated after a pause."""
        if (known := self._peers.get(peer)) is not None:
            known.sending, known.guessed = None, False
            known.unsure = True
            self._pause(known)
        return []

    # --- inside: facts

    def _take_fact(self, peer: str, agent: str, fact: Mapping[str, Any], wants: set[str]) -> list[Action]:
        kind = fact["kind"]
        if kind == "pieces":
            self.pieces[str(fact["digest"])] = str(fact["text"])
            return [action for snapshot in self._open() for action in self._form(snapshot)]
        key = str(fact["life"]), int(fact["step"])
        snapshot = self._held.get(key) or self._begin(key)
        if snapshot.state is not State.OPEN:
            return []
        if kind == "images":
            images = [Sealed.from_json(raw) for raw in fact["images"]]
            wants |= {one.pieces for one in images} - self.pieces.keys()
            by_rank = {one.rank: one for one in images}
            taken = Images(agent=agent, world_size=int(fact["world_size"]), by_rank=by_rank)
            return self._take_images(snapshot, peer, taken)
        if kind == "done":
            done = Done.from_json(fact)
            return self._take_done(snapshot, done) if snapshot.group[done.row] == peer else []
        if kind == "failed":
            snapshot.confirmed.setdefault(peer, set()).add("failed")
            return self._fail(snapshot, str(fact["reason"]))
        raise ValueError(f"a fact of kind {kind!r}")

    def _take_images(self, snapshot: Snapshot, member: str, images: Images) -> list[Action]:
        known = snapshot.images.get(member)
        if known is not None and known != images:
            return self._fail(snapshot, f"node {member} has sealed step {snapshot.key[1]} twice")
        snapshot.images[member] = images
        return self._form(snapshot)

    def _form(self, snapshot: Snapshot) -> list[Action]:
        """Make the stripe as soon as all images are known with all that belongs to their records."""
        if snapshot.stripe is not None or snapshot.images.keys() != set(snapshot.group):
            return []
        if any(one.pieces not in self.pieces for one in snapshot.sealed().values()):
            return []
        members = [snapshot.images[node] for node in snapshot.group]
        try:
            stripe = stripe_of(snapshot, members, self._block_bytes)
        except UsageError as error:
            return self._fail(snapshot, f"the images do not fit together: {error}")
        snapshot.stripe, snapshot.agents = stripe, tuple(images.agent for images in members)
        actions: list[Action] = [Expect(stripe)]
        for done in list(snapshot.done.values()):
            if snapshot.state is State.OPEN:
                actions += self._take_done(snapshot, done)
        return actions

    def _take_done(self, snapshot: Snapshot, done: Done) -> list[Action]:
        snapshot.done[done.row] = done
        if snapshot.stripe is None:
            return []
        if done.agents != snapshot.agents:
            return self._fail(snapshot, f"an agent of the group started again while row {done.row} was encoded")
        chars = DIGEST_CHARS * layout_of(snapshot.stripe).blocks(done.row)
        if [len(text) for text in done.digests] != [chars] * snapshot.m:
            return self._fail(snapshot, f"the digests of row {done.row} do not fit its size")
        if len(snapshot.done) < len(snapshot.group):
            return []
        snapshot.state = State.WHOLE
        return [Arrived(snapshot.key)]

    def _is_new(self, name: str, peer: _Peer, agent: str) -> list[Action]:
        """The peer answers as another agent than before: what it held is lost."""
        was_known, peer.agent = peer.agent is not None, agent
        peer.wants.clear()
        actions: list[Action] = []
        for snapshot in list(self._held.values()):
            if snapshot.state is State.OPEN:
                images = snapshot.images.get(name)
                if images is not None and images.agent != agent:
                    actions += self._fail(snapshot, f"the agent of node {name} has started again")
                snapshot.confirmed.pop(name, None)
            elif was_known:  # nothing of this has a meaning for the new one
                snapshot.confirmed[name] = {"images", "done", "failed"}
        return actions

    def _fail(self, snapshot: Snapshot, reason: str) -> list[Action]:
        if snapshot.state is not State.OPEN:
            return []
        snapshot.state, snapshot.reason = State.FAILED, reason
        actions: list[Action] = []
        if self._running == snapshot.key:
            self._running = None
            actions.append(StopRow(snapshot.key))
        if snapshot.stripe is not None:
            actions.append(Free(snapshot.key))
        _clear(snapshot)
        return [*actions, Failed(snapshot.key, reason)]

    # --- inside: what to do next

    def _go_on(self) -> list[Action]:
        """Whatever can be begun now: a row, and a message to each peer."""
        actions = self._start_row()
        for name, peer in self._peers.items():
            if peer.sending is None and self._is_over(peer.quiet_until):
                untold = self._untold(name)
                if untold or peer.unsure:
                    actions.append(self._send(name, peer, untold))
        return actions

    def _start_row(self) -> list[Action]:
        if self._running is not None:
            return []
        for snapshot in self._open():
            if snapshot.stripe is not None and not snapshot.started and self._is_over(snapshot.retry_at):
                row = snapshot.group.index(self.node)
                if row in snapshot.done:
                    continue
                snapshot.started, self._running = True, snapshot.key
                return [StartRow(snapshot.stripe, row, snapshot.sealed())]
        return []

    def _untold(self, name: str) -> list[FactId]:
        """What a peer has not confirmed, in the order in which it is told."""
        found: list[FactId] = [("pieces", want, 0) for want in self._peers[name].wants if want in self.pieces]
        for snapshot in self._held.values():
            if snapshot.group is not self.group or snapshot.m != self.m:
                continue
            confirmed = snapshot.confirmed.get(name, ())
            found += [(kind, *snapshot.key) for kind in self._kinds(snapshot) if kind not in confirmed]
        return found

    def _kinds(self, snapshot: Snapshot) -> tuple[str, ...]:
        """What there is to tell of a snapshot."""
        if snapshot.state is State.FAILED:
            return ("failed",)
        if self.node not in snapshot.images:
            return ()
        return ("images", "done") if snapshot.group.index(self.node) in snapshot.done else ("images",)

    def _fact(self, fact_id: FactId) -> Json:
        kind, life, step = fact_id
        if kind == "pieces":
            return {"kind": kind, "digest": life, "text": self.pieces[life]}
        snapshot = self._held[life, step]
        fact: Json = {"kind": kind, "life": life, "step": step}
        if kind == "failed":
            return {**fact, "reason": snapshot.reason}
        if kind == "done":
            return {**fact, **snapshot.done[snapshot.group.index(self.node)].to_json()}
        mine = snapshot.images[self.node]
        return {**fact, "world_size": mine.world_size, "images": [one.to_json() for one in mine.by_rank.values()]}

    def _send(self, name: str, peer: _Peer, untold: Sequence[FactId]) -> Send:
        facts: list[Json] = []
        chars = 0
        for fact_id in untold:
            if chars > _MESSAGE_CHARS:
                break
            facts.append(self._fact(fact_id))
            chars += _chars(facts[-1])
        peer.sending, peer.unsure = tuple(untold[: len(facts)]), False
        message = {"op": "parity", "agent": self.agent, "group": list(self.group), "m": self.m, "facts": facts}
        return Send(name, message)

    def _answer(self, refusal: str) -> Json:
        return {"agent": self.agent, "ok": not refusal, "reason": refusal}

    def _is_over(self, until: float) -> bool:
        """Whether a pause is over; one that is longer than any was begun before the clock was set back."""
        return not self._now < until <= self._now + LONGEST_PAUSE_S

    def _pause(self, peer: _Peer) -> None:
        peer.quiet_until = self._now + peer.pause_s
        peer.pause_s = min(2 * peer.pause_s, LONGEST_PAUSE_S)

    # --- inside: what is held

    def _open(self) -> list[Snapshot]:
        """The snapshots that this node works on, in the order of their lives and steps."""
        return sorted((each for each in self._held.values() if each.state is State.OPEN), key=lambda each: each.key)

    def _begin(self, key: Key) -> Snapshot:
        self._forget()
        snapshot = Snapshot(key=key, group=self.group, m=self.m)
        self._held[key] = snapshot
        return snapshot

    def _forget(self) -> None:
        """Keep what is remembered within bounds: the settled go first, then what others tell of and we never had."""
        for states in ((State.GONE, State.FAILED), (State.OPEN,)):
            for key, snapshot in list(self._held.items()):
                others = [each for each in self._held.values() if each.state is not State.WHOLE]
                if len(others) < HELD:
                    return
                if snapshot.state in states and (snapshot.state is not State.OPEN or self.node not in snapshot.images):
                    del self._held[key]
        if len(self.pieces) > _PIECES_KEPT:
            used = {one.pieces for each in self._held.values() for one in each.sealed().values()}
            self.pieces = {name: text for name, text in self.pieces.items() if name in used}


def _clear(snapshot: Snapshot) -> None:
    """What is settled for good needs no digests."""
    snapshot.images.clear()
    snapshot.done.clear()


def _chars(fact: Mapping[str, Any]) -> int:
    """About how long a fact is as text."""
    texts = [fact.get("text", "")] + [raw["blocks"] for raw in fact.get("images", ())] + list(fact.get("digests", ()))
    return 1000 + sum(len(text) for text in texts)
