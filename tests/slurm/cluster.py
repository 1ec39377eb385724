"""A real SLURM on one machine: munged, slurmctld and a slurmd for each simulated node; ports and folders of its own.

Several nodes share this host, so jobs tell them apart by SLURMD_NODENAME. The daemons are children or have a pid file,
and are ended by their numbers; nothing outside the folder is touched. Timers are short: a node is given up after 10 s.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"

_CONF = """\
ClusterName=resilient
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
KillWait=30
MinJobAge=300
JobRequeue=1
RequeueExit=99
TopologyPlugin=topology/tree
NodeName=n[1-{nodes}] NodeHostName={host} NodeAddr=127.0.0.1 Port={ports} CPUs=4 Boards=1 SocketsPerBoard=1 \
CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


class Cluster:
    """Start with `start`, end with `stop`. Commands are run with `run`, jobs looked at with `state` and `show`."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("SLURM_", "SBATCH_", "RESILIENT_"))
            },
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._munged: subprocess.Popen[bytes] | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ---- life

    def start(self) -> None:
        """Blocks until all nodes are idle. Raises RuntimeError with the end of the logs when they do not come up."""
        missing = [command for command in NEEDED if _path_of(command) is None]
        if missing:
            raise RuntimeError(f"these tests need a SLURM, and {', '.join(missing)} is not installed: {INSTALL}")
        self._start_munged()
        self._write_configuration()
        self._daemons["slurmctld"] = self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self._wait_until_idle()

    def start_node(self, node: str) -> None:
        self._daemons[node] = self._daemon("slurmd", "-D", "-N", node)

    def stop(self) -> None:
        """End all jobs and daemons, by their numbers. Safe to repeat."""
        if "slurmctld" in self._daemons and self._daemons["slurmctld"].poll() is None:
            self._end_jobs()
        for process in [*reversed(self._daemons.values()), self._munged]:
            if process is not None and process.poll() is None:
                process.terminate()
        for process in [*reversed(self._daemons.values()), self._munged]:
            if process is not None:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
        self._daemons.clear()

    def kill_node(self, node: str) -> None:
        """The sudden death of a node: its slurmd, its step daemons and all their processes, in that order."""
        daemon = self._daemons.pop(node)
        tasks = processes_of(node)
        stepds = {parent for task in tasks if "slurmstepd" in command_of(parent := parent_of(task))}
        for pid in [daemon.pid, *stepds, *tasks]:
            _kill(pid)
        daemon.wait(10)
        for pid in processes_of(node):
            _kill(pid)

    # ---- commands

    def run(self, *command: str, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
        """What a command prints. Blocks. Raises RuntimeError with what it says when it fails, if `check`."""
        done = subprocess.run(
            command,
            env={**self.environment, **(environment or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: Path, *options: str, environment: Mapping[str, str] | None = None) -> str:
        """The number of the job."""
        printed = self.run("sbatch", "--parsable", *options, str(script), environment=environment)
        return printed.strip().partition(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows about a job."""
        printed = self.run("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", printed))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def start_soon(self, job: str) -> None:
        """A requeued job waits two minutes by itself, so that its nodes forget its former life; these are quicker."""
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+4")

    def logs(self) -> str:
        """The end of what the daemons say, for whoever reads a failure."""
        return "\n".join(f"==> {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    # ---- parts

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        places = {name: f"{self.folder}/munge.{name}" for name in ("socket", "log-file", "pid-file", "seed-file")}
        places["socket"] = f"{self.folder}/munge.sock"
        places["log-file"] = f"{self.folder}/munged.log"
        options = [f"--{name}={place}" for name, place in places.items()]
        munged = _path_of("munged")
        assert munged is not None
        self._munged = subprocess.Popen(
            [munged, "--foreground", "--force", f"--key-file={key}", *options], stderr=subprocess.DEVNULL
        )

    def _write_configuration(self) -> None:
        ports = _free_ports(len(self.nodes) + 1)
        (self.folder / "state").mkdir()
        for node in self.nodes:
            (self.folder / f"spool.{node}").mkdir()
        (self.folder / "topology.conf").write_text(
            f"SwitchName=s1 Nodes=n1\nSwitchName=s2 Nodes=n[2-{len(self.nodes)}]\nSwitchName=top Switches=s[1-2]\n"
        )
        text = _CONF.format(
            host=socket.gethostname().partition(".")[0],
            controller_port=ports[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            folder=self.folder,
            nodes=len(self.nodes),
            ports=",".join(map(str, ports[1:])),
        )
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        path = _path_of(name)
        assert path is not None
        quiet = subprocess.DEVNULL
        return subprocess.Popen([path, *options], env=self.environment, stdin=quiet, stdout=quiet, stderr=quiet)

    def _wait_until_idle(self, deadline_s: float = 60.0) -> None:
        end = time.monotonic() + deadline_s
        while self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%t", check=False).split() != ["idle"] * len(self.nodes):
            if time.monotonic() > end:
                raise RuntimeError(f"the cluster did not come up\n{self.logs()}")
            time.sleep(0.2)

    def _end_jobs(self, deadline_s: float = 30.0) -> None:
        jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if jobs:
            self.run("scancel", "--signal=KILL", "--full", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
        end = time.monotonic() + deadline_s
        while self.run("squeue", "-h", "-o", "%A", check=False).split() and time.monotonic() < end:
            time.sleep(0.1)


def processes_of(node: str) -> list[int]:
    """The processes of jobs on a simulated node, by their environment."""
    wanted = f"SLURMD_NODENAME={node}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _path_of(command: str) -> str | None:
    return shutil.which(command) or shutil.which(command, path="/usr/sbin:/sbin:/usr/local/sbin")


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        with closing(one):
            pass
    return ports
