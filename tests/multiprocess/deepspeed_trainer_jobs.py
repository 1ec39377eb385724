"""Hugging Face's Trainer and Accelerate with a DeepSpeed configuration that has our block."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.multiprocess.deepspeed_hook_jobs import block
from tests.multiprocess.deepspeed_jobs import prepare


def train(folder: str, steps: int, *, stage: int, die_at: int | None = None, resume: bool = False) -> Any:
    """A tiny GPT-2, with a checkpoint at every second step. Its weights at the end, and what was restored; or the
    process is killed in the step `die_at`."""
    prepare()
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_DEEPSPEED": "true"}
    from accelerate import PartialState
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    from resilient.launch.deepspeed import attach_when_prepared

    class Dying(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == die_at:
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

    PartialState(backend="gloo")  # by itself Accelerate knows no ranks of DeepSpeed on CPUs
    set_seed(1)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    rows = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(2)).tolist()
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
        **block(f"{folder}/run"),
    }
    arguments = TrainingArguments(
        output_dir=f"{folder}/out",
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        optim="adamw_torch",
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": True},
        seed=1,
        data_seed=1,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[Dying()],
    )
    attach_when_prepared(trainer.accelerator)
    trainer.train(resume_from_checkpoint=resume or None)
    accelerator: Any = trainer.accelerator
    engine = accelerator.deepspeed_engine_wrapped.engine
    hook = engine.resilient
    hook.close()
    restored = hook.checkpointer.last_restore
    weights = [flat.tolist() for flat in engine.optimizer.single_partition_of_fp32_groups] if stage < 3 else []
    found = {
        "rank": rank,
        "weights": weights,
        "step": trainer.state.global_step,
        "restored": None if restored is None else [restored.step, restored.levels[rank]],
        "latest": sorted(path.parent.name for path in Path(f"{folder}/out").glob("checkpoint-*/latest")),
    }
    engine.destroy()
    return found
