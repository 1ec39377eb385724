"""The batch script of a SlurmJob, as text for people to read. Pure: nothing is run, no environment is looked at.

    #SBATCH lines → what the library reads → the agents' step → the training step → what its end means

What SLURM does, and the script therefore allows for (tested in tests/slurm):
- `--signal=B:USR1@grace` tells only the batch shell, which passes it on; a preemption, and `scancel` without --batch,
  tell all processes of all steps, launchers and agents among them, and a preemption tells the batch shell nothing.
- A job that ends within the grace time of its preemption is over, not requeued, unless it asks for that itself.
- A node that fails ends the job, unless --no-kill was given; then steps can be started on the nodes that are left.
"""

import re
import shlex

from resilient.launch.slurm.job import SlurmJob

_WIDTH = 40  # where remarks on #SBATCH lines begin
_EXPANDED = re.compile(r"\$(?:SLURM_[A-Z_]+|\{SLURM_[A-Z_]+\})")
_STEADY_S = 600  # a training step that ran for so long has not failed "in a row"
_ONE_FOR_ALL = "--kill-on-bad-exit=0 --wait=30"  # the others end by themselves, or are ended after 30 s


def batch_script(job: SlurmJob) -> str:
    """The script; hand it to sbatch, or keep it and change it."""
    blocks = [_header(job), _variables(job), _on_node(job), _agents(job), _training(job), _end(job)]
    return "\n".join(blocks)


def quoted(argument: str) -> str:
    """For the shell, as it is; but $SLURM_... (of an array task, for example) is left for the job to fill in."""
    if not _EXPANDED.search(argument):
        return shlex.quote(argument)
    parts = re.split(f"({_EXPANDED.pattern})", argument)
    escaped = (part if at % 2 else re.sub(r'([\\"$`])', r"\\\1", part) for at, part in enumerate(parts))
    return f'"{"".join(escaped)}"'


def _header(job: SlurmJob) -> str:
    spare = f"{job.nodes} that train, {job.spares} to step in" if job.spares else ""
    lines = [
        (f"--job-name={job.name}", ""),
        (f"--nodes={job.all_nodes}", spare),
        ("--ntasks-per-node=1" if job.launcher != "srun" else f"--ntasks-per-node={job.ranks_per_node}", ""),
        *([(f"--gpus-per-node={job.gpus_per_node}", "")] if job.gpus_per_node else []),
        *([(f"--time={job.time}", "")] if job.time else []),
        *([(f"--array={job.array}", "each task is a job of its own, with its own agents")] if job.array else []),
        *((option, "") for option in job.options),
        (f"--signal=B:USR1@{job.grace_s}", f"tell this shell (B:) {job.grace_s} s before the time is up"),
        ("--requeue", "it may be started again, and goes on where it was"),
        *([("--no-kill", "the loss of a node does not end the job: a spare steps in")] if job.spares else []),
        ("--open-mode=append", ""),
        ("--output=slurm-%j.txt", "what this shell says; the nodes have files of their own, below"),
    ]
    return "".join(
        [
            "#!/bin/bash\n",
            *(f"{f'#SBATCH {option}':<{_WIDTH}}{f'  # {why}' if why else ''}".rstrip() + "\n" for option, why in lines),
        ]
    )


def _variables(job: SlurmJob) -> str:
    setup = "".join(f"{line}\n" for line in job.setup)
    given = "".join(f"export {name}={quoted(value)}\n" for name, value in sorted(job.variables.items()))
    return f"""\
set -u
{setup}
# What the library reads. The token, by which the agents of the nodes know one another, is made here and goes to the
# steps in their environment: it is in no file and on no command line.
RESILIENT_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RESILIENT_TOKEN
export RESILIENT_RUN_ID=slurm-$SLURM_JOB_ID  # a requeued job keeps its number
export RESILIENT_LAUNCH=$RESILIENT_RUN_ID.${{SLURM_RESTART_COUNT:-0}}  # no life of it waits for the one before
export RESILIENT_RUNTIME_DIR=/tmp            # sockets; on the node, and of a short path
export RESILIENT_PREEMPT_SIGNALS="SIGUSR1 SIGTERM" RESILIENT_GRACE_S={job.grace_s}
{given}
logs=slurm-$SLURM_JOB_ID
job={_name_of_job(job)}
mkdir -p "$logs"
say() {{ echo "$(date +%FT%T) $*"; }}
say "start ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST"
"""


def _name_of_job(job: SlurmJob) -> str:
    if job.array is None:
        return "$SLURM_JOB_ID"
    return "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # a task's number may be that of the whole array, too"


def _on_node(job: SlurmJob) -> str:
    place = (
        "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS\n"
        if job.launcher == "srun"
        else "export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))  # the nodes meet at the first of them\n"
    )
    return f"""\
# What each task does first. It does not heed the notices, which are for the training processes (these set handlers of
# their own); it says which node it is on, and waits until that node's agents can be asked for.
# shellcheck disable=SC2016  # the variables are those of the nodes
on_node='trap "" USR1 TERM
export RESILIENT_NODE=$SLURMD_NODENAME
export RESILIENT_AGENT_STEP=/tmp/resilient-$UID/slurm-$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}.$SLURMD_NODENAME.sock
{place}until [ "$0" = agents ] || [ -S "$RESILIENT_AGENT_STEP" ] || [ "$SECONDS" -gt 60 ]; do sleep 0.2; done
exec "$@"'
"""


