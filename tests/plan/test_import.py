"""Importing the library is light, and its public list is true."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fluidsched as fs


def test_import_loads_no_heavy_dependency() -> None:
    """`import fluidsched`, and building a workload and a server, load none of the four slow packages."""
    code = (
        "import sys, fluidsched as fs\n"
        "fs.Workload([fs.RequestType('a', 1.0, 10, 5)]); fs.Server(1000, fs.IterationTime.paper(0.01, 1e-7))\n"
        "print([m for m in ('cvxpy', 'matplotlib', 'pandas', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    """Each name of `__all__` can be had, and `dir` shows it."""
    for name in fs.__all__:
        assert getattr(fs, name) is not None
        assert name in dir(fs)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        fs.no_such_name  # noqa: B018


def test_what_type_checkers_see_is_what_loads() -> None:
    """The imports under TYPE_CHECKING list the public names, no more and no fewer."""
    tree = ast.parse(Path(fs.__file__).read_text())
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in guard.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(fs.__all__)
