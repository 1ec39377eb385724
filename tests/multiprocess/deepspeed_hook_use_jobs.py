"""What a program does with an engine whose checkpoints are ours: each a short job, for `test_deepspeed_hook_use.py`."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resilient.errors import LayoutMismatch, Preempted, StateError, UsageError
from tests.bad_days.conftest import Agents
from tests.multiprocess import deepspeed_jobs as jobs
from tests.multiprocess.deepspeed_hook_jobs import block
from tests.multiprocess.deepspeed_jobs import live, states_of, train, training

Facts = dict[str, Any]


@contextmanager
def attached(url: str, *, seed: int = 1, dtype: str = "float32", **more: Any) -> Iterator[tuple[Any, Any]]:
    """An engine and its hook; destroyed at the end. `more`: of the block."""
    from resilient.launch.deepspeed import attach

    with training(1, dtype, seed=seed, blocks=block(url, **more)) as engine:
        yield engine, attach(engine)


def run_all(folder: str) -> dict[str, Facts]:
    """All jobs below, one after the other: to import DeepSpeed takes longer than any of them."""
    found = {}
    for name, job in JOBS.items():
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        found[name] = job(str(place))
    return found


def moves_over(folder: str) -> Facts:
    """From DeepSpeed's own checkpoint, at another seed, and then from ours."""
    with training(1, "float32") as engine:
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/out", client_state={"by": "deepspeed"})
        before = _held(engine)
    with attached(f"{folder}/run", seed=2) as (engine, _):
        path, client = engine.load_checkpoint(f"{folder}/out")
        same, steps = _held(engine) == before, engine.global_steps
        train(engine, range(2, 3))
        engine.save_checkpoint(f"{folder}/out", client_state={"by": "us"})
    with attached(f"{folder}/run", seed=3) as (engine, _):
        later = engine.load_checkpoint(f"{folder}/out")
        named = engine.load_checkpoint(f"{folder}/out", tag="global_step2")
        back = _held(engine) == before
    return {
        "loaded": [_name(path), client],
        "same": same,
        "steps": steps,
        "later": [_name(later[0]), later[1]],
        "named": [_name(named[0]), named[1]],
        "back": back,
    }


def loss_scale_moves_over(folder: str) -> Facts:
    """From DeepSpeed's own checkpoint with fp16: of two overflows the second one lowers the scale."""
    from resilient.launch.deepspeed import attach

    found = {}
    for stage in (0, 1):
        ends = []
        for ours in (False, True):
            how = block(f"{folder}/run_{stage}") if ours else {}
            with training(stage, "float16", seed=1 + ours, blocks=how) as engine:
                if ours:
                    attach(engine)
                    engine.load_checkpoint(f"{folder}/out_{stage}")
                else:
                    train(engine, range(3), overflows=(1,))
                    engine.save_checkpoint(f"{folder}/out_{stage}")
                scales = [engine.optimizer.loss_scale, engine.skipped_steps]
                train(engine, range(3, 6), overflows=(4,))
                ends.append([*scales, engine.optimizer.loss_scale, engine.skipped_steps])
        found[str(stage)] = ends
    return found


def a_rank_is_late(folder: str) -> Facts:
    """Two nodes; the agent of the second stands still while the first has long written its part."""
    here = {"RESILIENT_NODE": f"late{dist.get_rank()}", "RESILIENT_RUNTIME_DIR": tempfile.mkdtemp(prefix="rs-")}
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    try:
        with attached(f"{folder}/run") as (engine, hook):
            train(engine, range(1))
            engine.save_checkpoint(f"{folder}/out")
            told = [_latest(folder, "global_step1", 60)]
            dist.barrier()
            train(engine, range(1, 2))
            [agent] = Agents(Path(here["RESILIENT_RUNTIME_DIR"])).pids()
            if dist.get_rank() == 1:
                os.kill(agent, signal.SIGSTOP)
            engine.save_checkpoint(f"{folder}/out")
            end = time.monotonic() + 60
            while not list(Path(f"{folder}/run/step_00000002").glob("*.safetensors")) and time.monotonic() < end:
                time.sleep(0.02)
            parts = len(list(Path(f"{folder}/run/step_00000002").glob("*.safetensors")))
            told.append(_latest(folder, "global_step2", 1))
            dist.barrier()
            os.kill(agent, signal.SIGCONT)
            told.append(_latest(folder, "global_step2", 60))
            problems = hook.close()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(here["RESILIENT_RUNTIME_DIR"], ignore_errors=True)
    return {"parts": parts, "told": told, "problems": problems}


def _latest(folder: str, expected: str, patience_s: float) -> str:
    """What `latest` says: when it says what is expected, or the time is over."""
    path, end = Path(f"{folder}/out/latest"), time.monotonic() + patience_s
    while (told := path.read_text() if path.exists() else "") != expected and time.monotonic() < end:
        time.sleep(0.02)
    return told


