"""Who a run is: its url in one spelling, and an identity that lasts over restarts but differs from any other run's."""

import hashlib
import os
from pathlib import Path

from resilient.policy import Policy


def normal_url(url: str | os.PathLike[str]) -> str:
    """One spelling of a url: an absolute path for plain paths and file://, other URLs without a trailing slash."""
    text = os.fspath(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text.rstrip("/") if "://" in text else str(Path(text).absolute())


def run_identity(policy: Policy, url: str) -> str:
    """The policy's run id; else the launcher's, which survives a restart of the workers; else one from the url."""
    launched = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if policy.run_id:
        return policy.run_id
    if launched not in ("", "none"):
        return f"torchrun-{launched}"
    if os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{os.environ['SLURM_JOB_ID']}"
    return f"url-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
