"""What a probed place is good for: rights, speed against the times that the policy allows, room, clock, claim. Pure."""

from resilient.launch.cli.output import size_text
from resilient.launch.doctor.finding import Finding, fail, ok, warn
from resilient.launch.doctor.question import Question
from resilient.launch.doctor.storage import Probe

WARN_SKEW_S = 5.0
_MOST_SKEW_S = 300.0  # object stores refuse signed requests at some minutes of difference (S3: 15)


def decide(level: str, probe: Probe, question: Question) -> list[Finding]:
    """`level`: "local" or "url"."""
    findings: list[Finding | None] = [decide_rights(level, probe), decide_claim(level, probe, question)]
    if probe.refused is None:
        findings += [
            decide_direct(level, probe),
            decide_speed(level, probe, question),
            decide_room(level, probe, question),
            decide_clock(level, probe),
        ]
    if probe.left_behind:
        findings.append(warn(f"{level} probe", f"{probe.left_behind} could not be removed", "remove it"))
    return [finding for finding in findings if finding is not None]


def decide_rights(level: str, probe: Probe) -> Finding:
    name = f"{level} rights"
    if probe.refused is not None:
        right, error = probe.refused
        change = f"have this user (or key) allowed to {right} there, or give another place"
        return fail(name, f"{probe.place}: cannot {right}: {error}", change)
    if probe.overwrites:
        told = (
            f"{probe.place}: the service ignores conditional writes: jobs that start at one moment both take the place"
        )
        return warn(name, told, "give each job a URL of its own")
    made = f" (in {probe.folder}; the rest of the path will be made)" if _is_above(probe) else ""
    return ok(name, f"{probe.place}: write, read, list, delete{made}")


def decide_claim(level: str, probe: Probe, question: Question) -> Finding | None:
    """Another run's claim is in the way as long as that run lives; one of our own may be of a job that still runs."""
    held = probe.claim.get("run_id")
    if level != "url" or held is None:
        return None
    name, ours = "url claim", question.policy.run_identity(probe.place, question.environment)
    process = probe.claim.get("process", {})
    who = f"the run {held!r} (process {process.get('pid')} on {process.get('host')})"
    if not probe.claim_beats:
        return ok(name, f"held by {who}, which seems to be dead: it is taken over within a minute")
    if held != ours:
        told = f"held by {who}, which lives; this would be the run {ours!r}, and be refused"
        return fail(name, told, "stop that job first, or give another URL")
    if process.get("host") == question.host:
        told = f"held by this run's agent here, process {process.get('pid')}: it waits for the job, or serves it"
        return ok(name, told)
    told = f"held by this run, by process {process.get('pid')} on {process.get('host')}, which lives"
    advice = "make sure that no job of this run is left there, or give this one another URL"
    if probe.claim.get("rank_0", True):
        return fail(name, f"{told} and has a rank 0 that trains: a job that starts here is refused", advice)
    return warn(name, f"{told}, without its rank 0: a job that starts here takes the place over", advice)


def decide_direct(level: str, probe: Probe) -> Finding | None:
    if probe.direct is None:
        return None
    if probe.direct:
        return ok(f"{level} O_DIRECT", f"{probe.folder} takes writes past the page cache")
    return warn(
        f"{level} O_DIRECT",
        f"{probe.folder} takes no writes past the page cache: they go through it, and push out the job's own pages",
        "use a file system that knows O_DIRECT (ext4, xfs, Lustre, NFS), if speed matters",
    )


def decide_speed(level: str, probe: Probe, question: Question) -> Finding:
    """How long writing takes, against the grace time (for the durable level) and the time limit of a write."""
    name, policy = f"{level} speed", question.policy
    if not probe.write_s or not probe.written_bytes:
        change = "free space there, or give another place"
        return warn(name, f"not measured: {probe.place} has {size_text(probe.free_bytes or 0)} left", change)
    rate = probe.written_bytes / probe.write_s
    told = f"{size_text(int(rate))}/s written"
    if probe.read_s:
        told += f", {size_text(int(probe.written_bytes / probe.read_s))}/s read"
    if question.image_bytes is None or question.node_image_bytes is None:
        return ok(name, f"{told}; --image-bytes would tell how long a snapshot takes")
    image_s, node_s = question.image_bytes / rate, question.node_image_bytes / rate
    told += f": {size_text(question.node_image_bytes)} of this node take {node_s:.1f} s"
    if image_s > policy.write_timeout_s:
        return fail(
            name,
            f"{told}; one image takes {image_s:.0f} s, and write_timeout_s gives it {policy.write_timeout_s:g}",
            f"set write_timeout_s to {2 * image_s:.0f} or more, or use a faster place",
        )
    if level == "url" and policy.grace_s is not None and node_s > policy.grace_s:
        return warn(
            name,
            f"{told}, and grace_s leaves {policy.grace_s:g}: a preempted job would not be safe in time",
            f"have the notice come {node_s:.0f} s or more before the end, or use a faster place for snapshots",
        )
    if level == "url" and policy.preempt_signals is not None and policy.grace_s is None:
        told += "; grace_s would tell whether a preempted job is safe in time"
    return ok(name, told)


def decide_room(level: str, probe: Probe, question: Question) -> Finding | None:
    if probe.free_bytes is None:
        return None
    name, left = f"{level} room", f"{size_text(probe.free_bytes)} left in {probe.folder}"
    if question.node_image_bytes is None:
        return ok(name, left)
    keep = question.policy.local_keep_last if level == "local" else question.policy.keep_last
    needed = (keep + 1) * question.node_image_bytes
    told = f"{left}; {keep} snapshots and the one being written take {size_text(needed)} for this node"
    if probe.free_bytes >= needed:
        return ok(name, told)
    key = "local_keep_last" if level == "local" else "keep_last"
    change = f"free space, or lower {key}"
    return fail(name, told, change) if probe.free_bytes < question.node_image_bytes else warn(name, told, change)


def decide_clock(level: str, probe: Probe) -> Finding | None:
    return None if probe.skew_s is None else clock_finding(f"{level} clock", "the clock of the service", probe.skew_s)


def clock_finding(name: str, whose: str, skew_s: float) -> Finding:
    """`skew_s`: the other clock minus ours. A run's lives are put in order by the clock of the node that leads them."""
    if abs(skew_s) <= WARN_SKEW_S:
        return ok(name, f"{whose} and this machine's agree within {max(1.0, abs(skew_s)):.0f} s")
    told = f"{whose} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    change = "have the clocks set (chrony, systemd-timesyncd)"
    return fail(name, told, change) if abs(skew_s) > _MOST_SKEW_S else warn(name, told, change)


def _is_above(probe: Probe) -> bool:
    return probe.folder is not None and not probe.place.rstrip("/").endswith(probe.folder)