def with_accelerate(folder: str) -> Facts:
    """Accelerate makes the engine, and is asked to save and load by its own names."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.state import AcceleratorState

    from resilient.launch.deepspeed import attach_when_prepared

    deepspeed = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 2},
        **block(f"{folder}/run"),
    }
    ends, losses = [], []
    jobs.prepare()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")  # by itself Accelerate knows no ranks of DeepSpeed on CPUs
    for seed in (1, 2):
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed))
        attach_when_prepared(accelerator)
        model = jobs.Network(seed)
        engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(jobs.groups(model)))
        path, _ = engine.load_checkpoint(f"{folder}/out")
        losses.append(_trained(accelerator, engine, optimizer, range(2 * seed - 2, 2 * seed)))
        engine.save_checkpoint(f"{folder}/out")
        ends.append([_name(path), engine.global_steps])
        engine.resilient.close(keep_memory=True)
        engine.destroy()
        AcceleratorState._reset_state()
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"ends": ends, "losses": losses}


def _trained(accelerator: Any, engine: Any, optimizer: Any, steps: range) -> list[float]:
    """Accelerate's own loop, in which it calls the engine's `backward` and `step`."""
    losses = []
    for step in steps:
        tokens = torch.randint(0, jobs.VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = torch.nn.functional.cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_alone(folder: str) -> Facts:
    """For another job: parameters, and nothing of the optimizer, the schedule and the counters."""
    with attached(f"{folder}/run") as (engine, _):
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/out")
        before = _held(engine)
    with attached(f"{folder}/run", seed=2) as (engine, _):
        path, _ = engine.load_checkpoint(f"{folder}/out", load_module_only=True)
        after = _held(engine, ())
        state = [len(one) for one in engine.optimizer.optimizer.state.values()]
        facts = [engine.global_steps, engine.lr_scheduler.last_epoch, state]
    with attached(f"{folder}/run", seed=2) as (engine, _):
        engine.load_checkpoint(f"{folder}/out", load_lr_scheduler_states=False)
        schedule = [engine.global_steps, engine.lr_scheduler.last_epoch]
    return {
        "path": _name(path),
        "weights": all(after[state] == before[state] for state in ("model", "fp32")),
        "others": facts,
        "schedule": schedule,
    }


def every_step(folder: str) -> Facts:
    """Snapshots without being asked for; those that are asked for are durable."""
    with attached(f"{folder}/run", every_step=True) as (engine, hook):
        train(engine, range(2))
        engine.save_checkpoint(f"{folder}/out", client_state={"at": 2})
        train(engine, range(2, 4))
        held, saves = _held(engine), hook.checkpointer.statistics.saves
        hook.close(keep_memory=True)
        dist.barrier()  # rank 0 writes the names
        latest = Path(f"{folder}/out/latest").read_text()
    with attached(f"{folder}/run", seed=2, every_step=True) as (engine, hook):
        newest = engine.load_checkpoint(f"{folder}/out")
        same = _held(engine) == held
        named = engine.load_checkpoint(f"{folder}/out", tag="global_step2")
        level = hook.checkpointer.last_restore.levels[0]
    return {
        "newest": [_name(newest[0]), newest[1]],
        "same": same,
        "saves": saves,
        "latest": latest,
        "named": [_name(named[0]), named[1], level],
        "durable": sorted(one.name for one in Path(f"{folder}/run").iterdir() if one.name.startswith("step_")),
    }


def asked_often(folder: str) -> Facts:
    """Every step is saved by itself, and then once more because the program asks for it."""
    with attached(f"{folder}/run", every_step=True) as (engine, hook):
        problems = []
        for step in range(12):
            train(engine, range(step, step + 1))
            engine.save_checkpoint(f"{folder}/out", client_state={"at": step})
            problems += hook.checkpointer._pending.take_failures()
        problems += hook.close()
        dist.barrier()
    return {
        "problems": problems,
        "latest": Path(f"{folder}/out/latest").read_text(),
        "durable": sorted(int(one.name[5:]) for one in Path(f"{folder}/run").iterdir() if one.name.startswith("step_")),
    }


def names(folder: str) -> Facts:
    """Two names for one step, a name of the program's own, and `latest` when the engine is destroyed at once."""
    with attached(f"{folder}/run") as (engine, hook):
        train(engine, range(1))
        engine.save_checkpoint(f"{folder}/out", save_latest=False)
        engine.save_checkpoint(f"{folder}/other", tag="best")
        saves = hook.checkpointer.statistics.saves
        replaced = sorted(name for name in vars(engine) if callable(vars(engine)[name]) and name in dir(type(engine)))
        engine.destroy()
        after = [name for name in replaced if name in vars(engine)]
        problem = _error(lambda: hook.checkpointer.save(2))
    with attached(f"{folder}/run", seed=2) as (engine, _):
        best = engine.load_checkpoint(f"{folder}/other", tag="best")
    return {
        "saves": saves,
        "latest": [os.path.exists(f"{folder}/out/latest"), Path(f"{folder}/other/latest").read_text()],
        "replaced": replaced,
        "after": after,
        "closed": problem,
        "best": _name(best[0]),
    }


