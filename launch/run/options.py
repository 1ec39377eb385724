"""The command line of `resilient run`: torchrun's own parser with a few options of ours → Settings.

    resilient run [options] script.py [its arguments]

What torchrun does badly by default is settled here: a job has a name that it keeps, a job on one node needs no
rendezvous options, --node-rank and --master-addr give an elastic rendezvous too, and a mistake is told before
anything is started.
"""

import argparse
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, get_args_parser, parse_min_max_nnodes

from resilient.errors import UsageError
from resilient.launch.run.identity import digest_of, run_id_of, token_of
from resilient.launch.run.rendezvous import LOCAL
from resilient.policy import PREFIX, Policy

_USAGE = "resilient run [options] script.py [arguments of the script]"
_PREEMPT, _REGROUP = "SIGUSR1", "SIGUSR2"  # SIGTERM still ends a worker at once, as when another has failed
_MASTER_PORT = 29500  # torchrun's
_RESTARTS = 3
_PROGRESS_STEPS = 10
_END_PATIENCE_S = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that a launcher needs to know. `variables`: what the workers find in their environment beside ours.

    `log_dir` is None where none was asked for. `end_patience_s`: how long the others have once one has failed.
    """

    config: LaunchConfig
    entrypoint: str
    arguments: tuple[str, ...]
    command: str
    policy: Policy
    variables: Mapping[str, str]
    token: str | None = field(repr=False)
    progress_steps: int
    end_patience_s: float
    log_dir: Path | None
    stop_signals: tuple[signal.Signals, ...]
    regroup_signal: signal.Signals


def parse(arguments: Sequence[str], environment: Mapping[str, str], scratch: Path) -> Settings:
    """The settings that these arguments and this environment mean. Starts nothing.

    `scratch`: a private folder, where logs go that nobody asked for. Raises UsageError, PolicyError; SystemExit after
    --help and for options that torchrun does not have.
    """
    given = _parser(environment).parse_args(list(arguments))
    _check_script(given)
    variables = _variables(given)
    policy = Policy.from_environment(environment={**environment, **variables})
    variables |= _signals(policy)
    policy = Policy.from_environment(environment={**environment, **variables})
    command = [given.training_script, *given.training_script_args]
    given.rdzv_id = run_id_of(None if given.standalone else given.rdzv_id, command, os.getcwd(), environment)
    log_dir = given.log_dir
    if log_dir is None and given.redirects == given.tee == "0":  # else torch chooses a place that stays
        given.log_dir = str(scratch / "logs")
    _arrange_meeting(given)
    config, entrypoint, worker_arguments = _config(given)
    return Settings(
        config=config,
        entrypoint=str(entrypoint),
        arguments=tuple(worker_arguments),
        command=digest_of(command, ""),
        policy=policy,
        variables=variables,
        token=token_of(given.token_file, environment),
        progress_steps=given.progress_steps,
        end_patience_s=_END_PATIENCE_S if given.shutdown_timeout is None else given.shutdown_timeout,
        log_dir=Path(log_dir) if log_dir else None,
        stop_signals=tuple(signal.Signals(number) for number in policy.signals("preempt_signals")),
        regroup_signal=signal.Signals(policy.signals("regroup_signals")[0]),
    )


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.prog, parser.usage = "resilient run", _USAGE
    parser.description = "Run a training script as torchrun does, so that no failure costs more than a step."
    parser.epilog = "docs/run.md says what happens when."
    ours = parser.add_argument_group("options of resilient")
    ours.add_argument("--policy", metavar="FILE", help="a policy file, .toml or .json (RESILIENT_POLICY)")
    ours.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a key of the policy; may be given several times",
    )
    ours.add_argument("--grace-s", metavar="SECONDS", help="from the notice until the machine is taken away")
    ours.add_argument("--token-file", metavar="FILE", help="the secret that the nodes share; else they agree on one")
    ours.add_argument(
        "--progress-steps",
        metavar="N",
        type=int,
        default=_PROGRESS_STEPS,
        help=f"steps after which failures count anew for --max-restarts (default {_PROGRESS_STEPS})",
    )
    if "PET_MAX_RESTARTS" not in environment:
        parser.set_defaults(max_restarts=_RESTARTS)
    if "PET_MASTER_PORT" not in environment:
        parser.set_defaults(master_port=None)  # older torch has 29500, and a job on one node needs no port
    if not any(action.dest == "shutdown_timeout" for action in parser._actions):  # before torch 2.11
        ours.add_argument("--shutdown-timeout", type=int, help="seconds that workers have to end once one has failed")
    return parser


def _check_script(given: argparse.Namespace) -> None:
    script = given.training_script
    if not (given.module or given.no_python) and not Path(script).is_file():
        raise UsageError(f"{script}: there is no such script (for a module give -m, for a program --no-python)")
    if given.progress_steps < 1:
        raise UsageError(f"--progress-steps {given.progress_steps} cannot be; give it a whole number of at least 1")
    given.run_path = False  # each worker is a process of its own in any case
    if given.start_method != "spawn":
        raise UsageError("--start-method has no effect for a script; leave it out")


def _variables(given: argparse.Namespace) -> dict[str, str]:
    """The RESILIENT_ variables that the options stand for."""
    variables: dict[str, str] = {}
    if given.policy is not None:
        variables[f"{PREFIX}POLICY"] = str(Path(given.policy).absolute())
    for pair in given.set:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {pair}: give it a key and a value, such as --set durable_every=500")
        variables[f"{PREFIX}{key.strip().upper()}"] = value
    if given.grace_s is not None:
        variables[f"{PREFIX}GRACE_S"] = given.grace_s
    return variables


def _signals(policy: Policy) -> dict[str, str]:
    """Which signals make the workers stop by agreement, where the policy does not say."""
    chosen: dict[str, str] = {}
    if policy.preempt_signals is None:
        chosen[f"{PREFIX}PREEMPT_SIGNALS"] = _PREEMPT
    if policy.regroup_signals is None:
        chosen[f"{PREFIX}REGROUP_SIGNALS"] = _REGROUP
    return chosen


def _arrange_meeting(given: argparse.Namespace) -> None:
    """An elastic rendezvous, whatever torchrun would make of the options."""
    try:
        _, most = parse_min_max_nnodes(given.nnodes)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--nnodes {given.nnodes}: give it a number of nodes, or MIN:MAX") from error
    fixed = given.rdzv_backend == "static"
    if given.standalone or (fixed and most == 1 and not given.rdzv_endpoint and given.master_port is None):
        given.rdzv_backend, given.rdzv_endpoint = "c10d", LOCAL
        given.local_addr = given.local_addr or "127.0.0.1"
    elif fixed:
        given.rdzv_backend = "c10d"
        given.rdzv_endpoint = given.rdzv_endpoint or f"{given.master_addr}:{given.master_port or _MASTER_PORT}"
        if given.node_rank:
            given.rdzv_conf = ",".join(filter(None, [given.rdzv_conf, "is_host=0"]))
    given.standalone = False
    given.node_rank = 0  # what it had to say has been said


def _config(given: argparse.Namespace) -> tuple[LaunchConfig, Any, list[str]]:
    if given.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which makes a banner of it
    try:
        return config_from_args(given)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UsageError(f"{error or 'the options do not fit together'} (see resilient run --help)") from error
