"""The policy: what is kept, where, how often, and how long anything may take.

One frozen value, checked when it is made, from keyword arguments, a mapping, a file or the environment. It decides
(`levels_due`, `budget_bytes`, `run_identity`) and does nothing: the writers below `checkpoint/` act on it.
`docs/policy.md` lists the keys. Where files and variables are read: `Policy.from_file`, `Policy.from_environment`.
"""

import difflib
import json
import math
import os
import re
import signal
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from resilient.errors import PolicyError

__all__ = ["Policy", "parse_bytes"]

PREFIX = "RESILIENT_"
# Variables of ours that are not keys of the policy; each is read where its name says.
_OTHERS = ("POLICY", "RUNTIME_DIR", "CACHE_DIR", "TOKEN", "LAUNCH", "NODE", "LOG", "EVENTS", "AGENT_STEP")
_OF_COLLECTIVES = ("TOPOLOGY", "STRIPE_FROM", "NET_STATUS")
OTHER_VARIABLES = frozenset(f"{PREFIX}{name}" for name in (*_OTHERS, *_OF_COLLECTIVES))

_PARITY = re.compile(r"([1-9]\d*)\+([1-9]\d*)", re.ASCII)
_RANDOM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)
_SEPARATOR = re.compile(r"[\s,]+")
_CATCHABLE = frozenset(signal.Signals.__members__) - {"SIGKILL", "SIGSTOP"}
_MOST_MEMBERS = 127  # of a parity group: twice as many, where the nodes do not divide, still fit the code
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|[kmgt]i?b)?", re.IGNORECASE | re.ASCII)
_UNITS = {"b": 1} | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is kept, where and how often. Raises `PolicyError` on any value or combination that cannot be meant."""

    memory_every: int = 1
    local: str | None = None
    local_every: int = 1
    durable_every: int = 100
    keep_last: int = 2
    keep_every: int | None = None
    local_keep_last: int = 2
    memory_budget: int | str | None = None
    parity: str | None = None
    failure_domains: str | None = None
    peer_address: str | None = None
    peer_bandwidth: int | str | None = None
    scrub_bandwidth: int | str | None = "50 MB"
    on_pressure: Literal["wait", "skip"] = "wait"
    durable_compression: Literal["zstd"] | None = None
    run_id: str | None = None
    preempt_signals: str | None = None
    regroup_signals: str | None = None
    grace_s: float | None = None
    agent_idle_s: float = 600.0
    write_timeout_s: float = 600.0
    fence_timeout_s: float = 120.0
    retries: int = 5
    copy_threads: int = 1

    def __new__(cls, *_: object, **keys: object) -> Self:
        """Before the fields are set, for Python's own complaint of an unknown key does not name the nearest one."""
        for key in keys:
            if key not in _RULES:
                raise PolicyError(_no_key(key))
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for key, rule in _RULES.items():
            rule.check(key, getattr(self, key))
        if self.keep_every is not None and self.durable_every == 0:
            raise PolicyError(
                f"keep_every = {self.keep_every} contradicts durable_every = 0 (never): there would be no durable "
                "snapshot to keep; give durable_every a positive number, or leave keep_every out"
            )
        if self.parity is None and self.failure_domains is not None:
            raise PolicyError(
                f"failure_domains = {self.failure_domains!r} has no effect, because there is no parity; "
                'set parity, for example to "4+1", or leave failure_domains out'
            )
        both = {*self.signals("preempt_signals")} & {*self.signals("regroup_signals")}
        if both:
            raise PolicyError(
                f"{signal.Signals(min(both)).name} is in preempt_signals and in regroup_signals: leave it out of one"
            )
        for key, value, default in (("local_every", self.local_every, 1), ("local_keep_last", self.local_keep_last, 2)):
            if self.local is None and value != default:
                raise PolicyError(
                    f"{key} = {value} has no effect, because there is no local level; "
                    f"set local to a folder on a disk of the node, or leave {key} out"
                )

    def levels_due(self, step: int) -> tuple[str, ...]:
        """The levels that get a snapshot at `step`: some of ("memory", "parity", "local", "durable"), in that order.

        `memory` is in it whenever another level is, because the others are made from it; a durable step is also a
        local one, where there is a local level. Parity follows every snapshot in memory.
        """
        durable = self.durable_every > 0 and step % self.durable_every == 0
        local = self.local is not None and (durable or step % self.local_every == 0)
        memory = durable or local or step % self.memory_every == 0
        due = {"memory": memory, "parity": memory and self.parity is not None, "local": local, "durable": durable}
        return tuple(level for level, is_due in due.items() if is_due)

    def parity_sizes(self) -> tuple[int, int] | None:
        """k and m of the parity level; None without one."""
        match = _PARITY.fullmatch(self.parity.strip()) if self.parity is not None else None
        return None if match is None else (int(match[1]), int(match[2]))

    def signals(self, key: Literal["preempt_signals", "regroup_signals"]) -> tuple[int, ...]:
        """The numbers of the signals that a key names."""
        names = getattr(self, key)
        return () if names is None else _signals(names)

    def budget_bytes(self, image_bytes: int, sizes: tuple[int, int] | None = None) -> int:
        """The memory that one rank's images may take, in bytes, for images of `image_bytes`.

        What is left of the budget for images when each needs m / k of its size for parity too. Without a stated budget
        that is two images and 5 % on top. It need not hold an image: that is for the caller to compare. `sizes`: k and
        m of the parity group that there is, which in a small job is smaller than the policy's.
        """
        if self.memory_budget is None:
            return -(-2 * image_bytes * 105 // 100)
        k, m = sizes or self.parity_sizes() or (1, 0)
        return parse_bytes(self.memory_budget) * k // (k + m)

    def run_identity(self, url: str, environment: Mapping[str, str]) -> str:
        """The name that this run keeps over its restarts: `run_id`, else the launcher's, else one made from `url`."""
        if self.run_id is not None:
            return self.run_id
        elastic = environment.get("TORCHELASTIC_RUN_ID", "")
        # "none" is torchrun's default, the same for every job of a machine; with --standalone it draws a random one,
        # another at each start, by which the memory of the last would not be found again.
        if elastic not in ("", "none") and not _RANDOM.fullmatch(elastic):
            return elastic
        return environment.get("SLURM_JOB_ID") or f"url-{sha256(url.encode()).hexdigest()[:16]}"

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str) -> Self:
        """A policy of these keys; the others have their defaults. `where` opens the message of a `PolicyError`."""
        return cls._made(_checked(mapping, where), where)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """A policy from a .toml or .json file: its table `resilient` if it has one, else the whole file.

        Blocks on the file. Raises `PolicyError` also for a file that cannot be read or is neither of the two.
        """
        return cls.from_mapping(_read(Path(path)), str(path))

    @classmethod
    def from_environment(cls, base: "Policy | None" = None, environment: Mapping[str, str] | None = None) -> Self:
        """`base`, overridden by the file that RESILIENT_POLICY names, overridden by RESILIENT_<KEY> variables.

        `environment` is the process's own by default. "none" and "" mean None where a key can be None. This is the one
        place that reads these variables. Raises `PolicyError`, which names the variable; also for a RESILIENT_ variable
        that does not exist, and for a base that is no policy.
        """
        environment = os.environ if environment is None else environment
        if not isinstance(base, Policy | None):
            raise PolicyError(f"a policy is wanted, not a {type(base).__name__}: Policy(...), or Policy.from_mapping")
        values = {} if base is None else asdict(base)
        where = "environment"
        if path := environment.get(f"{PREFIX}POLICY"):
            values |= _checked(_read(Path(path)), path)
            where = f"environment, with {path}"
        return cls._made(values | _from_variables(environment), where)

    @classmethod
    def _made(cls, values: Mapping[str, Any], where: str) -> Self:
        try:
            return cls(**values)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None


