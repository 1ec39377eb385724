"""What the doctor is asked."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from resilient.policy import Policy, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`image_bytes`: of one rank's image; None where it is not known, and then nothing is compared with it."""

    url: str | None = None
    policy: Policy = field(default_factory=Policy)
    peers: tuple[str, ...] = ()
    image_bytes: int | None = None
    ranks_per_node: int = 1
    patience_s: float = 60.0
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = field(default_factory=socket.gethostname)

    @property
    def node_image_bytes(self) -> int | None:
        """Of one snapshot the part of this node."""
        return None if self.image_bytes is None else self.image_bytes * self.ranks_per_node

    def wanted_bytes(self) -> int | None:
        """The memory that this node's images and their parity take at most; None where nothing tells their size."""
        if self.policy.memory_budget is not None:
            return parse_bytes(self.policy.memory_budget) * self.ranks_per_node
        if self.image_bytes is None:
            return None
        k, m = self.policy.parity_sizes() or (1, 0)
        return self.policy.budget_bytes(self.image_bytes) * (k + m) // k * self.ranks_per_node