def refused(folder: str) -> Facts:
    """Bad input."""
    from resilient.launch.deepspeed import attach

    bare = {"train_batch_size": 8, "gradient_accumulation_steps": 1, **block(f"{folder}/run")}
    untrained, *_ = jobs.prepare().initialize(model=jobs.Network(1), config=bare)
    untrainable = _error(lambda: attach(untrained))
    with training(1, "float32") as engine:
        without = _error(lambda: attach(engine))
    with training(1, "float32", blocks=block(f"{folder}/run", every_steps=True)) as engine:
        unknown = _error(lambda: attach(engine))
        untouched = "save_checkpoint" not in vars(engine)
    with training(1, "float32", blocks=block(f"{folder}/run")) as engine:
        deepspeed, kept = jobs.prepare(), engine.optimizer.real_dp_process_group
        tested, deepspeed.__version__ = deepspeed.__version__, "0.99.1"
        del engine.optimizer.real_dp_process_group  # as if it had another name there
        other = _error(lambda: attach(engine))
        deepspeed.__version__, engine.optimizer.real_dp_process_group = tested, kept
    with attached(f"{folder}/run") as (engine, hook):
        twice = _error(lambda: attach(engine))
        taken = _error(lambda: type(hook)(engine, hook._config, {"model": engine.module}))
        nothing = engine.load_checkpoint(f"{folder}/out")
        train(engine, range(1))
        client = _error(lambda: engine.save_checkpoint(f"{folder}/out", client_state={"job": {"file": object()}}))
        engine.save_checkpoint(f"{folder}/out", client_state={"fine": 1})
        folder_ = _error(lambda: engine.save_checkpoint(""))
        custom = _error(lambda: engine.load_checkpoint(f"{folder}/out", custom_load_fn=print))
    with attached(f"{folder}/run", dtype="bfloat16") as (engine, _):
        precision = _error(lambda: engine.load_checkpoint(f"{folder}/out"))
    return {
        "untrained": untrainable,
        "without": without,
        "unknown": unknown,
        "untouched": untouched,
        "other": other,
        "twice": twice,
        "taken": taken,
        "nothing": nothing,
        "client": client,
        "folder": folder_,
        "custom": custom,
        "precision": precision,
    }


def preempted(folder: str) -> Facts:
    """The job is told to stop, and goes on where it was."""
    with attached(f"{folder}/called", policy={"durable_every": 0}) as (engine, hook):
        hook.checkpointer.request_stop()
        called = []
        try:
            for step in range(200):
                train(engine, range(step, step + 1))
                engine.save_checkpoint(f"{folder}/out_called")
        except Preempted as error:
            called = [f"global_step{error.step}"]
        dist.barrier()
        called.append(Path(f"{folder}/out_called/latest").read_text())
    with attached(f"{folder}/run", every_step=True, policy={"durable_every": 0}) as (engine, hook):
        train(engine, range(1))
        hook.checkpointer.request_stop()
        stopped = []
        try:
            train(engine, range(1, 200))
        except Preempted as error:
            stopped = [error.step, error.code]
        held, steps = _held(engine), engine.global_steps
    with attached(f"{folder}/run", seed=2, every_step=True) as (engine, hook):
        path, _ = engine.load_checkpoint(f"{folder}/out")
        levels = set(hook.checkpointer.last_restore.levels.values())
        same = _held(engine) == held
        durable = [step for step in range(200) if os.path.isdir(f"{folder}/run/step_{step:08d}")]
    return {
        "called": called,
        "stopped": stopped,
        "steps": steps,
        "path": _name(path),
        "same": same,
        "levels": levels,
        "durable": durable,
    }


JOBS: Mapping[str, Callable[[str], Facts]] = {
    job.__name__: job
    for job in (
        moves_over,
        loss_scale_moves_over,
        a_rank_is_late,
        with_accelerate,
        weights_alone,
        every_step,
        asked_often,
        names,
        refused,
        preempted,
    )
}


def _held(engine: Any, states: tuple[str, ...] = states_of("adamw")) -> Any:
    held = jobs._listed(live(engine, states))
    held["model"].pop("passing")  # is in no state dict, so not in DeepSpeed's files
    return held


def _name(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def _error(work: Callable[[], object]) -> str:
    try:
        work()
    except (UsageError, StateError, LayoutMismatch, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"nothing on rank {dist.get_rank()}"