def parse_bytes(size: int | str) -> int:
    """A number of bytes from an int, or from text such as "24 GiB", "8GB", "1.5 TiB" or "4096".

    Raises ValueError, also for "8G", which can be read as 8 GB and as 8 GiB.
    """
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"{size!r} is not a size in bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "b").lower()])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What one key accepts, in words and as a test, and how it is read from the text of a variable."""

    expects: str
    accepts: Callable[[Any], bool]
    from_text: Callable[[str], Any] = str
    can_be_none: bool = False

    def check(self, key: str, value: object) -> None:
        if not (self.accepts(value) or (self.can_be_none and value is None)):
            none = ", or None" if self.can_be_none else ""
            raise PolicyError(f"{key} = {value!r} cannot be; give it {self.expects}{none}")

    def read(self, text: str) -> Any:
        """The value that a variable's text means; text that means none of the right type is returned for `check`."""
        if self.can_be_none and text.strip().lower() in ("", "none"):
            return None
        try:
            return self.from_text(text)
        except ValueError:
            return text


def _whole(least: int, *, can_be_none: bool = False) -> _Rule:
    return _Rule(
        expects=f"a whole number of at least {least}",
        accepts=lambda value: type(value) is int and value >= least,  # a bool is an int, but not a number
        from_text=int,
        can_be_none=can_be_none,
    )


def _seconds(*, can_be_none: bool = False) -> _Rule:
    return _Rule(
        expects="a number of seconds above 0",
        accepts=lambda value: type(value) in (int, float) and math.isfinite(value) and value > 0,
        from_text=float,
        can_be_none=can_be_none,
    )


