"""The block `"resilient": {...}` of a DeepSpeed configuration, checked when it is read. Imports nothing of DeepSpeed.

"resilient": {"url": "s3://bucket/run7", "every_step": true, "policy": {"durable_every": 500}}
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilient.errors import UsageError
from resilient.policy import Policy

BLOCK = "resilient"
_KEYS = ("url", "every_step", "policy")
_TESTED = "0.19."
_EXTRA = "pip install 'torch-resilient[deepspeed]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookConfig:
    """What the block says. `url`: where durable snapshots go. `every_step`: a snapshot after every optimizer step by
    itself, of which the policy says which are durable; those that the program asks for are then durable in any case.
    Else snapshots are taken at the calls of `save_checkpoint` alone, and the policy is about them."""

    url: str
    every_step: bool
    policy: Policy

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "HookConfig":
        """From a whole DeepSpeed configuration. Raises UsageError for a block that is missing or has an unknown key
        or type, PolicyError for its policy."""
        block = config.get(BLOCK)
        where = f'the block "{BLOCK}" of the DeepSpeed configuration'
        if not isinstance(block, Mapping):
            has = "is missing" if block is None else f"is {block!r}"
            raise UsageError(f'{where} {has}: add "{BLOCK}": {{"url": "<folder or URL for snapshots>"}}')
        for key in block:
            if key not in _KEYS:
                raise UsageError(f"{where} has an unknown key {key!r}{_nearest(str(key))}; it takes {', '.join(_KEYS)}")
        url, every_step, policy = block.get("url"), block.get("every_step", False), block.get("policy", {})
        if not isinstance(url, str | os.PathLike) or not str(url):
            has = "no url" if url is None else f"url {url!r}"
            raise UsageError(f'{where} has {has}: give the folder or URL for snapshots, "url": "s3://bucket/run"')
        if not isinstance(every_step, bool):
            raise UsageError(f"{where} has every_step {every_step!r}: give true or false")
        if not isinstance(policy, Mapping):
            raise UsageError(f'{where} has the policy {policy!r}: give an object, such as {{"durable_every": 500}}')
        # Whoever calls save_checkpoint wants that very step on a disk, unless the policy says otherwise.
        defaults = {} if every_step else {"durable_every": 1}
        return cls(
            url=os.fspath(url),
            every_step=every_step,
            policy=Policy.from_mapping({**defaults, **policy}, f"policy in {where}"),
        )


def check_version(version: str) -> str | None:
    """What to tell the user about this version of DeepSpeed; None for the ones that are tested."""
    if version.startswith(_TESTED):
        return None
    return (
        f"DeepSpeed {version} is not tested with this library, which knows the engine of {_TESTED}x from within: if "
        f"anything fails, {_EXTRA}"
    )


def no_engine(kind: str, missing: Sequence[str], version: str | None) -> UsageError:
    """What to raise for something without these attributes of an engine. `version`: DeepSpeed's, if it is imported."""
    advice = None if version is None else check_version(version)
    text = f"attach({kind}): this is no engine that deepspeed.initialize has made: it has no {', '.join(missing)}"
    return UsageError(text if advice is None else f"{text}; {advice}")


def other_engine(error: AttributeError, advice: str) -> UsageError:
    """What to raise where an engine of a version that is not tested is another one within."""
    return UsageError(f"this engine is not the one that this library knows ({error}); {advice}")


def not_installed(error: ImportError) -> UsageError:
    """What to raise where DeepSpeed cannot be imported."""
    return UsageError(f"DeepSpeed cannot be imported ({error}): {_EXTRA}")


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, _KEYS, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
