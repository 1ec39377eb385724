"""The repository's own shape: one import namespace, one tree, files that can be read in one sitting.

Each of these fails silently elsewhere: a folder that no type checker sees, a wheel that brings a package called
`kernels`. Style that ruff can check is in pyproject.toml, who may import whom in its import-linter contracts.
"""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("checkpoint", "comms", "ec", "kernels", "launch")
FOLDERS = (*ROOMS, "resilient", "tests", "examples", "bench")
LONGEST_FILE_LINES = 500


def sources() -> list[Path]:
    """All Python files of the checkout, each once."""
    found = [ROOT / "setup.py"]
    for folder in FOLDERS:
        for parent, folders, names in os.walk(ROOT / folder):  # follows no links
            folders[:] = [name for name in folders if name != "__pycache__"]
            found += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(found)


def settings() -> dict[str, Any]:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert isinstance(tools, dict)
    return tools


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_every_room_is_linked_into_the_namespace() -> None:
    links = {path.name: path.readlink() for path in (ROOT / "resilient").iterdir() if path.is_symlink()}
    assert links == {name: Path("..") / name for name in ROOMS}


def test_every_folder_with_an_init_file_is_a_room() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {*ROOMS, "resilient"}


def test_every_tool_sees_every_folder() -> None:
    tools = settings()
    linked = {f"resilient/{name}" for name in ROOMS}
    assert set(tools["pyright"]["include"]) == linked | {"resilient", "tests", "examples", "bench"}
    assert set(tools["mypy"]["files"]) == {"resilient", "tests", "examples", "bench"}
    assert set(tools["coverage"]["run"]["source"]) == {*ROOMS, "resilient"}
    assert set(tools["ruff"]["extend-exclude"]) == linked, "ruff sees the rooms under their own names"
    assert tools["pytest"]["ini_options"]["filterwarnings"][0] == "error"


def test_every_python_folder_of_a_room_is_a_package() -> None:
    """A folder without `__init__.py` imports from a checkout and is missing from the wheel."""
    folders = {path.parent for path in sources() if path.relative_to(ROOT).parts[0] in ROOMS}
    assert named(sorted(folder for folder in folders if not (folder / "__init__.py").exists())) == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a wheel holds that is built from a clean copy of the checkout."""
    checkout, out = tmp_path_factory.mktemp("checkout") / "it", tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*pip, "--wheel-dir", out, checkout], cwd=out, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("torch_resilient-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_brings_nothing_but_resilient(wheel_names: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"resilient"}


def test_the_wheel_brings_all_of_resilient(wheel_names: list[str]) -> None:
    presets = (ROOT / "checkpoint" / "catalog" / "presets").iterdir()
    expected = {"resilient/py.typed", *(f"resilient/checkpoint/catalog/presets/{path.name}" for path in presets)}
    for path in sources():
        name = path.relative_to(ROOT)
        if name.parts[0] in ROOMS:
            expected.add(f"resilient/{name.as_posix()}")
        elif name.parts[0] == "resilient":
            expected.add(name.as_posix())
    assert {name for name in wheel_names if name.startswith("resilient/")} == expected


def test_every_source_file_says_what_it_is_for() -> None:
    silent = [path for path in sources() if not docstring(path).strip() and path.read_text().strip()]
    assert named(silent) == []


def test_every_source_file_can_be_read_in_one_sitting() -> None:
    long = [path for path in sources() if len(path.read_text().splitlines()) > LONGEST_FILE_LINES]
    assert named(long) == []


def imported(path: Path) -> list[tuple[int, str]]:
    """(number of leading dots, module) of every import in a file, those inside functions too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_every_import_is_absolute() -> None:
    assert named([path for path in sources() if any(dots for dots, _ in imported(path))]) == []


def test_a_room_is_imported_by_its_full_name_only() -> None:
    """`import checkpoint` works in a checkout, makes every class twice, and fails where the library is installed."""
    bare = [
        path for path in sources() if any(not dots and name.split(".")[0] in ROOMS for dots, name in imported(path))
    ]
    assert named(bare) == []