def _words(expects: str) -> _Rule:
    return _Rule(
        expects=expects,
        accepts=lambda value: isinstance(value, str) and bool(value.strip()) and value.isprintable(),
        can_be_none=True,
    )


def _one_of(*choices: str, can_be_none: bool = False) -> _Rule:
    return _Rule(
        expects=" or ".join(f'"{choice}"' for choice in choices),
        accepts=lambda value: isinstance(value, str) and value in choices,
        can_be_none=can_be_none,
    )


def _is_parity(value: object) -> bool:
    match = _PARITY.fullmatch(value.strip()) if isinstance(value, str) else None
    return match is not None and int(match[1]) + int(match[2]) <= _MOST_MEMBERS


def _signals(names: str) -> tuple[int, ...]:
    """Raises ValueError for a name that no signal has, or only one that cannot be caught."""
    split = _SEPARATOR.split(names.strip())
    if not _CATCHABLE.issuperset(split):
        raise ValueError(f"{names!r} is not a list of signals")
    return tuple(int(signal.Signals[name]) for name in split)


def _is_signals(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return bool(_signals(value))
    except ValueError:
        return False


def _names_of_signals() -> _Rule:
    return _Rule(
        expects='names of signals that can be caught, such as "SIGUSR1 SIGTERM"', accepts=_is_signals, can_be_none=True
    )


def _is_budget(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return False
    try:
        return parse_bytes(value) > 0
    except ValueError:
        return False


def _bandwidth() -> _Rule:
    return _Rule(
        expects='a number of bytes a second above 0, or a size such as "500 MB"', accepts=_is_budget, can_be_none=True
    )


_RULES = {
    "memory_every": _whole(1),
    "local": _words("the path of a folder on a disk of the node"),
    "local_every": _whole(1),
    "durable_every": _whole(0),
    "keep_last": _whole(1),
    "keep_every": _whole(1, can_be_none=True),
    "local_keep_last": _whole(1),
    "memory_budget": _Rule(
        expects='a number of bytes above 0, or a size such as "24 GiB" or "8GB"', accepts=_is_budget, can_be_none=True
    ),
    "parity": _Rule(
        expects=f'"k+m", data and parity nodes of a group, for example "4+1", at most {_MOST_MEMBERS} together',
        accepts=_is_parity,
        can_be_none=True,
    ),
    "failure_domains": _words("the path of a TOML file that names the failure domains of the nodes"),
    "peer_address": _words("a host name or an address of this node"),
    "peer_bandwidth": _bandwidth(),
    "scrub_bandwidth": _bandwidth(),
    "on_pressure": _one_of("wait", "skip"),
    "durable_compression": _one_of("zstd", can_be_none=True),
    "run_id": _words("a name of printable characters"),
    "preempt_signals": _names_of_signals(),
    "regroup_signals": _names_of_signals(),
    "grace_s": _seconds(can_be_none=True),
    "agent_idle_s": _seconds(),
    "write_timeout_s": _seconds(),
    "fence_timeout_s": _seconds(),
    "retries": _whole(1),
    "copy_threads": _whole(1),
}


def _checked(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`mapping` as it is, if each key exists and each value is possible by itself. Raises `PolicyError`."""
    for key, value in mapping.items():
        if key not in _RULES:
            raise PolicyError(f"{where}: {_no_key(key)}")
        try:
            _RULES[key].check(key, value)
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None
    return dict(mapping)


def _from_variables(environment: Mapping[str, str]) -> dict[str, Any]:
    """The keys that RESILIENT_<KEY> variables give. Raises `PolicyError`."""
    known = {f"{PREFIX}{key.upper()}": key for key in _RULES}
    values: dict[str, Any] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in known:
            raise PolicyError(
                f"environment: there is no variable {variable}; {_nearest(variable, [*known, *OTHER_VARIABLES])}"
            )
        key = known[variable]
        values |= _checked({key: _RULES[key].read(text)}, f"environment, {variable}")
    return values


def _no_key(key: object) -> str:
    return f"a policy has no key {key!r}; {_nearest(str(key), _RULES)}"


def _nearest(word: str, known: Iterable[str]) -> str:
    """What to say about an unknown word."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known))}"


def _read(path: Path) -> Mapping[str, Any]:
    """The mapping that stands in a policy file. Raises `PolicyError`."""
    readers: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    if path.suffix not in readers:
        raise PolicyError(f"{path}: a policy file is called *.toml or *.json; rename it")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"{path}: cannot be read ({error.strerror}); correct the path or its permissions") from error
    except ValueError as error:  # not UTF-8, not TOML, not JSON
        raise PolicyError(f"{path}: is not valid {path.suffix[1:].upper()} ({error}); correct it") from error
    table = content.get("resilient", content) if isinstance(content, dict) else content
    if not isinstance(table, dict):
        raise PolicyError(f"{path}: holds no table of keys; write one key = value for each thing to change")
    return table
