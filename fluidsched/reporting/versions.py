"""Versions, for bug reports."""

from __future__ import annotations

import platform
from importlib import metadata

from fluidsched import __version__

__all__ = ["show_versions"]


def show_versions() -> str:
    """Versions of fluidsched, Python, the platform and the dependencies, one a line.

    Returns
    -------
    str
        To print or to paste into a bug report.

    Examples
    --------
    >>> import fluidsched as fs
    >>> fs.show_versions().startswith("fluidsched")
    True
    """
    lines = [
        f"fluidsched {__version__}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
    ]
    for name in ("numpy", "scipy", "highspy", "cvxpy", "matplotlib", "numba", "pandas", "typer", "rich"):
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    return "\n".join(lines)
