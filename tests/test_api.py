"""The public names, pinned."""

import inspect
import subprocess
import sys

import resilient
import resilient.errors


def test_the_public_names_are_these() -> None:
    names = "Checkpointer Policy Preempted ResilientError SaveHandle protect"
    assert sorted(resilient.__all__) == names.split()
    assert all(hasattr(resilient, name) for name in resilient.__all__)
    assert dir(resilient) == sorted([*resilient.__all__, "__version__"])


def test_the_methods_of_the_public_classes_are_these() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(resilient.Checkpointer) == {"save", "fence", "restore", "newest", "request_stop", "close"}
    assert public(resilient.SaveHandle) == {"durable"}
    assert list(inspect.signature(resilient.Checkpointer).parameters) == ["url", "state", "policy"]
    assert list(inspect.signature(resilient.protect).parameters) == ["model", "optimizer", "url", "policy", "state"]


def test_every_error_is_in_the_tree_that_its_module_draws() -> None:
    drawn = resilient.errors.__doc__ or ""
    for name in resilient.errors.__all__:
        kind = SystemExit if name == "Preempted" else resilient.ResilientError
        assert issubclass(getattr(resilient.errors, name), kind)
        assert f" {name}" in drawn or f"`{name}`" in drawn or name == "ResilientError"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, resilient, resilient.errors, resilient.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
