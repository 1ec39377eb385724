"""What `bench/processes.py` starts: calls one function and writes what it returns to a file.

    worker.py MODULE:FUNCTION ARGUMENTS-AS-JSON RESULT-FILE

It joins a gloo group, of one rank if it was not started by torchrun, because some peers need one. Peers that spawn
processes import this file again, so it does nothing at import.
"""

import importlib
import json
import os
import resource
import sys
from pathlib import Path


def main() -> None:
    import torch
    import torch.distributed as dist

    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # some peers open a file for each tensor
    target, arguments, result = sys.argv[1:]
    module, _, function = target.partition(":")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    measured = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    if dist.get_rank() == 0:
        Path(result).write_text(json.dumps(measured))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # after torch's own dcp.save the destructors of a group abort now and then


if __name__ == "__main__":
    main()
