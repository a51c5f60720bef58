"""`fluidsched doctor`: is the installation well?"""

from __future__ import annotations

from fluidsched import _files
from fluidsched.cli.options import Shown
from fluidsched.cli.outputs import EXIT_FAILURE, emit


def doctor(shown: Shown) -> None:
    """Examine the installation: versions, threads, the simulator's cache, and self-checks against known answers.

    Takes some seconds, half a minute where the simulator has yet to be compiled. The exit status is 0 if all is well
    and 3 if a check fails.

    Examples:

    fluidsched doctor

    fluidsched doctor --json
    """
    from fluidsched.reporting import diagnose

    found = diagnose()
    emit(_files.dumps(found.to_dict()) if shown.as_json else repr(found))
    if not found.is_well:
        raise SystemExit(EXIT_FAILURE)
