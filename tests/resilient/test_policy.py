"""The policy: what it refuses and how it says so, what is due when, and where its values come from."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient import policy as policy_module
from resilient.errors import PolicyError
from resilient.policy import OTHER_VARIABLES, Policy, parse_bytes

ROOT = Path(__file__).parents[2]
KEYS = [field.name for field in fields(Policy)]


# What is due


def test_memory_is_due_whenever_another_level_is() -> None:
    policy = Policy(memory_every=7, local="/l", local_every=5, durable_every=10)
    assert policy.levels_due(7) == ("memory",)
    assert policy.levels_due(5) == ("memory", "local")
    assert policy.levels_due(3) == ()


def test_a_durable_step_is_a_local_step_too() -> None:
    assert Policy(local="/l", local_every=3, durable_every=10).levels_due(10) == ("memory", "local", "durable")


def test_without_a_local_folder_there_is_no_local_step() -> None:
    assert Policy(durable_every=10).levels_due(10) == ("memory", "durable")


def test_durable_every_zero_means_never() -> None:
    policy = Policy(durable_every=0)
    assert all("durable" not in policy.levels_due(step) for step in range(1000))


@given(
    every=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)),
    step=st.integers(0, 10_000),
    local=st.booleans(),
)
def test_levels_are_due_in_order_and_each_at_its_interval(every: tuple[int, int, int], step: int, local: bool) -> None:
    memory_every, local_every, durable_every = every
    policy = Policy(
        memory_every=memory_every,
        local="/l" if local else None,
        local_every=local_every if local else 1,
        durable_every=durable_every,
    )
    due = policy.levels_due(step)
    assert list(due) == [level for level in ("memory", "local", "durable") if level in due]
    assert ("durable" in due) == (durable_every > 0 and step % durable_every == 0)
    assert ("local" in due) == (local and (step % local_every == 0 or "durable" in due))
    assert ("memory" in due) == (step % memory_every == 0 or len(due) > 0)


def test_parity_follows_every_snapshot_in_memory() -> None:
    policy = Policy(memory_every=2, parity="2+1", durable_every=3)
    assert policy.levels_due(2) == ("memory", "parity")
    assert policy.levels_due(3) == ("memory", "parity", "durable")
    assert policy.levels_due(1) == ()


def test_the_sizes_of_parity_are_read_from_its_text() -> None:
    assert Policy(parity=" 8+2 ").parity_sizes() == (8, 2)
    assert Policy().parity_sizes() is None


# The budget


def test_the_default_budget_is_two_images_and_five_percent() -> None:
    assert Policy().budget_bytes(100) == 210
    assert Policy().budget_bytes(1) == 3


def test_a_stated_budget_holds_parity_too() -> None:
    assert Policy(memory_budget=1200, parity="4+2").budget_bytes(1) == 800
    assert Policy(parity="4+2").budget_bytes(100) == 210, "of two images, whose parity comes on top"


def test_in_a_small_group_parity_has_a_larger_part_of_the_budget() -> None:
    assert Policy(memory_budget=1200, parity="4+2").budget_bytes(1, sizes=(1, 2)) == 400


def test_a_stated_budget_does_not_depend_on_the_image() -> None:
    assert Policy(memory_budget="24 GiB").budget_bytes(100) == 24 * 1024**3
    assert Policy(memory_budget=4096).budget_bytes(100) == 4096


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5 TiB", 3 * 2**39),
        ("2 kb", 2000),
        ("512mib", 2**29),
        ("4096", 4096),
        (" 7 B ", 7),
    ],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["8G", "", "GiB", "-1 GB", "1e9", "8 GB of it", "eight", "٣ GB"])
def test_a_size_that_can_be_misread_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="memory_budget = .* a size such as"):
        Policy(memory_budget=text)


# What is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory_every", 0),
        ("memory_every", True),
        ("memory_every", 1.0),
        ("memory_every", None),
        ("local", ""),
        ("local", 3),
        ("local_every", 0),
        ("durable_every", -1),
        ("keep_last", 0),
        ("keep_every", 0),
        ("local_keep_last", 0),
        ("memory_budget", 0),
        ("memory_budget", True),
        ("memory_budget", 1.5),
        ("memory_budget", "0.1 B"),
        ("parity", "4"),
        ("parity", "0+1"),
        ("parity", "4+0"),
        ("parity", "126+2"),
        ("parity", 5),
        ("peer_bandwidth", 0),
        ("peer_address", ""),
        ("scrub_bandwidth", "fast"),
        ("on_pressure", "panic"),
        ("on_pressure", None),
        ("durable_compression", "gzip"),
        ("run_id", " "),
        ("run_id", "a\nb"),
        ("agent_idle_s", 0),
        ("write_timeout_s", float("nan")),
        ("fence_timeout_s", float("inf")),
        ("fence_timeout_s", True),
        ("fence_timeout_s", "5"),
        ("retries", 0),
        ("copy_threads", 0),
    ],
)
def test_an_impossible_value_is_refused_with_its_key_its_value_and_what_to_give(key: str, value: object) -> None:
    with pytest.raises(PolicyError, match=rf"^{key} = {re.escape(repr(value))} cannot be; give it \S+ "):
        Policy(**{key: value})  # type: ignore[arg-type]


def test_every_key_has_a_rule_and_every_default_keeps_it() -> None:
    assert list(policy_module._RULES) == KEYS
    Policy()


def test_whole_seconds_are_seconds() -> None:
    assert Policy(fence_timeout_s=5).fence_timeout_s == 5.0


@pytest.mark.parametrize(
    "keys",
    [
        {"keep_every": 10, "durable_every": 0},
        {"local_every": 2},
        {"local_keep_last": 3},
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys: Mapping[str, Any]) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy(**keys)
    assert all(f"{key} = {value}" in str(caught.value) for key, value in keys.items())
    assert "or leave" in str(caught.value)


def test_failure_domains_without_parity_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"failure_domains = 'd.toml' has no effect"):
        Policy(failure_domains="d.toml")


# Mappings


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(PolicyError, match=r"^my config: .* 'durable_evry'; did you mean durable_every\?"):
        Policy.from_mapping({"durable_evry": 5}, "my config")


def test_an_unknown_key_in_code_is_refused_with_the_nearest_one() -> None:
    keys: dict[str, Any] = {"durable_evry": 5}
    with pytest.raises(PolicyError, match=r"^a policy has no key 'durable_evry'; did you mean durable_every\?"):
        Policy(**keys)
    with pytest.raises(PolicyError, match=r"did you mean durable_every\?"):
        replace(Policy(), **keys)


def test_what_is_no_policy_is_refused_where_one_is_wanted() -> None:
    base: Any = {"durable_every": 5}
    with pytest.raises(PolicyError, match="not a dict"):
        Policy.from_environment(base, {})


def test_an_unknown_key_that_is_near_to_none_is_answered_with_all() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_mapping({"xyzzy": 5}, "my config")
    assert all(key in str(caught.value) for key in KEYS)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(PolicyError, match="no key 5"):
        Policy.from_mapping({5: 5}, "my config")  # type: ignore[dict-item]


@pytest.mark.parametrize("mapping", [{"keep_last": 0}, {"local_every": 3}])
def test_where_a_mapping_comes_from_opens_the_message(mapping: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"^my config: {next(iter(mapping))} = "):
        Policy.from_mapping(mapping, "my config")


POLICIES = st.builds(
    Policy,
    memory_every=st.integers(1),
    local=st.just("/disk"),
    local_every=st.integers(1),
    durable_every=st.integers(1),
    keep_last=st.integers(1),
    keep_every=st.none() | st.integers(1),
    local_keep_last=st.integers(1),
    memory_budget=st.none() | st.integers(1) | st.sampled_from(["24 GiB", "8GB"]),
    on_pressure=st.sampled_from(["wait", "skip"]),
    durable_compression=st.sampled_from([None, "zstd"]),
    run_id=st.none() | st.sampled_from(["run-7", "42"]),
    agent_idle_s=st.floats(0.001, 1e9),
    retries=st.integers(1),
)


@given(POLICIES)
def test_a_policy_survives_json(policy: Policy) -> None:
    assert Policy.from_mapping(json.loads(json.dumps(asdict(policy))), "json") == policy


# Files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.toml", '[other]\nx = 1\n[resilient]\ndurable_every = 5\nmemory_budget = "8GB"\n'),
        ("top.toml", 'durable_every = 5\nmemory_budget = "8GB"\n'),
        ("table.json", '{"other": 1, "resilient": {"durable_every": 5, "memory_budget": "8GB"}}'),
        ("top.json", '{"durable_every": 5, "memory_budget": "8GB"}'),
    ],
)
def test_a_file_may_have_a_table_of_ours_or_be_one(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert Policy.from_file(tmp_path / name) == Policy(durable_every=5, memory_budget="8GB")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"keep_last = 0", "keep_last = 0 cannot be"),
        ("a.toml", b"keep_lst = 1", "did you mean keep_last"),
        ("a.toml", b"local_every = 2", "local_every = 2 has no effect"),
        ("a.toml", b"keep_last =", "is not valid TOML"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.json", b'{"fence_timeout_s": NaN}', "fence_timeout_s = nan cannot be"),
        ("a.json", b"\xff", "is not valid JSON"),
        ("a.json", b"[]", "holds no table"),
        ("a.json", b'{"resilient": 3}', "holds no table"),
        ("a.yaml", b"", "is called"),
        ("absent.toml", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_its_path(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=f"^{re.escape(str(path))}: .*{message}"):
        Policy.from_file(path)


# The environment


def test_variables_override_the_file_and_the_file_overrides_the_base(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("keep_last = 3\nretries = 3\n")
    policy = Policy.from_environment(
        Policy(memory_every=4, keep_last=4, retries=4),
        {"RESILIENT_POLICY": str(tmp_path / "p.toml"), "RESILIENT_RETRIES": "2"},
    )
    assert policy == Policy(memory_every=4, keep_last=3, retries=2)


def test_a_file_may_complete_what_the_base_states(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("local_every = 3\n")
    environment = {"RESILIENT_POLICY": str(tmp_path / "p.toml")}
    assert Policy.from_environment(Policy(local="/l"), environment) == Policy(local="/l", local_every=3)
    with pytest.raises(PolicyError, match=r"^environment, with .*p.toml: local_every = 3 has no effect"):
        Policy.from_environment(None, environment)


TEXTS = {
    "memory_every": ("3", 3),
    "local": ("/disk", "/disk"),
    "local_every": ("3", 3),
    "durable_every": ("0", 0),
    "keep_last": ("3", 3),
    "keep_every": ("30", 30),
    "local_keep_last": ("3", 3),
    "memory_budget": ("24 GiB", "24 GiB"),
    "parity": ("4+2", "4+2"),
    "failure_domains": ("domains.toml", "domains.toml"),
    "peer_address": ("10.0.0.1", "10.0.0.1"),
    "peer_bandwidth": ("500 MB", "500 MB"),
    "scrub_bandwidth": ("10 MB", "10 MB"),
    "on_pressure": ("skip", "skip"),
    "durable_compression": ("zstd", "zstd"),
    "run_id": ("42", "42"),
    "preempt_signals": ("SIGUSR1,SIGTERM", "SIGUSR1,SIGTERM"),
    "regroup_signals": ("SIGUSR2", "SIGUSR2"),
    "grace_s": ("90", 90.0),
    "agent_idle_s": ("1.5", 1.5),
    "write_timeout_s": ("2", 2.0),
    "fence_timeout_s": ("2", 2.0),
    "retries": ("3", 3),
    "copy_threads": ("3", 3),
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_can_be_given_by_its_variable(key: str) -> None:
    text, value = TEXTS[key]
    policy = Policy.from_environment(Policy(local="/l", parity="2+1"), {f"RESILIENT_{key.upper()}": text})
    assert getattr(policy, key) == value
    assert type(getattr(policy, key)) is type(value)


@pytest.mark.parametrize("text", ["none", "None", ""])
def test_none_switches_off_what_can_be_none(text: str) -> None:
    assert Policy.from_environment(Policy(local="/l"), {"RESILIENT_LOCAL": text}).local is None


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("RESILIENT_KEEP_LAST", "two", "keep_last = 'two' cannot be"),
        ("RESILIENT_KEEP_LAST", "", "keep_last = '' cannot be"),
        ("RESILIENT_KEEP_LAST", "0", "keep_last = 0 cannot be"),
        ("RESILIENT_FENCE_TIMEOUT_S", "1e999", "fence_timeout_s = inf cannot be"),
        ("RESILIENT_DURABLE_EVRY", "5", "did you mean RESILIENT_DURABLE_EVERY"),
        ("RESILIENT_TOKN", "x", "did you mean RESILIENT_TOKEN"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(variable: str, text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=f"^environment.*{variable}.*{message}"):
        Policy.from_environment(None, {variable: text})


def test_variables_of_ours_that_are_no_keys_and_those_of_others_are_left_alone() -> None:
    environment = dict.fromkeys(OTHER_VARIABLES - {"RESILIENT_POLICY"}, "x")
    assert Policy.from_environment(None, environment | {"RESILIENT_POLICY": "", "PATH": "/bin"}) == Policy()


def test_the_process_has_the_environment_that_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_RETRIES", "9")
    assert Policy.from_environment().retries == 9


# The run's identity


def test_the_identity_of_a_run_is_stated_else_the_launchers_else_made_from_the_url() -> None:
    both = {"TORCHELASTIC_RUN_ID": "job-7", "SLURM_JOB_ID": "42"}
    assert Policy(run_id="mine").run_identity("s3://b/x", both) == "mine"
    assert Policy().run_identity("s3://b/x", both) == "job-7"
    assert Policy().run_identity("s3://b/x", both | {"TORCHELASTIC_RUN_ID": "none"}) == "42"
    assert Policy().run_identity("s3://b/x", both | {"TORCHELASTIC_RUN_ID": ""}) == "42"
    assert Policy().run_identity("s3://b/x", both | {"TORCHELASTIC_RUN_ID": str(uuid4())}) == "42"
    assert Policy().run_identity("s3://b/x", {}) == Policy().run_identity("s3://b/x", {"SLURM_JOB_ID": ""})
    assert Policy().run_identity("s3://b/x", {}) != Policy().run_identity("s3://b/y", {})


# The documentation


def documented() -> dict[str, tuple[str, str]]:
    """{key: (type, default)} of the table in docs/policy.md."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| `(.+?)` \| .+ \|$", (ROOT / "docs/policy.md").read_text(), re.MULTILINE)
    return {key: (kind, default) for key, kind, default in rows}


def stated() -> dict[str, tuple[str, str]]:
    """The same of the class, from its source."""
    tree = ast.parse(Path(policy_module.__file__).read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Policy")
    found: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = (in_words(node.annotation), ast.unparse(node.value))
    return found


def in_words(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.BinOp):
        return f"{in_words(annotation.left)} or {in_words(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        choices = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return " or ".join(f'"{ast.literal_eval(choice)}"' for choice in choices)
    return ast.unparse(annotation)


def test_the_documentation_lists_each_key_with_its_type_and_default() -> None:
    assert list(documented().items()) == list(stated().items())


def test_the_documentation_names_each_variable() -> None:
    assert set(re.findall(r"`(RESILIENT_[A-Z_]+)`", (ROOT / "docs/policy.md").read_text())) == OTHER_VARIABLES
