"""Exceptions, by culprit: the input, the model, the solver, the simulation.

The command line maps them to exit statuses: `InputError` 2, `InfeasibleError` 1, the rest 3.
Wrong types raise the built-in `TypeError` only where Python itself would.
"""

from __future__ import annotations

__all__ = ["FluidschedError", "InfeasibleError", "InputError", "SimulationError", "SolverError"]


class FluidschedError(Exception):
    """Anything fluidsched raises on purpose."""


class InputError(FluidschedError, ValueError):
    """The input is wrong: names the argument, what was given, what is required, and the way out.

    Parameters
    ----------
    argument : str
        Name of the argument, field or file (with line) at fault.
    received : object
        What was given; shown with `repr` unless it is a string already made for reading.
    required : str
        What would have been accepted, completing "<argument> must ...".
    remedy : str, optional
        A sentence with the way out.

    Examples
    --------
    >>> print(InputError("arrival_rate", -1.0, "be finite and non-negative", "Use 0 to switch a type off."))
    arrival_rate must be finite and non-negative; got -1.0. Use 0 to switch a type off.
    """

    def __init__(self, argument: str, received: object, required: str, remedy: str = "") -> None:
        self.argument = argument
        self.received = received
        self.required = required
        self.remedy = remedy
        shown = received if isinstance(received, str) else repr(received)
        super().__init__(f"{argument} must {required}; got {shown}." + (f" {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.argument, self.received, self.required, self.remedy)


class InfeasibleError(FluidschedError):
    """The question has no answer: an infeasible model, no admissible table, an SLO nobody can meet.

    `reason` is a short machine-readable word where there is one (for tables: "time", "memory", "rounding").
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        self.reason = reason
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.args[0], self.reason)


class SolverError(FluidschedError):
    """The solver failed or stopped short; the message carries its own words."""


class SimulationError(FluidschedError):
    """The simulation broke a law it must keep (`check=True`) or could not be carried out."""
