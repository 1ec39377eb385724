"""The example job and its parts: everything here is deterministic, or the demo could not compare bits."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the examples are no installed package

from examples import demo, train_gpt
from examples.corpus import Sampler, load_text, load_tokens
from examples.gpt import BYTES_PER_PARAMETER, GPT, SIZES, Config, next_token_loss, state_of_bytes
from examples.steplog import (
    Step,
    StepLog,
    digest_of_optimizer,
    digest_of_tensors,
    kill_mark,
    losses,
    read_steps,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = Config(layers=2, width=32, heads=2, context=16)


def sampler(rank: int = 0, world_size: int = 1, seed: int = 0, tokens: int = 1000) -> Sampler:
    text = torch.arange(tokens, dtype=torch.int32)
    return Sampler(text, context=10, batch=4, rank=rank, world_size=world_size, seed=seed)


def a_step(step: int, life: int = 0, loss: float = 1.0) -> Step:
    return Step(step=step, life=life, loss=loss, began=float(step), ended=step + 0.5, call_s=0.001)


# corpus


def test_the_text_is_real_long_and_the_same_at_every_call() -> None:
    tokens = load_tokens()
    assert tokens.dtype == torch.uint8
    assert len(tokens) > 1_000_000
    assert torch.equal(tokens, load_tokens())


def test_without_the_package_the_text_is_pythons_own_sources() -> None:
    text = load_text(package="a_package_that_nobody_has")
    assert len(text) > 1_000_000
    assert "import ast" in text


def test_targets_are_the_inputs_one_token_later() -> None:
    inputs, targets = sampler().next()
    assert inputs.shape == (4, 10)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


def test_an_epoch_gives_each_window_to_one_rank_once() -> None:
    ranks = [sampler(rank, world_size=3) for rank in range(3)]
    windows = [start for _ in range(8) for each in ranks for start in each.next()[0][:, 0].tolist()]
    assert len(windows) == len(set(windows)) == 96
    assert all(each.state_dict() == {"epoch": 0, "position": 96} for each in ranks)
    ranks[0].next()
    assert ranks[0].state_dict() == {"epoch": 1, "position": 12}


def test_the_order_depends_on_the_seed_and_on_the_epoch() -> None:
    first, second = sampler(seed=0), sampler(seed=1)
    start = first.next()[0]
    assert not torch.equal(start, second.next()[0])
    first.load_state_dict({"epoch": 1, "position": 0})
    assert not torch.equal(start, first.next()[0])


def test_a_sampler_goes_on_where_its_state_was_taken() -> None:
    before = sampler(rank=1, world_size=2)
    for _ in range(17):  # into the second epoch
        before.next()
    state = json.loads(json.dumps(before.state_dict()))
    after = sampler(rank=1, world_size=2)
    after.load_state_dict(state)
    for _ in range(5):
        assert torch.equal(before.next()[0], after.next()[0])


def test_a_world_of_another_size_reads_what_the_first_has_not() -> None:
    pair = [sampler(rank, world_size=2) for rank in range(2)]
    read = {start for each in pair for start in each.next()[0][:, 0].tolist()}
    single = sampler()
    single.load_state_dict(pair[0].state_dict())
    assert read.isdisjoint(single.next()[0][:, 0].tolist())


def test_a_text_too_short_for_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill one batch"):
        sampler(tokens=30)


# gpt


def test_a_token_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] += 1
    before, after = model(tokens), model(changed % 256)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.equal(before[0, 9:], after[0, 9:])


def test_the_embeddings_are_tied() -> None:
    model = GPT(TINY)
    assert model.head.weight is model.tokens.weight
    assert {"head.weight", "tokens.weight"} <= model.state_dict().keys()


def test_the_same_seed_trains_to_the_same_bits_and_dropout_needs_it() -> None:
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = GPT(TINY)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(seed)
        tokens = torch.arange(32).view(2, 16)
        for _ in range(2):
            next_token_loss(model(tokens), tokens + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
        digests.append((digest_of_tensors(model.state_dict()), digest_of_optimizer(optimizer)))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("size", "least", "most"), [("demo", 1e6, 3e6), ("50m", 47e6, 49e6)])
def test_the_sizes_are_what_they_are_called(size: str, least: float, most: float) -> None:
    with torch.device("meta"):
        assert least < sum(each.numel() for each in GPT(SIZES[size]).parameters()) < most


@pytest.mark.parametrize("total_bytes", [8 << 20, 100 << 20])
def test_a_state_for_benchmarks_has_the_size_that_was_asked_for(total_bytes: int) -> None:
    model, optimizer = state_of_bytes(total_bytes)
    held = [*model.parameters(), *(each for moments in optimizer.state.values() for each in moments.values())]
    assert sum(each.nbytes for each in held) == pytest.approx(total_bytes, rel=0.1)
    assert all(moments["exp_avg"].any() for moments in optimizer.state.values())
    assert BYTES_PER_PARAMETER == 12


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        Config(layers=1, width=33, heads=2, context=8)


# the log and the digests


def test_a_log_is_read_back_and_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    log = StepLog(path, rank=0)
    log.append(a_step(1))
    log.append(a_step(2))
    with path.open("a") as file:
        file.write('{"step": 3, "li')
    assert read_steps(path) == log.history() == [a_step(1), a_step(2)]


def test_only_rank_0_writes_the_log_but_any_rank_marks_its_kill(tmp_path: Path) -> None:
    path = tmp_path / "steps"
    log = StepLog(path, rank=1)
    log.append(a_step(1))
    log.mark_kill(2)
    assert not path.exists()
    assert log.last == a_step(1)
    assert json.loads(kill_mark(path).read_text())["step"] == 2


def test_a_step_that_was_made_again_counts_with_its_later_loss() -> None:
    assert losses([a_step(1), a_step(2, loss=5.0), a_step(2, life=1, loss=3.0)]) == {"1": 1.0, "2": 3.0}


def test_a_digest_sees_one_bit_a_name_and_a_shape() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2, dtype=torch.bfloat16)}
    others = [
        base | {"a": torch.tensor([0.0, 0.0, -0.0, 0.0])},
        base | {"a": torch.zeros(2, 2)},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({digest_of_tensors(each) for each in [base, *others]}) == 4
    assert digest_of_tensors(base) == digest_of_tensors(dict(reversed(base.items())))


def test_the_optimizers_digest_sees_moments_steps_and_the_learning_rate() -> None:
    _model, optimizer = state_of_bytes(8 << 20)
    digests = {digest_of_optimizer(optimizer)}
    optimizer.param_groups[0]["lr"] = 0.5
    digests.add(digest_of_optimizer(optimizer))
    next(iter(optimizer.state.values()))["step"] += 1
    digests.add(digest_of_optimizer(optimizer))
    assert len(digests) == 3


# the job


def run_job(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--result", str(folder / "result.json")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def test_an_unprotected_job_learns_and_ends_with_the_same_bits_twice(tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        done = run_job(folder, "--no-resilient", "--steps", "5")
        assert done.returncode == 0, done.stderr
        assert "step 5/5" in done.stdout
        results.append(json.loads((folder / "result.json").read_text()))
    assert results[0]["losses"] == results[1]["losses"]
    assert (results[0]["weights"], results[0]["optimizer"]) == (results[1]["weights"], results[1]["optimizer"])
    assert results[0]["losses"]["5"] < results[0]["losses"]["1"] - 0.5
    assert results[0]["ranks_agree"]
    assert results[0]["restore"] is None
    assert len(results[0]["step_s"]) == 5


def test_a_job_told_to_die_kills_itself_in_mid_step_and_says_when(tmp_path: Path) -> None:
    done = run_job(tmp_path, "--no-resilient", "--steps", "5", "--die-at-step", "3")
    assert done.returncode == -9
    log = tmp_path / "result.json.steps"
    assert [step.step for step in read_steps(log)] == [1, 2]
    assert json.loads(kill_mark(log).read_text())["step"] == 3
    assert not (tmp_path / "result.json").exists()


def test_a_protected_job_needs_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.parse(["--steps", "3"])
    assert "--url is needed" in capsys.readouterr().err


# what the demo concludes


def a_run(
    life: int = 0,
    killed_at: float | None = None,
    lost_at: float | None = None,
    level: str | None = None,
    weights: str = "w",
) -> demo.Run:
    restore = {
        "step": 2,
        "levels": {"0": "memory", "1": level, "2": "memory"},
        "seconds": 0.1,
        "bytes": 1,
        "reason": "",
    }
    result = {"weights": weights, "optimizer": "o", "ranks_agree": True, "life": life, "fence_s": [], "step_s": [0.5]}
    first = [a_step(number) for number in range(1, 4)]
    steps = first + [a_step(number, life) for number in range(3 if life else 4, 9)]
    result |= {"restore": restore if level else None}
    return demo.Run(result=result, steps=steps, killed_at=killed_at, lost_at=lost_at)


def test_the_demo_is_content_when_the_job_came_back_from_memory_and_parity_with_the_same_bits() -> None:
    resumed = a_run(life=1, killed_at=3.0, lost_at=3.0, level="parity")
    assert demo.compare(a_run(), resumed) == []
    assert resumed.recovery_s(3.0) == 0.5
    assert demo.steps_lost(resumed) == 1
    assert demo.report(a_run(), resumed).row_count > 6


def test_the_demo_gives_no_percentage_that_the_machine_could_have_made() -> None:
    assert demo.difference([0.1, 0.2, 0.3], [0.2, 0.29, 0.4]) == "less than the machine varies"
    assert demo.difference([0.1, 0.2, 0.3], [0.01, 0.02, 0.03]) == "less than the machine varies"
    assert demo.difference([0.1, 0.2, 0.3], [0.3, 0.4, 0.5]) == "+100.0%"


@pytest.mark.parametrize(
    ("resumed", "complaint"),
    [
        (a_run(), "no trainer was killed"),
        (a_run(killed_at=3.0), "no node was lost"),
        (a_run(life=1, killed_at=3.0, lost_at=3.0), "nothing was restored"),
        (a_run(life=1, killed_at=3.0, lost_at=3.0, level="local"), "from memory, local, memory, not from memory and"),
        (a_run(life=1, killed_at=3.0, lost_at=3.0, level="parity", weights="x"), "the weights differ"),
    ],
)
def test_the_demo_says_what_is_missing(resumed: demo.Run, complaint: str) -> None:
    assert complaint in "; ".join(demo.compare(a_run(), resumed))


def shown_by_the_demo(*, terminal: bool) -> str:
    console = Console(file=StringIO(), force_terminal=terminal, width=100)
    with demo.progress(console, 40) as tell:
        for life, first in ((0, 1), (1, 15)):
            for number in range(first, 41 if life else 18):
                tell(a_step(number, life))
                tell(a_step(number, life))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_demo_shows_a_bar_on_a_terminal_and_a_line_now_and_then_in_a_log() -> None:
    bar = shown_by_the_demo(terminal=True)
    assert "━" in bar
    assert "40/40" in bar
    assert "life 1" in bar
    lines = shown_by_the_demo(terminal=False).splitlines()
    assert [line.split(",")[0].strip() for line in lines[:4]] == ["step 4/40", "step 8/40", "step 12/40", "step 16/40"]
    assert lines[4].startswith("    step 15/40, loss ")
    assert lines[4].endswith(", life 1")
    assert len(lines) == 4 + 1 + 7, lines
    assert "\x1b" not in "".join(lines)
