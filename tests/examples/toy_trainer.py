"""The trainer of the launcher's tests: all ranks make small steps together until a file called `stop` appears.

Rank 0 notes each step in `steps`, with the life and the nodes of all ranks. Fails where ranks disagree about the life.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

STEP_S = 0.02  # a stand-in for work, so that a machine of two cores has time for the launcher


def main(folder: Path) -> None:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    everyone: list[tuple[int, str]] = [(-1, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (life, os.environ["RESILIENT_NODE"]))
    if len({number for number, _ in everyone}) != 1:
        raise RuntimeError(f"the ranks are in different lives: {everyone}")
    goes_on = torch.ones(1)
    while goes_on.item():
        time.sleep(STEP_S)
        goes_on.fill_(not (folder / "stop").exists())
        dist.broadcast(goes_on, src=0)
        if dist.get_rank() == 0:
            with (folder / "steps").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"life": life, "nodes": [node for _, node in everyone]}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
