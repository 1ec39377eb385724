"""Train a tiny GPT-2 with the Hugging Face Trainer, be killed, and go on where it was. Needs nothing from the network.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_huggingface.py --url /tmp/run --out out

Three lines protect it, marked as such. `--die-at-step` kills rank 0 in its first life; the losses in `<out>/losses.0`
and the weights in `<out>/model.pt` are those of an undisturbed run, bit for bit.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from resilient.launch.huggingface import ResilientCallback
from resilient.launch.joining import join_group
from resilient.policy import Policy

VOCABULARY, LENGTH = 64, 16


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Random, and the same each time."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Noted(Trainer):
    """Writes each loss to a file; dies in the middle of a step, where it is told to."""

    die_at_step: int | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        rank, step = self.args.process_index, self.state.global_step
        with Path(str(self.args.output_dir), f"losses.{rank}").open("a") as file:
            file.write(json.dumps([os.getpid(), step, loss.item()]) + "\n")
        if rank == 0 and step == self.die_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss


def make_trainer(out: str, callback: ResilientCallback, **options: Any) -> Noted:
    """A trainer of 36 steps on one rank, that has dropout, a schedule and a warm-up to remember."""
    set_seed(0)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=out, **(settings | options))
    size: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    return Noted(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences(), callbacks=[callback])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="where durable snapshots go")
    parser.add_argument("--out", required=True, help="folder for losses and weights")
    parser.add_argument("--die-at-step", type=int)
    parser.add_argument("--accumulate", type=int, default=1, help="batches to an optimizer step")
    options = parser.parse_args()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    join_group()  # 1: a restart by torchrun finds its peers
    callback = ResilientCallback(options.url, Policy(durable_every=20))  # 2
    trainer = make_trainer(options.out, callback, gradient_accumulation_steps=options.accumulate)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        trainer.die_at_step = options.die_at_step
    callback.train(trainer)  # 3: instead of trainer.train()
    if trainer.is_world_process_zero():
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        torch.save(model.state_dict(), Path(options.out, "model.pt"))


if __name__ == "__main__":
    main()
