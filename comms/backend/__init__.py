"""Collectives over several paths for `torch.distributed`. Importing this registers the backend "resilient".

import resilient.comms.backend
dist.init_process_group("resilient")        # with RESILIENT_TOPOLOGY, see docs/collectives.md

options   what the user wants, and whether lanes pay at all: pure
opening   ranks agree on it and open lanes
striped   tensors over lanes, without torch.distributed: `Striped`
worker    the thread that carries collectives out, and the handle that callers wait on
group     the process group
hooks     the same for a DDP model or FSDP2 modules whose group is another: `stripe`
"""

from resilient.comms.backend.group import register
from resilient.comms.backend.hooks import AllGather, ReduceScatter, all_reduce_hook, stripe
from resilient.comms.backend.striped import Striped

__all__ = ["AllGather", "ReduceScatter", "Striped", "all_reduce_hook", "register", "stripe"]

register()
