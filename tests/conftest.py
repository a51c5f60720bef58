"""Shared test settings: where the real data lies, hypothesis profiles, and a guard on global state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real traces and profiles; skips where absent, fails where they are required (`.ci/run`)."""
    root = Path(os.environ.get("FLUIDSCHED_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        message = f"real data not found at {root}; set FLUIDSCHED_TEST_DATA to the folder that holds traces/"
        if os.environ.get("FLUIDSCHED_REQUIRE_DATA"):
            pytest.fail(message)
        pytest.skip(message)
    return root
