"""Text, files and the page of a plan, and the state of the installation.

Objects print themselves (`repr`); this room puts their texts into one, writes run directories with a manifest, and
reports versions. It computes no result of its own.
"""

from __future__ import annotations

from fluidsched.reporting.files import figures, plan_summary, run_directory, write_plan
from fluidsched.reporting.installation import diagnose, show_versions
from fluidsched.reporting.page import report
from fluidsched.reporting.text import catalog_text, plan_text

__all__ = [
    "catalog_text",
    "diagnose",
    "figures",
    "plan_summary",
    "plan_text",
    "report",
    "run_directory",
    "show_versions",
    "write_plan",
]
