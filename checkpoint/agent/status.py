"""What an agent holds and uses, for `resilient`'s commands, tests and logs."""

import os
import threading
from typing import TYPE_CHECKING

from resilient.checkpoint.agent.protocol import Message

if TYPE_CHECKING:
    from resilient.checkpoint.agent.node import Node


def status_of(node: "Node") -> Message:
    """What the operation `status` answers. On the loop."""
    return {
        "pid": os.getpid(),
        "slots": [
            {
                "slot": slot.id,
                "rank": slot.rank,
                "capacity": slot.capacity,
                "state": slot.state.value,
                "step": slot.snapshot.step if slot.snapshot else None,
                "pins": slot.pins,
                "readers": node.images.shelf.readers(slot.id),
            }
            for slot in node.images.slots.all()
        ],
        "bytes": node.images.total_bytes(),
        "images": len(node.images.slots.sealed_images()),
        "snapshots": len(node.snapshots),
        "jobs": dict(node.writing.pending_by_level()),
        "parity": node.protecting.status(),
        "threads": threading.active_count(),
        "fds": len(os.listdir("/proc/self/fd")),
        "resident_bytes": _resident_bytes(),
    }


def _resident_bytes() -> int:
    """Memory of this process alone, without the shared memory of the images."""
    with open("/proc/self/status") as file:
        anonymous = next(line for line in file if line.startswith("RssAnon:"))
    return int(anonymous.split()[1]) * 1024
