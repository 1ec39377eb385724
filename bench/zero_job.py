"""A job of DeepSpeed that leaves a checkpoint: torchrun bench/zero_job.py FOLDER STAGE WIDTH LAYERS"""

import os
import sys
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist


def main(folder: str, stage: int, width: int, layers: int) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles this for a minute
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
    config: dict[str, Any] = {
        "train_batch_size": 2 * dist.get_world_size(),
        "steps_per_print": 1000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
    }
    parameters: Any = model.parameters()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    loss = engine(torch.randn(2, width, dtype=torch.bfloat16)).float().square().mean()
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(folder)
    dist.barrier()
    os._exit(0)  # the destructors of a gloo group abort now and then


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
