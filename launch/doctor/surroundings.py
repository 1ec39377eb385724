"""What would end the agent too early, or hide it: SLURM's steps, containers, folders of sockets that come and go.

The agent has to outlive the trainers, and they have to find it again, so its process tree and its folder matter.
"""

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resilient.checkpoint.agent.address import address_of, check_private
from resilient.checkpoint.agent.step import VARIABLE as STEP
from resilient.checkpoint.agent.step import ask
from resilient.checkpoint.levels.files import FileStore
from resilient.errors import ResilientError, UsageError
from resilient.launch.doctor.finding import Finding, fail, ok, warn
from resilient.launch.doctor.question import Question
from resilient.launch.doctor.storage import nearest_folder

_ASK_S = 5.0
_TRACKING = re.compile(r"^ProctrackType\s*=\s*(\S+)", re.MULTILINE)
_ELSEWHERE = "set RESILIENT_RUNTIME_DIR to a folder on a disk of this node, with a short path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Facts about this process's place. `tracking`: how SLURM finds the processes of a step; "" if not known.

    `step`: what came of asking the agent step that the environment names: "", "answers", or an error.
    `socket_error`: why no socket can be made in `folder`'s nearest existing folder. `private_mount`: where the mount
    that holds it is one service's own, that mount's source.
    """

    job: str
    control_group: str
    tracking: str
    step: str
    container: str
    folder: str
    folder_error: str
    socket_error: str
    folder_near: bool
    from_login: bool
    private_mount: str


def examine(question: Question) -> list[Finding]:
    """Measure and decide. Blocks for some seconds at most, where SLURM's commands do not answer."""
    return decide(measure(question))


def decide(found: Surroundings) -> list[Finding]:
    return [decide_process_tree(found), decide_container(found), decide_folder(found)]


def decide_process_tree(found: Surroundings) -> Finding:
    """Whether an agent would outlive the step of its trainers."""
    name = "agent's life"
    if found.step:
        if found.step == "answers":
            return ok(name, "an agent step of its own starts the agents")
        return fail(name, f"{STEP} names an agent step that does not answer: {found.step}", "start `resilient agent`")
    if not found.job:
        return ok(name, "no SLURM job: the agent outlives its trainers")
    in_group = "slurm" in found.control_group or found.tracking == "proctrack/cgroup"
    if not in_group:
        how = found.tracking or "no control group of SLURM"
        return ok(name, f"SLURM job {found.job}, {how}: the agent outlives the step")
    return warn(
        name,
        f"SLURM job {found.job} tracks processes by control group: the agent ends with the step of its trainers",
        "start `resilient agent` in a step of its own; `resilient slurm` writes such a script",
    )


def decide_container(found: Surroundings) -> Finding:
    if not found.container:
        return ok("container", "none")
    told = f"{found.container}: memory outlives a restart of the trainers in it, but not of the container itself"
    return ok("container", f"{told}; parity on other nodes, or the durable level, does")


def decide_folder(found: Surroundings) -> Finding:
    """Whether trainers and commands will find the agent's socket, now and after a restart."""
    name = "agent's folder"
    if found.folder_error:
        return fail(name, found.folder_error, _ELSEWHERE)
    if found.socket_error:
        return fail(name, f"{found.folder}: no socket can be made: {found.socket_error}", _ELSEWHERE)
    if not found.folder_near:
        return warn(name, f"{found.folder} is on a network file system", _ELSEWHERE)
    if found.private_mount:
        return warn(
            name,
            f"{found.folder} is in a mount of one service's own ({found.private_mount}): processes of others, and of "
            "its next start, do not find the agent",
            f"turn PrivateTmp off for that service, or {_ELSEWHERE}",
        )
    if found.from_login:
        return warn(
            name,
            f"{found.folder} goes away when you log out, and the agent could not be found again",
            "set RESILIENT_RUNTIME_DIR=/tmp, or loginctl enable-linger",
        )
    return ok(name, found.folder)


def measure(question: Question) -> Surroundings:
    """Facts of this process and its environment."""
    environment = question.environment
    folder, folder_error = _agent_folder(question)
    existing = nearest_folder(Path(folder))
    return Surroundings(
        job=environment.get("SLURM_JOB_ID", ""),
        control_group=_read("/proc/self/cgroup"),
        tracking=_tracking() if environment.get("SLURM_JOB_ID") else "",
        step=_ask_step(environment),
        container=_container(environment),
        folder=folder,
        folder_error=folder_error,
        socket_error=_try_socket(existing),
        folder_near=FileStore(str(existing)).is_near,
        from_login=_ends_with_login(folder, environment),
        private_mount=private_mount(_read("/proc/self/mountinfo"), folder),
    )


def _agent_folder(question: Question) -> tuple[str, str]:
    """The folder that the agent of this run would have, and what is wrong with its name."""
    url = question.url or ""
    run_id = question.policy.run_identity(url, question.environment)
    folder = Path("/")
    try:
        folder = address_of(run_id, url, environment=question.environment).folder
        for made in (folder.parent, folder):
            if os.path.lexists(made):
                check_private(made)
    except UsageError as error:
        return str(folder), str(error)
    return str(folder), ""


def private_mount(mountinfo: str, folder: str) -> str:
    """The source of the mount that holds a folder, where systemd made it for one service; "" otherwise.

    A line of mountinfo (proc(5)): id, parent, device, root within the file system, mount point, options, ...
    """
    found, longest = "", -1
    for line in mountinfo.splitlines():
        root, point = line.split(" ")[3:5]
        if f"{folder}/".startswith(f"{point.rstrip('/')}/") and len(point) >= longest:
            found, longest = root, len(point)
    return found if "systemd-private-" in found else ""


def _ends_with_login(folder: str, environment: Mapping[str, str]) -> bool:
    """logind removes /run/user/<uid> at a user's last logout, unless the user lingers."""
    if environment.get("RESILIENT_RUNTIME_DIR") or not folder.startswith(f"/run/user/{os.getuid()}/"):
        return False
    return not Path("/var/lib/systemd/linger", environment.get("USER", "")).is_file()


def _try_socket(folder: Path) -> str:
    """Why no Unix socket can be made in a folder; "" if it can."""
    try:
        with tempfile.TemporaryDirectory(prefix="rd-", dir=folder) as made, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{made}/s")
    except OSError as error:
        return str(error)
    return ""


def _ask_step(environment: Mapping[str, str]) -> str:
    path = environment.get(STEP)
    if not path:
        return ""
    try:
        ask(Path(path), {"op": "status"}, _ASK_S)
    except (OSError, ResilientError) as error:
        return f"{path}: {error}"
    return "answers"


def _tracking() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
        found = _TRACKING.search(done.stdout)
        return found[1] if found else ""
    return ""


def _container(environment: Mapping[str, str]) -> str:
    """A word for the container that this process is in; "" outside of one."""
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "a pod of Kubernetes"
    for path, name in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman"), ("/.singularity.d", "Apptainer")):
        if os.path.exists(path):
            return f"a container of {name}"
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
