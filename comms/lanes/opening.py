"""Opens a rank's lanes: listens, meets the other ranks through the store, and starts the thread."""

from resilient.comms.fabric import Fabric
from resilient.comms.lanes.engine import Lanes
from resilient.comms.lanes.meeting import Store, listen, meet
from resilient.comms.lanes.status import StatusFile
from resilient.comms.lanes.wiring import Wiring
from resilient.errors import UsageError


def open_lanes(
    store: Store,
    rank: int,
    size: int,
    *,
    name: str,
    host: str,
    fabric: Fabric,
    wiring: Wiring,
    timeout_s: float,
    status: str = "",
) -> Lanes:
    """Meet the other ranks and start. `fabric`: what is known before anything was measured; its leaves are the ranks'.
    `status`: a folder for what `resilient net watch` shows.

    Blocks until all ranks are there. Raises UsageError, on all alike, where they do not fit together or one of them
    cannot listen at an address.
    """
    if len(fabric.leaf_of) != size or fabric.paths != wiring.paths:
        raise UsageError(
            f"the fabric has {len(fabric.leaf_of)} ranks and {fabric.paths} paths; "
            f"the group has {size}, and rank {rank} is wired to {wiring.paths}"
        )
    listening, problem = [], ""
    try:
        listening = listen(wiring.addresses)
        status_file = StatusFile(status, name)
    except OSError as error:
        problem = str(error)
    try:
        leaf = fabric.leaf_of[rank]
        meeting = meet(
            store,
            rank,
            size,
            name=name,
            host=host,
            leaf=leaf,
            wiring=wiring,
            listening=listening,
            problem=problem,
        )
    except BaseException:
        for sock in listening:
            sock.close()
        raise
    return Lanes(meeting, wiring, fabric, store, listening, timeout_s, status_file)