def _agents(job: SlurmJob) -> str:
    return f"""\
# The agents: a step of their own, so that they, the snapshots in their memory and what they still write outlive the
# training step. It shares the nodes' resources with it (--overlap), and a lost node does not end it.
on_each_node() {{
    nodes=$(nodes_left)
    exec srun --overlap --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --no-kill --kill-on-bad-exit=0 \\
        --output="$logs/agents.%N.txt" --open-mode=append bash -c "$on_node" agents "$@"
}}
nodes_left() {{ squeue --noheader --jobs="$job" --format=%D; }}
on_each_node resilient agent --grace {job.grace_s} &

finish_agents() {{ # returns when all that is pending has been written
    (on_each_node timeout {job.grace_s + 60} resilient agent --finish)
}}
"""


def _training(job: SlurmJob) -> str:
    return f"""\
# The training: a step that may be started several times. Its first node is this one, where the others meet it.
master=$(hostname)
port=$((20000 + SLURM_JOB_ID % 10000))
train() {{
{_start(job)}
}}
"""


def _start(job: SlurmJob) -> str:
    command = " ".join(map(quoted, job.command))
    here = 'exec srun --nodelist="$SLURMD_NODENAME"'
    if job.launcher == "srun":
        ranks = job.nodes * job.ranks_per_node
        return f"""\
    export MASTER_ADDR=$master MASTER_PORT=$port
    {here} --nodes={job.nodes} --ntasks={ranks} --ntasks-per-node={job.ranks_per_node} {_ONE_FOR_ALL} \\
        --output="$logs/train.%N.%t.txt" --open-mode=append bash -c "$on_node" rank \\
        python {command}"""
    nodes = job.all_nodes if job.launcher == "run" else job.nodes
    lost = "--no-kill --kill-on-bad-exit=0" if job.spares and job.launcher == "run" else _ONE_FOR_ALL
    return f"""\
    # {_how(job)}
    {here} --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 {lost} \\
        --output="$logs/train.%N.txt" --open-mode=append --cpu-bind=none bash -c "$on_node" node \\
        {_launcher(job)} \\
        --nnodes={job.nodes} --nproc-per-node={job.ranks_per_node} \\
        --rdzv-backend=c10d --rdzv-endpoint="$master:$port" \\
        {command}"""


def _launcher(job: SlurmJob) -> str:
    if job.launcher == "run":
        return f'resilient run --max-restarts={job.restarts} --rdzv-id="$RESILIENT_RUN_ID"'
    return 'torchrun --max-restarts=0 --signals-to-handle=SIGINT --rdzv-id="$RESILIENT_RUN_ID.$lives"'


def _how(job: SlurmJob) -> str:
    if job.launcher == "torchrun":
        return "One life a step: torchrun would start ranks again that have ended because the job is to stop."
    return f"Restarts ranks from memory by itself{'; the spares wait in the rendezvous' if job.spares else ''}."


def _end(job: SlurmJob) -> str:
    return f"""\
notice=
cancelled=
training=
pass_on() {{
    say "$1: passed on to the training"
    [ -n "$training" ] && kill -USR1 "$training"
}}
trap 'notice=1; pass_on notice' USR1
trap 'cancelled=1; pass_on cancelled' TERM # a preemption does not tell this shell

requeue() {{
    finish_agents
    [ -n "$cancelled" ] && say "cancelled: $1" && exit 0
    say "requeued: $1"
    trap - USR1 TERM
    scontrol requeue "$job" && sleep 300 # SLURM ends this script
    exit 99                                       # where users may not, RequeueExit=99 in slurm.conf does it
}}

# What the end of the training step means: 0 done, 75 safely stopped, 76 start again at once, else a failure, after
# which it starts again from the newest snapshot, mostly from memory.
failures=0
lives=0
while :; do
    began=$SECONDS
    lives=$((lives + 1))
    left=$(nodes_left)
    [ "${{left:-0}}" -lt {job.nodes} ] && requeue "of {job.nodes} nodes $left are left"
    train &
    training=$!
    until wait "$training"; code=$?; ! kill -0 "$training" 2>/dev/null; do :; done # a notice interrupts it
    training=
    [ "$code" -eq 0 ] && break
    [ "$code" -eq 75 ] && requeue "the training has stopped, and its last step is safe"
    [ -n "$notice$cancelled" ] && requeue "the training ended with code $code after the notice"
    [ "$code" -eq 76 ] && continue
    [ $((SECONDS - began)) -gt {_STEADY_S} ] && failures=0
    failures=$((failures + 1))
    if [ "$failures" -gt {job.restarts} ]; then
        say "given up: the training failed $failures times, at last with code $code; see $logs"
        finish_agents
        exit "$code"
    fi
    say "the training failed with code $code: life $((lives + 1)) starts from the newest snapshot"
done
finish_agents
say "done"
"""
