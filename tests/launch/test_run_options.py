"""The command line of `resilient run`, up to what a launcher is to do. Nothing is started."""

import signal
from pathlib import Path

import pytest

from resilient.errors import PolicyError, UsageError
from resilient.launch.run.identity import claimed, digest_of, run_id_of, token_of
from resilient.launch.run.options import Settings, parse
from resilient.launch.run.rendezvous import LOCAL


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.touch()
    return str(path)


def parsed(*arguments: str, environment: dict[str, str] | None = None, scratch: Path = Path("/nowhere")) -> Settings:
    return parse(["--log-dir", "/dev/null", *arguments], environment or {}, scratch)


def test_a_job_on_one_node_needs_no_options_and_no_port(script: str) -> None:
    settings = parsed(script, "--steps", "3")
    config = settings.config
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == ("c10d", LOCAL, "127.0.0.1")
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 1, 1, 3)
    assert settings.arguments == ("-u", script, "--steps", "3")
    assert config.run_id == run_id_of(None, [script, "--steps", "3"], str(Path.cwd()), {})


def test_options_of_torchrun_keep_their_meaning_before_and_between_ours(script: str) -> None:
    settings = parsed(
        "--max-restarts=7", "--set", "durable_every=5", "--nproc-per-node", "2", "-m", "json.tool", "--set"
    )
    assert settings.config.max_restarts == 7
    assert settings.config.nproc_per_node == 2
    assert settings.arguments == ("-u", "-m", "json.tool", "--set")
    assert settings.policy.durable_every == 5


def test_output_that_is_sent_to_files_stays_when_the_launcher_ends(script: str, tmp_path: Path) -> None:
    for options, stays in (([], False), (["-r", "3"], True), (["-t", "0:1"], True)):
        specs = parse([*options, script], {}, tmp_path / "scratch").config.logs_specs
        assert specs is not None
        place = Path(specs.root_log_dir)
        assert (tmp_path / "scratch" not in place.parents) is stays
        place.rmdir()


def test_torchruns_variables_count(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_MAX_RESTARTS", "9")
    assert parsed(script, environment={"PET_MAX_RESTARTS": "9"}).config.max_restarts == 9


def test_a_node_rank_and_a_master_make_an_elastic_rendezvous(script: str) -> None:
    where = ("--nnodes", "2", "--master-addr", "10.0.0.1")
    for rank, hosts in (("0", None), ("1", "0")):
        config = parsed(*where, "--node-rank", rank, script).config
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "10.0.0.1:29500")
        assert config.rdzv_configs.get("is_host") == hosts


def test_the_policy_comes_from_file_and_options_and_is_checked_at_once(script: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text("durable_every = 50\nkeep_last = 4\n")
    settings = parsed("--policy", str(file), "--set", "keep_last=6", "--grace-s", "90", script)
    assert (settings.policy.durable_every, settings.policy.keep_last, settings.policy.grace_s) == (50, 6, 90)
    assert settings.variables["RESILIENT_POLICY"] == str(file)
    assert settings.variables["RESILIENT_GRACE_S"] == "90"
    with pytest.raises(PolicyError, match="did you mean RESILIENT_KEEP_LAST"):
        parsed("--set", "keep_lst=6", script)
    with pytest.raises(PolicyError, match="GRACE_S"):
        parsed("--grace-s", "soon", script)


def test_workers_stop_at_a_signal_that_ends_nothing_else_unless_the_policy_says_which(script: str) -> None:
    settings = parsed(script)
    assert settings.stop_signals == (signal.SIGUSR1,)
    assert settings.regroup_signal is signal.SIGUSR2
    assert settings.variables["RESILIENT_PREEMPT_SIGNALS"] == "SIGUSR1"
    chosen = parsed("--set", "preempt_signals=SIGTERM SIGUSR2", "--set", "regroup_signals=SIGHUP", script)
    assert chosen.stop_signals == (signal.SIGTERM, signal.SIGUSR2)
    assert chosen.regroup_signal is signal.SIGHUP


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.py"], "absent.py: there is no such script"),
        (["--set", "keep_last", "SCRIPT"], "--set keep_last"),
        (["--nnodes", "many", "SCRIPT"], "--nnodes many"),
        (["--nnodes", "3:1", "SCRIPT"], "min_nodes"),
        (["--nproc-per-node", "some", "SCRIPT"], "nproc_per_node"),
        (["--progress-steps", "0", "SCRIPT"], "--progress-steps 0"),
        (["--start-method", "fork", "SCRIPT"], "--start-method"),
        (["--token-file", "absent", "SCRIPT"], "--token-file absent cannot be read"),
    ],
)
def test_mistakes_are_told_before_anything_starts(script: str, arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parsed(*(script if word == "SCRIPT" else word for word in arguments))


def test_an_unknown_option_is_told_as_one(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--nprocs", "2", script)
    assert ended.value.code == 2
    assert "resilient run: error: unrecognized arguments: --nprocs" in capsys.readouterr().err


def test_the_name_of_a_run_is_the_same_for_the_same_command_and_no_other() -> None:
    command = ["train.py", "--lr", "1"]
    name = run_id_of("none", command, "/work", {})
    assert name == run_id_of(None, command, "/work", {})
    assert len({name, run_id_of(None, command[:2], "/work", {}), run_id_of(None, command, "/home", {})}) == 3
    assert run_id_of(None, command, "/work", {"SLURM_JOB_ID": "17"}) == "17"
    assert run_id_of("mine", command, "/work", {"SLURM_JOB_ID": "17"}) == "mine"
    assert digest_of(["a b"], "") != digest_of(["a", "b"], "")


def test_a_token_comes_from_a_private_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    file.chmod(0o600)
    assert token_of(str(file), {"RESILIENT_TOKEN": "other"}) == "secret"
    assert token_of(None, {"RESILIENT_TOKEN": "other"}) == "other"
    assert token_of(None, {}) is None
    file.chmod(0o640)
    with pytest.raises(UsageError, match="can be read by others"):
        token_of(str(file), {})
    file.write_text("\n")
    file.chmod(0o600)
    with pytest.raises(UsageError, match="is empty"):
        token_of(str(file), {})


def test_a_token_is_not_shown_with_the_settings(script: str) -> None:
    assert "hidden" not in repr(parsed(script, environment={"RESILIENT_TOKEN": "hidden"}))


def test_a_run_is_claimed_once_on_a_node_and_its_folder_goes_with_the_claim(runtime_dir: Path) -> None:
    here, there = ({"RESILIENT_RUNTIME_DIR": str(runtime_dir), "RESILIENT_NODE": node} for node in ("n1", "n2"))
    with claimed("run", here):
        with claimed("run", there), claimed("other", here):
            pass
        with pytest.raises(UsageError, match="already running on this node"), claimed("run", here):
            pass
    with claimed("run", here):
        pass
    assert list(runtime_dir.iterdir()) == []
