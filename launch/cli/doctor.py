"""`resilient doctor`: whether this machine, and the job that it is asked in, are as the policy needs them."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from resilient.checkpoint.agent.address import node_name
from resilient.errors import UsageError
from resilient.launch.cli import options
from resilient.launch.cli.output import Exit, remark, tell, tell_json

if TYPE_CHECKING:
    from resilient.launch.doctor.finding import Finding
    from resilient.launch.doctor.question import Question

_MARKS = {"ok": "  ok", "warn": "WARN", "fail": "FAIL"}


@click.command()
@click.option("--url", help="Where durable snapshots are to go.")
@click.option("--policy", "policy_file", metavar="FILE", help="The policy; RESILIENT_ variables override it.")
@click.option("--peers", metavar="HOST,...", help="Other machines to reach, as host or host:port; outside of a job.")
@click.option("--image-bytes", metavar="SIZE", help='State of one rank, as "24 GiB": compared with room and speed.')
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="LOCAL_WORLD_SIZE, else 1, if not given.")
@click.option(
    "--patience", "patience_s", type=click.FloatRange(min=1), default=60.0, show_default=True, metavar="SECONDS",
    help="How long one check may take.",
)  # fmt: skip
@options.as_json
def doctor(as_json: bool, **asked: Any) -> int:
    """Check this machine before a job starts, and say what to change: limits, paths, rights, clocks, addresses.

    Run by torchrun, srun or mpirun it examines all nodes of the job, and whether all pairs reach one another. Nothing
    is changed; probe files are removed. Exit code 1: something would not work.
    """
    question = _question(**asked)
    from resilient.launch.doctor.examine import examine
    from resilient.launch.doctor.job import launcher_of

    launcher = launcher_of(os.environ)
    if launcher is not None:
        return _in_job(launcher, question, as_json=as_json)
    examination = examine(question)
    code = _report({node_name(): examination.findings}, as_json=as_json)
    _leave(code, bool(examination.overdue))
    return code


def _question(
    url: str | None,
    policy_file: str | None,
    peers: str | None,
    image_bytes: str | None,
    ranks_per_node: int | None,
    patience_s: float,
) -> "Question":
    """From the options. Raises UsageError for what cannot be meant, PolicyError among it."""
    from resilient.checkpoint.place import normal_url
    from resilient.launch.doctor.question import Question
    from resilient.policy import Policy, parse_bytes

    try:
        size = None if image_bytes is None else parse_bytes(image_bytes)
    except ValueError as error:
        raise UsageError(f'--image-bytes: {error}; write a number of bytes, or a size such as "24 GiB"') from error
    return Question(
        url=None if url is None else normal_url(url),
        policy=Policy.from_environment(None if policy_file is None else Policy.from_file(policy_file)),
        peers=tuple(peer.strip() for peer in (peers or "").split(",") if peer.strip()),
        image_bytes=size,
        ranks_per_node=ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        patience_s=patience_s,
        environment=os.environ,
    )


def _in_job(launcher: Any, question: "Question", *, as_json: bool) -> int:
    """The part of this rank: the first of each node examines it, rank 0 tells what all have found."""
    from resilient.launch.doctor.examine import Examination, examine
    from resilient.launch.doctor.job import meet

    found = Examination()
    try:
        meeting = meet(launcher, question.patience_s)
        together = meeting.open()
        if not meeting.leads:
            return Exit.OK
        together = together or meeting.pairs(question, node_name())
        found = examine(question)
        everything = meeting.collect(node_name(), found.findings + together)
    except RuntimeError as error:  # torch's, of the store: rank 0 serves it, and may have ended
        told = str(error).partition("Exception raised from")[0].strip()  # what follows are frames of C++
        remark(f"resilient doctor: the job's store is out of reach ({told}); set MASTER_ADDR to rank 0's address")
        code = Exit.FAILED
    else:
        code = _report(everything, as_json=as_json) if everything else Exit.OK
    _leave(code, bool(found.overdue))
    return code


def _report(nodes: "Mapping[str, list[Finding]]", *, as_json: bool) -> Exit:
    """Tell what was found on each node; what is the same on several is told once."""
    from resilient.launch.doctor.finding import Verdict, worst

    verdict = worst(finding for findings in nodes.values() for finding in findings)
    if as_json:
        told = {node: [finding.as_json() for finding in findings] for node, findings in nodes.items()}
        tell_json({"verdict": str(verdict), "nodes": told})
    else:
        _tell(nodes)
    return Exit.FOUND if verdict is Verdict.FAIL else Exit.OK


def _tell(nodes: "Mapping[str, list[Finding]]") -> None:
    where: dict[Finding, list[str]] = {}
    for node, findings in nodes.items():
        for finding in findings:
            where.setdefault(finding, []).append(node)
    width = max(len(finding.name) for finding in where)
    for finding, at in where.items():
        names = "" if len(at) == len(nodes) else f"  [{', '.join(at)}]"
        tell(f"{_MARKS[finding.verdict]}  {finding.name:<{width}}  {finding.what}{names}")
        if finding.change:
            tell(f"      {'':<{width}}  -> {finding.change}")
    counts = Counter(str(finding.verdict) for finding in where)
    tell(f"{counts['fail']} would not work, {counts['warn']} could be better, {counts['ok']} are well")


def _leave(code: int, overdue: bool) -> None:
    """A check that hangs has a thread that cannot be ended; the interpreter would wait for it."""
    if overdue:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
