"""The job of `preemption.py`: URL OUT MIB STEP_S. A rank leaves when it called the agreed save and when it was safe."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import resilient

_WARM_STEPS = 5


def main() -> None:
    url, out, mib, step_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    weights = torch.nn.ParameterList([torch.randn(1 << 18) for _ in range(mib)])  # of 1 MiB each
    checkpointer = resilient.Checkpointer(url, state={"model": weights}, policy=resilient.Policy(durable_every=0))
    step = 0
    while True:
        step += 1
        time.sleep(step_s)
        checkpointer.fence()
        called_at = time.time()
        try:
            checkpointer.save(step)
        except resilient.Preempted:
            _leave(out / f"safe.{rank}", f"{called_at} {time.time()}")
            raise
        if step == _WARM_STEPS:
            _leave(out / f"steady.{rank}", "")


def _leave(path: Path, text: str) -> None:
    fresh = path.with_name(f"new.{path.name}")
    fresh.write_text(text)
    fresh.rename(path)


if __name__ == "__main__":
    main()
