"""Huge pages for memory files: with the rights to mount, without them, and where a system allows neither."""

import os
import subprocess
import sys

import pytest

from resilient.checkpoint.agent import huge_pages

PROGRAM = """
import os, mmap, sys
sys.path.insert(0, sys.argv[1])
import huge_pages
file = huge_pages.huge_file("image")
if file is None:
    print("none")
    sys.exit()
os.ftruncate(file, 2 * huge_pages.HUGE_BYTES)
with mmap.mmap(file, 2 * huge_pages.HUGE_BYTES) as view:
    view[0] = 1
    huge = [line for line in open("/proc/self/smaps") if line.startswith("ShmemPmdMapped")]
    print(os.fstat(file).st_blocks * 512, os.fstat(file).st_uid, os.fstat(file).st_nlink, os.get_inheritable(file))
"""


def said_by(*prefix: str) -> str:
    folder = os.path.dirname(huge_pages.__file__)
    words = [*prefix, sys.executable, "-I", "-S", "-c", PROGRAM, folder]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def a_namespace_may_mount() -> bool:
    words = ["unshare", "--user", "--map-current-user", "--mount", "true"]
    return subprocess.run(words, capture_output=True, timeout=60).returncode == 0


def test_one_who_may_mount_gets_a_huge_page_at_the_first_byte() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    assert said_by() == f"{huge_pages.HUGE_BYTES} 0 0 False"


def test_one_who_may_not_gets_it_by_a_user_namespace() -> None:
    if os.geteuid() != 0 or not a_namespace_may_mount():
        pytest.skip("needs user namespaces, and rights to give up")
    assert (
        said_by("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin")
        == f"{huge_pages.HUGE_BYTES} 0 0 False"
    )


def test_where_namespaces_are_forbidden_too_there_are_none_and_no_error() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs the right to forbid")
    limit = "unshare --user --map-root-user --mount sh -c 'echo 0 > /proc/sys/user/max_user_namespaces; "
    command = limit + 'exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin "$0" "$@"\''
    assert said_by("sh", "-c", f'exec {command} "$0" "$@"') == "none"
