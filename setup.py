"""Maps each top-level folder to one subpackage of `resilient`.

Everything else about the distribution stands in pyproject.toml. The map is explicit, so that nothing called `kernels`
or `launch` reaches site-packages; `tests/test_layout.py` pins it. A new top-level folder needs its name here, a link
in `resilient/`, and its line in pyproject.toml (pyright, coverage, import-linter).
"""

from setuptools import find_packages, setup

SUBPACKAGES = ("checkpoint", "ec", "comms", "kernels", "launch")

setup(
    packages=["resilient"]
    + [f"resilient.{name}" for name in SUBPACKAGES]
    + [f"resilient.{name}.{sub}" for name in SUBPACKAGES for sub in find_packages(name)],
    package_dir={f"resilient.{name}": name for name in SUBPACKAGES},
)
