"""How the agents of a job come to know one another: token, addresses and parity groups, agreed on by the ranks.

Once, when a Checkpointer is made, by all ranks together. What was agreed is kept, so that an agent that is started
anew can be told again (`Peering.introduce`). Which nodes protect one another is decided in `ec/groups.py`.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from resilient.checkpoint.agent.client import AgentClient
from resilient.checkpoint.peers.route import address_towards
from resilient.checkpoint.world import World
from resilient.ec.domains import Document, Domains, Host, decide_domains, host_of
from resilient.ec.groups import Grouping, decide_groups
from resilient.errors import LevelFailed
from resilient.policy import Policy, parse_bytes

_log = logging.getLogger("resilient")
_TOKEN = "RESILIENT_TOKEN"
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Peering:
    """What all agents of the job were told, and what this rank tells its own: only each node's first rank does.

    `sizes`: k and m of this node's group; `budget_bytes`: what the parity that it keeps may take; None: no limit.
    """

    token: str
    host: str
    node: str
    leads: bool
    members: tuple[tuple[str, str, int], ...]
    grouping: Grouping
    sizes: tuple[int, int]
    budget_bytes: int | None

    def introduce(self, client: AgentClient) -> None:
        """Tell this node's agent, perhaps a new one, whom it belongs to; it tells the others where it listens.

        Blocks. Raises LevelFailed where it cannot listen, AgentLost.
        """
        if self.leads:
            client.listen(self.node, self.token, self.host)
            groups = [group.members for group in self.grouping.groups]
            client.join(self.members, groups, self.sizes[1], self.budget_bytes)


def arrange_peering(
    world: World, policy: Policy, client: AgentClient, environment: Mapping[str, str]
) -> Peering | None:
    """Agree on who talks to whom; None where there is no parity: none is asked for, or there are too few nodes.

    Collective: whatever fails on one rank is raised on all. Raises LevelFailed, UsageError where an agent cannot listen
    at its address and for failure domains that make no sense.
    """
    sizes = policy.parity_sizes()
    if sizes is None:
        return None
    leads = world.rank == min(world.node_ranks)
    nodes = list(dict.fromkeys(world.nodes))
    leaders = [world.nodes.index(node) for node in nodes]
    domains = _agree_on_domains(world, leaders, policy, environment)
    grouping = decide_groups(domains.nodes, *sizes)
    if world.rank == 0:
        told = (policy.parity, grouping.reason, domains.reason)
        _log.log(logging.INFO if grouping.groups else logging.WARNING, "parity %s: %s (%s)", *told)
    if not grouping.groups:
        return None
    token = _agree_on_token(world, client, leads, environment)
    host = world.together(lambda: policy.peer_address or _own_address(environment), LevelFailed)
    addresses = world.gather_results(lambda: client.listen(world.node, token, host) if leads else None, LevelFailed)
    members = tuple((node, *addresses[at]) for node, at in zip(nodes, leaders, strict=True))
    mine = grouping.of(nodes.index(world.node))
    assert mine is not None, "every node is in a group"
    sizes, ranks = (mine.k, mine.m), max(world.nodes.count(nodes[member]) for member in mine.members)
    budget = parity_budget(policy, sizes, ranks)
    peering = Peering(token, host, world.node, leads, members, grouping, sizes, budget)
    world.together(lambda: peering.introduce(client), LevelFailed)
    return peering


def parity_budget(policy: Policy, sizes: tuple[int, int], ranks: int) -> int | None:
    """What of the memory budgets of `ranks` ranks, the most on a node of the group, is for parity; None: no limit."""
    if policy.memory_budget is None:
        return None
    return ranks * (parse_bytes(policy.memory_budget) - policy.budget_bytes(0, sizes))


def _agree_on_domains(world: World, leaders: Sequence[int], policy: Policy, environment: Mapping[str, str]) -> Domains:
    """The failure domains of the nodes, in the order of their first ranks. Rank 0 reads the file, if there is one."""
    hosts = world.gather(asdict(host_of(world.node, environment)))
    path = policy.failure_domains
    reads = path is not None and world.rank == 0
    text = world.gather_results(lambda: Path(str(path)).read_text("utf-8") if reads else None, LevelFailed)[0]
    file = Document(path, text) if path is not None else None
    return decide_domains([Host(**hosts[at]) for at in leaders], file=file)


def _agree_on_token(world: World, client: AgentClient, leads: bool, environment: Mapping[str, str]) -> str:
    """The launcher's token; else the one that agents of an earlier life have; else a new one, made by rank 0."""
    given = environment.get(_TOKEN)
    known = world.gather_results(lambda: given or (client.token() if leads else None), LevelFailed)
    fresh: str = world.gather(secrets.token_hex(32) if world.rank == 0 else None)[0]
    return next((token for token in known if token), fresh)


def _own_address(environment: Mapping[str, str]) -> str:
    """The address that this node reaches the job's master from; loopback where there is no master but this node."""
    master = environment.get("MASTER_ADDR", _LOOPBACK)
    try:
        return address_towards(master)
    except OSError as error:
        raise LevelFailed(
            f"no address of this node is known that others can reach ({master!r}: {error}); set peer_address"
        ) from error
