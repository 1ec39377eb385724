"""Train a small GPT, be killed, and end with the same bits: the job to copy from.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_gpt.py --url /tmp/run --steps 200

Runs on gloo, on GPUs where there are any, and as a single process without torchrun. Protection takes three lines,
marked as such in `train`; `--no-resilient` runs the same job without them. Everything is deterministic, so a job that
was killed (`--die-at-step`) and came back ends bit for bit where an undisturbed one does; `examples/demo.py` shows it.
Not a recipe for good models. Read `examples/quickstart.py` for less.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder, installed or not

import resilient
from examples.corpus import Sampler, load_tokens
from examples.gpt import GPT, SIZES, next_token_loss
from examples.steplog import Step, StepLog, digest_of_optimizer, digest_of_tensors, losses, write_whole
from resilient.launch.joining import join_group

LOSS_PATIENCE_S = 30.0
RENDEZVOUS_TIMEOUT_S = 60.0  # a group that cannot form fails and is restarted, rather than waiting half an hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process stands in the job. `life` counts the restarts by torchrun."""

    rank: int
    world_size: int
    local_rank: int
    life: int
    device: torch.device


class Unprotected:
    """What `--no-resilient` uses in place of a checkpointer: nothing is kept, nothing is restored."""

    last_restore = None

    def restore(self) -> int | None:
        return None

    def save(self, step: int) -> None:
        return None

    def close(self) -> None:
        return None


