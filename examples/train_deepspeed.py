"""A job of DeepSpeed with a snapshot at every step: kill it, start it again, and it goes on where it was.

torchrun --standalone --nproc-per-node 2 examples/train_deepspeed.py FOLDER [ZERO STAGE] [STEPS]

What makes it resilient is one block of the configuration and one call. docs/deepspeed.md says the rest.
"""

import os
import sys
from typing import Any

import deepspeed
import deepspeed.ops
import torch

from resilient.launch.deepspeed import attach


def main(folder: str, stage: int = 2, steps: int = 200) -> None:
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles this for a minute, unused
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))
    # torchrun --standalone gives each start an id of its own: the run needs one that stays, to find its memory again.
    policy = {"durable_every": 100, "run_id": f"example-{os.path.basename(folder)}"}
    config = {
        "train_micro_batch_size_per_gpu": 32,
        "steps_per_print": 1 << 30,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "resilient": {"url": f"{folder}/snapshots", "every_step": True, "policy": policy},
    }
    parameters: Any = model.parameters()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    attach(engine)
    engine.load_checkpoint(f"{folder}/checkpoints")
    print(f"rank {engine.global_rank}, process {os.getpid()}: after step {engine.global_steps}", flush=True)
    while engine.global_steps < steps:
        x = torch.randn(32, 64, device=engine.device, dtype=torch.bfloat16)
        loss = (engine(x) - x.sin().sum(1, keepdim=True)).float().square().mean()
        engine.backward(loss)
        engine.step()  # the snapshot is taken here, in the background
        if engine.global_rank == 0 and engine.global_steps % 10 == 0:
            print(f"step {engine.global_steps}: loss {loss.item():.3f}", flush=True)
    engine.save_checkpoint(f"{folder}/checkpoints", client_state={"finished": True})
    engine.destroy()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
