"""`resilient ls` and `inspect`, and how the command line behaves as a whole."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch

from tests.launch.conftest import Resilient
from tests.launch.snapshots import STEPS, image, names, record

GOLDEN = Path(__file__).parents[1] / "golden" / "snapshot_version_1"


def test_ls_shows_every_step_and_that_it_is_complete(durable: Path, resilient: Resilient, script: Resilient) -> None:
    listed = script("ls", durable)
    assert listed.code == 0
    assert names(listed.out.splitlines()) == ["step", *map(str, STEPS)]
    found = resilient("ls", durable, "--json").json["checkpoints"]
    assert [one["step"] for one in found] == list(STEPS)
    assert {one["complete"] for one in found} == {True}
    folder = durable / "step_00000002"
    assert found[1]["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_ls_says_which_ranks_are_missing(durable: Path, resilient: Resilient) -> None:
    record(durable, 3, 1).unlink()
    assert "no, missing: 1" in resilient("ls", durable).out
    third = resilient("ls", durable, "--json").json["checkpoints"][2]
    assert (third["complete"], third["missing_ranks"], third["world_size"]) == (False, [1], 2)


def test_ls_of_one_step_shows_only_that_one(durable: Path, resilient: Resilient) -> None:
    found = resilient("ls", durable / "step_00000002", "--json").json["checkpoints"]
    assert [one["step"] for one in found] == [2]


def test_inspect_shows_tensors_and_who_held_them(durable: Path, resilient: Resilient) -> None:
    found = resilient("inspect", durable, "--json").json
    assert (found["format"], found["step"], found["world_size"]) == ("native", max(STEPS), 2)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    weight = by_name["model.large.weight"]
    assert (weight["kind"], weight["dtype"], weight["held_by"]) == ("parameter", "float32", [0, 1])
    state = by_name["optimizer.state.model.large.weight.exp_avg"]
    assert (state["parameter"], state["state"], state["shape"]) == ("model.large.weight", "exp_avg", weight["shape"])
    assert found["groups"]["optimizer"][0]["params"][0].startswith("model.")
    assert "lr" in found["groups"]["optimizer"][0]
    assert [one["rank"] for one in found["images"]] == [0, 1]
    assert "model.large.weight" in resilient("inspect", durable).out


def test_the_pieces_that_inspect_tells_of_are_where_the_bytes_are(durable: Path, resilient: Resilient) -> None:
    found = resilient("inspect", durable, "--pieces", "--select", "model.large.weight", "--json").json
    (weight,) = [tensor for tensor in found["tensors"] if tensor["kind"] == "parameter"]
    for piece in weight["stored"]:
        with safetensors.safe_open(image(durable, max(STEPS), piece["file"]), "np") as opened:
            values = opened.get_tensor("model.large.weight")
        data = image(durable, max(STEPS), piece["file"]).read_bytes()
        assert data[piece["offset"] : piece["offset"] + values.nbytes] == values.tobytes()


def test_inspect_takes_patterns_and_refuses_those_that_match_nothing(durable: Path, resilient: Resilient) -> None:
    some = resilient("inspect", durable, "--select", "*.bias", "--select", "large.weight", "--json").json["tensors"]
    parameters = {tensor["name"] for tensor in some if tensor["kind"] == "parameter"}
    assert parameters == {"model.first.bias", "model.norm.bias", "model.large.bias", "model.large.weight"}
    refused = resilient("inspect", durable, "--select", "nothing.*")
    assert refused.code == 2
    assert "no tensor matches the pattern 'nothing.*'" in refused.err


def test_a_snapshot_of_version_1_is_shown_and_verified(resilient: Resilient) -> None:
    assert resilient("inspect", GOLDEN, "--json").json["step"] == 3
    assert resilient("verify", GOLDEN).code == 0


def test_what_is_not_there_ends_with_3(tmp_path: Path, resilient: Resilient) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    for command in (("ls",), ("inspect",), ("verify",), ("prune", "--keep", "1", "--yes")):
        for place in (tmp_path, tmp_path / "nowhere"):
            ended = resilient(command[0], place, *command[1:])
            assert (ended.code, ended.out) == (3, ""), (command, place, ended)
            assert "Traceback" not in ended.err
            assert str(place) in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_step_that_is_not_complete_is_refused_with_what_is_missing(durable: Path, resilient: Resilient) -> None:
    record(durable, 4, 0).unlink()
    assert resilient("inspect", durable, "--json").json["step"] == 3
    refused = resilient("inspect", durable, "--step", "4")
    assert refused.code == 3
    assert "rank_00000-of-00002.json" in refused.err
    assert "complete are: 1, 2, 3" in refused.err


def test_wrong_usage_ends_with_2_and_damage_with_1(durable: Path, resilient: Resilient) -> None:
    assert resilient("verify").code == 2
    assert resilient("convert", durable, durable.parent / "x", "--to", "zip").code == 2
    assert resilient("inspect", "no-such-protocol://x").code == 2
    text = record(durable, 4, 1).read_text()
    record(durable, 4, 1).write_text(text.replace('"rank":1', '"rank":0', 1))
    damaged = resilient("inspect", durable)
    assert damaged.code == 1
    assert "rank_00001-of-00002.json was changed after it was written" in damaged.err


def test_debug_shows_the_traceback(tmp_path: Path, resilient: Resilient) -> None:
    assert "Traceback" in resilient("--debug", "ls", tmp_path / "nowhere").err


def test_numbers_that_json_does_not_have_are_words(resilient: Resilient, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "least": [math.nan, -math.inf]}
    torch.save(state, tmp_path / "odd.pt")
    done = resilient("inspect", "--json", tmp_path / "odd.pt")
    found = json.loads(done.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found["groups"]["optimizer"][0]["lr"] == "infinity"


@pytest.mark.parametrize("reader", ["head -c 10", "true"])
def test_a_reader_that_has_enough_is_no_error(reader: str, durable: Path) -> None:
    command = f"{sys.executable} -m resilient.launch.cli inspect {durable} --json --pieces | {reader}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout in ("", '{"url": "/')


@pytest.mark.parametrize(("arguments", "unwanted"), [("--help", "torch numpy fsspec rich"), ("ls", "torch numpy")])
def test_what_has_to_be_quick_imports_little(arguments: str, unwanted: str, durable: Path) -> None:
    given = [arguments, str(durable)] if arguments == "ls" else [arguments]
    look = (
        f"import sys; from resilient.launch.cli import main; code = main({given!r}); "
        f"print(code, sorted(set({unwanted.split()!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_the_shell_completes_commands(script: Resilient) -> None:
    typed = {"_RESILIENT_COMPLETE": "bash_complete", "COMP_WORDS": "resilient in", "COMP_CWORD": "1"}
    assert script(**typed).out.splitlines() == ["plain,inspect"]


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "diff", "convert", "repair", "prune"])
def test_every_command_explains_itself(command: str, resilient: Resilient) -> None:
    told = resilient(command, "--help")
    assert told.code == 0
    assert "Usage: resilient" in told.out


def test_a_folder_of_checkpoints_is_listed_one_by_one(tmp_path: Path, resilient: Resilient) -> None:
    for step in (100, 20):
        assert resilient("convert", GOLDEN, tmp_path / f"checkpoint-{step}", "--to", "safetensors").code == 0
    assert resilient("convert", GOLDEN, tmp_path / "native", "--to", "native").code == 0
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events").write_text("none")
    found = resilient("ls", tmp_path, "--json").json["checkpoints"]
    places = {(Path(one["url"]).name, one["format"]) for one in found}
    assert places == {("checkpoint-100", "safetensors"), ("checkpoint-20", "safetensors"), ("native", "native")}


class Mine:
    """Something that a job of a user might have put into its file."""


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


def test_pickles_run_no_code_unless_they_are_trusted(
    tmp_path: Path, resilient: Resilient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    for name, value in (("mine.pt", Mine()), ("evil.pt", Evil())):
        torch.save({"model": {"w": torch.ones(2)}, "other": value}, tmp_path / name)
    refused = resilient("convert", tmp_path / "evil.pt", tmp_path / "to", "--to", "safetensors")
    assert refused.code in (1, 2, 3)
    assert "posix.system" in refused.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "to").exists()
    refused = resilient("inspect", tmp_path / "mine.pt")
    assert "Mine" in refused.err
    assert "--trust-pickle" in refused.err
    shown = resilient("inspect", tmp_path / "mine.pt", "--trust-pickle", "--json")
    assert shown.code == 0, shown
    assert [tensor["name"] for tensor in shown.json["tensors"]] == ["model.w"]