def train(arguments: argparse.Namespace, place: Place, log: StepLog) -> dict[str, Any]:
    """The job: build, restore, step until done. Returns what `--result` writes; collective, so every rank calls it."""
    torch.manual_seed(arguments.seed)
    config = SIZES[arguments.size]
    model = GPT(config).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.steps)
    sampler = Sampler(
        load_tokens(), context=config.context, batch=arguments.batch,
        rank=place.rank, world_size=place.world_size, seed=arguments.seed,
    )  # fmt: skip
    network = distributed(model, place)
    torch.manual_seed(arguments.seed + 1 + place.rank)  # each rank drops other units

    # The three lines, 1: say what a resume needs.
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": sampler}
    checkpointer = open_checkpointer(arguments, state)
    # The three lines, 2: go on where a former life stopped.
    start = checkpointer.restore() or 0

    for step in progress(start, arguments.steps, place, log):
        began = time.time()
        inputs, targets = sampler.next()
        loss = next_token_loss(network(inputs.to(place.device)), targets.to(place.device))
        loss.backward()
        if step == arguments.die_at_step and place.rank == arguments.die_rank and place.life == 0:
            die(log, step)
        if step == arguments.lose_at_step and place.rank == arguments.lose_rank:
            wait_to_be_lost(log, step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        called = time.time()
        # The three lines, 3: returns at once; the copy runs under the next forward and backward.
        checkpointer.save(step)
        ended = time.time()
        log.append(Step(step=step, life=place.life, loss=value, began=began, ended=ended, call_s=ended - called))

    result = summary(model, optimizer, checkpointer, place)
    checkpointer.close()
    return result


def open_checkpointer(arguments: argparse.Namespace, state: dict[str, Any]) -> "resilient.Checkpointer | Unprotected":
    if arguments.no_resilient:
        return Unprotected()
    policy = resilient.Policy(
        memory_every=arguments.memory_every,
        local=arguments.local,
        local_every=arguments.local_every,
        durable_every=arguments.durable_every,
        parity=arguments.parity,
    )
    return resilient.Checkpointer(arguments.url, state=state, policy=policy)


def find_place() -> Place:
    """Reads the environment of torchrun; without one, a single process is rank 0 of 1."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    return Place(
        rank=int(os.environ.get("RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_rank=local_rank,
        life=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        device=torch.device("cuda", local_rank % gpus) if gpus else torch.device("cpu"),
    )


def make_deterministic(device: torch.device) -> None:
    """The same bits from the same inputs, whatever else the machine does. Call it before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the number of threads decides the order of sums
    if device.type == "cuda":
        torch.cuda.set_device(device)


def distributed(model: GPT, place: Place) -> nn.Module:
    """The model in DDP, or as it is for a single process. Changes no parameter."""
    if not dist.is_initialized():
        return model
    network = nn.parallel.DistributedDataParallel(
        model, device_ids=[place.device.index] if place.device.type == "cuda" else None
    )
    # DDP rearranges its buckets after the first backward, and with them the order in which more than two ranks are
    # summed. It does so here, so that the first step of a restarted job is summed as any other.
    for _ in range(2):
        network(torch.zeros(1, 1, dtype=torch.int64, device=place.device)).sum().backward()
        network.zero_grad(set_to_none=True)
    return network


def die(log: StepLog, step: int) -> None:
    """SIGKILL to this process, as the kernel's out-of-memory killer would do it. Does not return."""
    log.mark_kill(step)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_lost(log: StepLog, step: int) -> None:
    """Ask, once in the whole job, for this node to be killed, and give whoever watches the log the time for it."""
    if log.mark_loss(step):
        time.sleep(LOSS_PATIENCE_S)


def summary(
    model: GPT, optimizer: torch.optim.Optimizer, checkpointer: "resilient.Checkpointer | Unprotected", place: Place
) -> dict[str, Any]:
    """Digests of what was learned, the same on every rank or `ranks_agree` is false, and how the job came back."""
    weights = digest_of_tensors(model.state_dict())
    moments = digest_of_optimizer(optimizer)
    everyone: list[Any] = [None] * place.world_size
    if dist.is_initialized():
        dist.all_gather_object(everyone, (weights, moments))
    result = {
        "weights": weights,
        "optimizer": moments,
        "ranks_agree": not dist.is_initialized() or len(set(everyone)) == 1,
        "world_size": place.world_size,
        "life": place.life,
        "restore": None,
        "fence_s": [],
    }
    if isinstance(checkpointer, Unprotected):
        return result
    result["fence_s"] = list(checkpointer.statistics.fence_seconds)
    result["skipped"], result["failures"] = checkpointer.statistics.skipped, checkpointer.statistics.failures
    restored = checkpointer.last_restore
    if restored is not None:
        result["restore"] = {
            "step": restored.step,
            "levels": {str(rank): level for rank, level in restored.levels.items()},
            "seconds": restored.seconds,
            "bytes": restored.bytes,
            "reason": restored.reason,
        }
    return result


def progress(start: int, steps: int, place: Place, log: StepLog) -> Iterator[int]:
    """The numbers of the steps to do, 1-based; rank 0 shows a bar on a terminal and a line now and then in a log."""
    numbers = range(start + 1, steps + 1)
    if place.rank != 0:
        yield from numbers
        return
    with Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
        disable=not sys.stdout.isatty(),
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=steps, completed=start)
        for step in numbers:
            yield step
            text = f"loss {log.last.loss:.3f}" if log.last else ""
            bar.update(task, completed=step, description=text)
            if bar.disable and (step == start + 1 or step == steps or step % max(1, steps // 10) == 0):
                print(f"life {place.life}  step {step}/{steps}  {text}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises SystemExit with a message for what does not fit together."""
    parser = argparse.ArgumentParser(description="Train a small GPT under resilient.")
    add = parser.add_argument
    add("--url", help="where durable snapshots go: a folder, file://..., s3://..., ...; it also names the job")
    add("--steps", type=int, default=200)
    add("--size", choices=sorted(SIZES), default="demo")
    add("--batch", type=int, default=4, help="windows of text for each rank and step")
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--memory-every", type=int, default=1, metavar="N", help="keep every Nth step in the agent's memory")
    add("--local", metavar="FOLDER", help="a node-local folder for the local level")
    add("--local-every", type=int, default=1, metavar="N", help="write every Nth step to --local")
    add("--durable-every", type=int, default=100, metavar="N", help="write every Nth step to --url; 0 is never")
    add("--no-resilient", action="store_true", help="run the same job unprotected")
    add("--die-at-step", type=int, metavar="S", help="SIGKILL between backward and optimizer step, in the first life")
    add("--die-rank", type=int, default=0, metavar="R")
    add("--lose-at-step", type=int, metavar="S", help="wait there, once, for the whole node to be killed")
    add("--lose-rank", type=int, default=0, metavar="R")
    add("--parity", metavar="K+M", help="parity in memory: any M nodes of a group of K + M may be lost")
    add("--result", type=Path, metavar="FILE", help="write digests, losses and times here, and a log beside it")
    parsed = parser.parse_args(arguments)
    if not parsed.no_resilient and not parsed.url:
        parser.error("--url is needed, unless --no-resilient")
    return parsed


def main() -> None:
    arguments = parse()
    place = find_place()
    make_deterministic(place.device)
    join_group(timeout_s=RENDEZVOUS_TIMEOUT_S)
    result_file: Path | None = arguments.result
    log = StepLog(result_file and result_file.with_name(result_file.name + ".steps"), rank=place.rank)
    result = train(arguments, place, log)
    if place.rank == 0 and result_file:
        steps = log.history()
        result["losses"] = losses(steps)
        result["step_s"] = [step.ended - step.began for step in steps if step.life == place.life]
        result["call_s"] = [step.call_s for step in steps if step.life == place.life]
        write_whole(result_file, result)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
